"""The native ViT: open_clip's parameter names, with token masks, token dropping and images of any size."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpretrain import rng
from mmpretrain.errors import ModelError
from mmpretrain.towers.base import Tokens, Tower
from mmpretrain.towers.transformer import LayerNorm, Transformer, compute_dtype
from mmpretrain.types import Encoded


class VisionTransformer(Tower):
    """ViT with a class token as in CLIP, with the parameters of open_clip's VisionTransformer.

    Source: Dosovitskiy et al. 2021; Radford et al. 2021, section 2.4.
    """

    patch_size: int

    def __init__(
        self,
        embed_dim: int,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        width: int = 768,
        layers: int = 12,
        head_width: int = 64,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        patch_dropout: float = 0.0,
        no_ln_pre: bool = False,
        pos_embed_type: str = "learnable",
        final_ln_after_pool: bool = False,
        pool_type: str = "tok",
        quick_gelu: bool = False,
        act_kwargs: dict | None = None,
        norm_kwargs: dict | None = None,
    ):
        super().__init__()
        norm = norm_kwargs or {}
        self.width, self.embed_dim, self.patch_size, self.patch_dropout = width, embed_dim, patch_size, patch_dropout
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if patch_size > min(self.image_size) or head_width > width:
            raise ModelError(
                f"vision_cfg: patch_size {patch_size} of image_size {image_size}, head_width {head_width} of width {width}: too large"
            )
        self.grid = (self.image_size[0] // patch_size, self.image_size[1] // patch_size)
        self.pool_type, self.final_ln_after_pool = pool_type, final_ln_after_pool
        self.one_position = pool_type == "tok"
        scale = width**-0.5
        positions = self.grid[0] * self.grid[1] + 1
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        if pos_embed_type == "learnable":
            self.positional_embedding = nn.Parameter(scale * torch.randn(positions, width))
        else:
            self.positional_embedding = nn.Parameter(sin_cos_2d(width, self.grid), requires_grad=False)
        self.ln_pre = nn.Identity() if no_ln_pre else LayerNorm(width, **norm)
        block = {"mlp_ratio": mlp_ratio, "ls_init_value": ls_init_value, "quick_gelu": quick_gelu, "act": act_kwargs or {}, "norm": norm}
        self.transformer = Transformer(width, layers, width // head_width, **block)
        self.ln_post = LayerNorm(width, **norm)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def embed(
        self,
        data: Tensor,
        hidden: Tensor | None = None,
        mode: Literal["replace", "drop"] = "replace",
        bidirectional: bool = False,
    ) -> Tokens:
        p = self.patch_size
        grid = (data.shape[2] // p, data.shape[3] // p)
        dtype = compute_dtype(data, self.conv1.weight)
        # a linear over unfolded patches is conv1, as one matrix product; pixels beyond the last whole patch are dropped as conv1 does
        x = data[:, :, : grid[0] * p, : grid[1] * p].to(dtype).unflatten(3, (grid[1], p)).unflatten(2, (grid[0], p))
        x = F.linear(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), self.conv1.weight.flatten(1))  # [B,N,D]
        position = self.positional_embedding
        if grid != self.grid:
            position = resize_grid(position, self.grid, grid)
        position = position.to(dtype)
        if hidden is None and self.patch_dropout and self.training:
            hidden, mode = self._dropped(data, x.shape[1]), "drop"
        if hidden is not None and hidden.shape != x.shape[:2]:
            raise ModelError(f"mask {tuple(hidden.shape)} for {tuple(x.shape[:2])} patches: draw it for the grid {grid}")
        if hidden is not None and mode == "replace":
            if self.mask_embedding is None:
                raise ModelError("replacing tokens needs a mask embedding: call add_mask_embedding() once the tower is built")
            x = torch.where(hidden[..., None], self.mask_embedding.to(dtype), x)
        x = x + position[1:]
        if hidden is not None and mode == "drop":
            x = visible(x, hidden)
        first = (self.class_embedding.to(dtype) + position[0]).expand(len(x), 1, -1)
        return Tokens(self.ln_pre(torch.cat([first, x], dim=1)), grid=grid, hidden=hidden)

    def _dropped(self, data: Tensor, num: int) -> Tensor:
        """Draw open_clip's patch dropout (FLIP), seeded by the pixels: encoding a chunk again drops the same patches."""
        seeds = data.float().contiguous().view(torch.int32).sum((1, 2, 3), dtype=torch.int64)
        rank = rng.uniform(seeds, "patch_dropout", num).argsort(1).argsort(1)
        return rank >= max(1, int(num * (1 - self.patch_dropout)))

    def trunk(self, tokens: Tokens, attention: bool = False, pooled_only: bool = False) -> tuple[Tensor, Tensor | None]:
        x, weights = self.transformer(tokens, attention, pooled_only and self.one_position)
        return x, None if weights is None else weights[:, 1:]

    def readout(self, x: Tensor, tokens: Tokens, outputs: frozenset[str], attention: Tensor | None = None) -> Encoded:
        after, avg = self.final_ln_after_pool, self.pool_type == "avg"
        words = features = pooled = None
        if not after and (avg or "tokens" in outputs):
            x = self.ln_post(x)
        if "tokens" in outputs:
            words = x[:, 1:]
        if outputs & {"features", "pooled"}:
            pooled = x[:, 1:].mean(1) if avg else x[:, 0]
            if after or not (avg or "tokens" in outputs):
                pooled = self.ln_post(pooled)
            if "features" in outputs:
                features = pooled @ self.proj
        return Encoded(features, pooled if "pooled" in outputs else None, words, attention, tokens.hidden, tokens.grid)

    def add_mask_embedding(self) -> None:
        if self.mask_embedding is None:
            self.mask_embedding = nn.Parameter(torch.randn(self.width) * 0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.transformer.grad_checkpointing = enable

    def compile_trunk(self) -> None:
        self.transformer.compile(dynamic=False)


def visible(x: Tensor, hidden: Tensor) -> Tensor:
    """Select the tokens that are not hidden: x [B, N, D] -> [B, K, D] in raster order.

    Raises:
        ModelError: rows hide different numbers of tokens (checked on the CPU only).
    """
    keep = int(hidden.shape[1] - hidden[0].sum())
    if not x.is_cuda and not bool((hidden.sum(1) == hidden.shape[1] - keep).all()):
        raise ModelError("rows hide different numbers of tokens: dropping needs the same number in every row")
    order = hidden.to(torch.uint8).argsort(dim=1, stable=True)[:, :keep]
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))


def resize_grid(position: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize a position embedding [1 + old, D] to [1 + new, D]: bicubic, antialiased, as open_clip does on loading."""
    image = position[1:].to(torch.promote_types(position.dtype, torch.float32)).view(1, *old, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([position[:1], image.permute(0, 2, 3, 1).flatten(0, 2).to(position.dtype)])


def sin_cos_2d(width: int, grid: tuple[int, int]) -> Tensor:
    """Return the fixed sine-cosine position embedding [1 + N, D] of a square grid."""
    from open_clip.pos_embed import get_2d_sincos_pos_embed

    if grid[0] != grid[1]:
        raise ModelError(f"pos_embed_type sin_cos_2d needs a square grid, found {grid}: use 'learnable'")
    return torch.from_numpy(get_2d_sincos_pos_embed(width, grid[0], cls_token=True)).float()
