"""The objective `mae`: a masked autoencoder that predicts the pixels of dropped patches with a light decoder (MAE)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain.config.build import Range
from mmpretrain.errors import ModelError
from mmpretrain.functional import exact, patchify, unpatchify
from mmpretrain.objectives.base import Augment, Context, Objective, ObjectiveConfig, require
from mmpretrain.towers.base import Tokens
from mmpretrain.towers.transformer import LayerNorm, Transformer
from mmpretrain.towers.vision import sin_cos_2d
from mmpretrain.types import Encode, MaskSpec, Requested


@dataclass
class MAEConfig(ObjectiveConfig):
    """Options of `mae`; the defaults are the paper's."""

    mask_ratio: Annotated[float, Range(above=0, below=1)] = 0.75  # fraction of patches dropped
    width: Annotated[int, Range(1)] = 512  # of the decoder
    layers: Annotated[int, Range(1)] = 8  # blocks of the decoder
    heads: Annotated[int, Range(1)] = 16  # of the decoder's attention
    normalise_target: bool = True  # predict each patch after subtracting its mean and dividing by its deviation
    augment: Augment = field(default_factory=lambda: Augment("crop", scale=(0.2, 1.0)))  # the image view
    view_index: Annotated[int, Range(0)] = 0  # which of several views of that kind


class MAE(Objective):
    """Squared error between the pixels of hidden patches and a light decoder's prediction from the visible ones.

    Source: He et al. 2022, section 3; decoder of section 4.1. Departures: the decoder does not see the class token,
    whose outputs are left to other objectives; the encoder's position embedding is the tower's, learned by default,
    where the paper's is fixed.
    """

    Config = MAEConfig
    per_row = True  # every row hides the same number of patches
    positions: Tensor

    def __init__(self, config: MAEConfig, context: Context) -> None:
        super().__init__()
        self.patch = require(context.patch_size, "an image tower with patches", "mae")
        side, rest = divmod(context.image_size, self.patch)
        if rest:
            raise ModelError(f"images of {context.image_size} pixels are not a multiple of patches of {self.patch}: change image_size")
        if not 1 <= round(config.mask_ratio * side**2) < side**2:
            raise ModelError(f"mask_ratio {config.mask_ratio} hides {round(config.mask_ratio * side**2)} of {side**2} patches")
        if config.width % config.heads or config.width % 4:
            raise ModelError(f"a decoder of width {config.width} does not divide into {config.heads} heads and 4 parts of its positions")
        view = context.image_view(config.augment, config.view_index)
        mask = MaskSpec(config.mask_ratio, "drop")
        self.needs = {"image": Encode(config.source, view, mask, outputs=frozenset({"tokens"}))}
        self.normalise_target = config.normalise_target
        self.embed = nn.Linear(context.image_width, config.width)
        self.mask_token = nn.Parameter(torch.randn(config.width) * 0.02)
        self.register_buffer("positions", sin_cos_2d(config.width, (side, side))[1:], persistent=False)  # [N,W], fixed
        options = {"mlp_ratio": 4.0, "ls_init_value": None, "quick_gelu": False, "act": {}, "norm": {}}
        self.decoder = Transformer(config.width, config.layers, config.heads, **options)
        self.norm = LayerNorm(config.width)
        self.pixels = nn.Linear(config.width, 3 * self.patch**2)

    def _target(self, patches: Tensor) -> Tensor:
        if not self.normalise_target:
            return patches
        return (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()

    def _decode(self, image: Requested) -> Tensor:
        """Return the decoder's output for every patch, [B, N, W]."""
        seen = self.embed(image.tokens)  # [B,visible,W], in raster order
        assert image.mask is not None  # the encode has a MaskSpec
        full = self.mask_token.to(seen.dtype).expand(*image.mask.shape, -1)
        full = full.masked_scatter(~image.mask[..., None], seen) + self.positions.to(seen.dtype)
        return self.norm(self.decoder(Tokens(full), False, False)[0])

    def forward(self, image: Requested) -> dict[str, Tensor]:  # type: ignore[override]
        target = self._target(patchify(image.view.data, self.patch))[image.mask]  # [B * hidden, 3pp]
        predicted = self.pixels(self._decode(image)[image.mask])
        return {"loss": F.mse_loss(exact(predicted), exact(target))}

    @torch.no_grad()
    def pictures(self, image: Requested) -> dict[str, list[Tensor]]:  # type: ignore[override]
        pixels = image.view.data.float()
        patches = patchify(pixels, self.patch)
        predicted = self.pixels(self._decode(image)).float()
        if self.normalise_target:  # back to the scale of each patch, which the model does not predict
            predicted = predicted * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
        assert image.mask is not None  # the encode has a MaskSpec
        assert image.grid is not None  # the tower has patches
        hidden = image.mask[..., None]
        grey, filled = patches.masked_fill(hidden, 0.0), torch.where(hidden, predicted, patches)
        return {"reconstruction": [pixels, unpatchify(grey, self.patch, image.grid), unpatchify(filled, self.patch, image.grid)]}
