"""The Transformer of the native towers: attention and blocks with open_clip's parameter names and results, optimised for speed.

Shapes: B rows, L positions of the trunk, N patch or word tokens, D width, H heads, d = D / H, E joint embedding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmpretrain.errors import ModelError
from mmpretrain.towers.base import Tokens


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, bias: Tensor | None = None) -> Tensor:
    """Compute attention of queries [B, H, Q, d] over keys and values [B, H, L, d], with the fastest kernel.

    In bf16 on a CPU it uses plain products: the backward pass of scaled_dot_product_attention is much slower there (6x
    at 65 tokens).

    Args:
        q: [B, H, Q, d].
        k: [B, H, L, d].
        v: [B, H, L, d].
        causal: mask later positions.
        bias: additive, broadcast to [B, H, Q, L].
    """
    if q.is_cuda or q.dtype in (torch.float32, torch.float64):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal)
    B, H, Q, d = q.shape
    L = k.shape[2]
    if causal:
        bias = torch.full((1, 1, Q, L), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    q, k, v = q.reshape(-1, Q, d), k.reshape(-1, L, d), v.reshape(-1, L, d)
    if bias is None:
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=d**-0.5)
    else:
        scores = torch.baddbmm(bias.expand(B, H, Q, L).reshape(-1, Q, L), q, k.mT, alpha=d**-0.5)
    return (scores.softmax(-1) @ v).view(B, H, Q, d)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of the residual stream: autocast's where it is on, else that of the weights."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class LayerNorm(nn.LayerNorm):
    """LayerNorm that returns the dtype of its input, so that the residual stream keeps autocast's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU in OpenAI's CLIP models."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class LayerScale(nn.Module):
    """Learned factor per channel (Touvron et al. 2021, CaiT)."""

    def __init__(self, dim: int, init_values: float):
        super().__init__()
        self.gamma = nn.Parameter(init_values * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma.to(x.dtype)


class Attention(nn.Module):
    """Self-attention with the parameters and initial weights of nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ModelError(f"width {width} is not a multiple of {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, causal: bool, bias: Tensor | None) -> Tensor:
        B, L, D = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).view(B, L, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)  # each [B,H,L,d]; one copy rather than three
        return self.out_proj(attend(q, k, v, causal, bias).transpose(1, 2).reshape(B, L, D))

    def query(self, x: Tensor, index: Tensor | None) -> Tensor:
        """Compute the query of one position per row: x [B, L, D] -> [B, H, 1, d]."""
        D = x.shape[2]
        q = F.linear(take(x, index), self.in_proj_weight[:D], self.in_proj_bias[:D])
        return q.view(len(x), 1, self.heads, -1).transpose(1, 2)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values: x [B, L, D] -> [B, H, L, d] each."""
        B, L, D = x.shape
        kv = F.linear(x, self.in_proj_weight[D:], self.in_proj_bias[D:]).view(B, L, 2, self.heads, -1)
        k, v = kv.permute(2, 0, 3, 1, 4).contiguous().unbind(0)
        return k, v


def take(x: Tensor, index: Tensor | None) -> Tensor:
    """Select one position per row: x [B, L, D], index int64 [B] -> [B, 1, D]; None: the first position."""
    return x[:, :1] if index is None else x[torch.arange(len(x), device=x.device), index][:, None]


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, ls_init_value: float | None, quick_gelu: bool, act: dict, norm: dict):
        super().__init__()
        self.ln_1 = LayerNorm(width, **norm)
        self.attn = Attention(width, heads)
        self.ls_1 = nn.Identity() if ls_init_value is None else LayerScale(width, ls_init_value)
        self.ln_2 = LayerNorm(width, **norm)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, int(width * mlp_ratio)))
        self.mlp.add_module("gelu", QuickGELU(**act) if quick_gelu else nn.GELU(**act))
        self.mlp.add_module("c_proj", nn.Linear(int(width * mlp_ratio), width))
        self.ls_2 = nn.Identity() if ls_init_value is None else LayerScale(width, ls_init_value)

    def forward(self, x: Tensor, causal: bool = False, bias: Tensor | None = None) -> Tensor:
        x = x + self.ls_1(self.attn(self.ln_1(x), causal, bias))
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    def pooled(self, x: Tensor, index: Tensor | None, bias: Tensor | None) -> Tensor:
        """Compute the block's output at one position per row, [B, 1, D]: all positions are keys, only that one is a query."""
        h = self.ln_1(x)
        out = attend(self.attn.query(h, index), *self.attn.keys_values(h), bias=bias)
        x = take(x, index) + self.ls_1(self.attn.out_proj(out.transpose(1, 2).reshape(len(x), 1, -1)))
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    @torch.no_grad()
    def attention(self, x: Tensor, index: Tensor | None, bias: Tensor | None) -> Tensor:
        """Compute the attention of one position per row to all, [B, L] in float32, averaged over heads."""
        h = self.ln_1(x)
        q, (k, _) = self.attn.query(h, index), self.attn.keys_values(h)
        scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
        scores = scores if bias is None else scores + bias
        return scores.softmax(-1).mean(1)[:, 0]


class Transformer(nn.Module):
    """A stack of blocks."""

    def __init__(self, width: int, layers: int, heads: int, **block: Any):
        super().__init__()
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(Block(width, heads, **block) for _ in range(layers))

    @property
    def blocks(self) -> list[Block]:
        """The blocks, with their type."""
        return cast("list[Block]", list(self.resblocks))

    def forward(self, tokens: Tokens, attention: bool, pooled_only: bool) -> tuple[Tensor, Tensor | None]:
        """Apply the blocks; arguments and results are those of `Tower.trunk`, with attention over all positions [B, L]."""
        x, causal = tokens.x, tokens.causal
        bias = key_bias = None
        if tokens.valid is not None:  # [B,1,1,L]
            bias = key_bias = torch.zeros_like(tokens.valid, dtype=x.dtype).masked_fill_(~tokens.valid, -torch.inf)[:, None, None]
        if causal:
            if tokens.valid is not None:
                raise ModelError("causal attention with key padding is not used by any tower: give one of the two")
            if tokens.pool_index is not None:  # the keys that the pooled position attends to
                seen = torch.arange(x.shape[1], device=x.device) <= tokens.pool_index[:, None]
                key_bias = torch.zeros_like(seen, dtype=x.dtype).masked_fill_(~seen, -torch.inf)[:, None, None]
        weights = None
        blocks = self.blocks
        last = blocks[-1]
        for block in blocks:
            if block is last and attention:
                weights = block.attention(x, tokens.pool_index, key_bias)
            args: tuple[Any, ...] = (x, tokens.pool_index, key_bias) if block is last and pooled_only else (x, causal, bias)
            run = block.pooled if block is last and pooled_only else block
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(run, *args, use_reentrant=False)
            else:
                x = run(*args)
        return x, weights
