"""Projection and prediction heads, and a BatchNorm whose statistics are those of the global batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mmpretrain.distributed import all_reduce_sum, world_size


class GlobalBatchNorm(nn.Module):
    """BatchNorm over [B, D] with the mean and variance of all ranks' rows, on any device (SyncBatchNorm refuses CPU).

    Local statistics would let a network tell the ranks apart, and two ranks would not equal one. Every rank holds as many rows.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, affine: bool = True, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
            if self.training:
                n = len(y) * world_size()
                mean = all_reduce_sum(y.sum(0)) / n
                var = all_reduce_sum((y - mean).square().sum(0)) / n
                with torch.no_grad():
                    self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                    self.running_var.lerp_((var * n / max(n - 1, 1)).to(self.running_var.dtype), self.momentum)
            else:
                mean, var = self.running_mean, self.running_var
            y = (y - mean) * torch.rsqrt(var + self.eps)
            if self.weight is not None and self.bias is not None:
                y = y * self.weight + self.bias
            return y.to(x.dtype)


def _norm(kind: str, width: int, affine: bool = True) -> nn.Module:
    if kind == "batch":
        return GlobalBatchNorm(width, affine)
    if kind == "layer":
        return nn.LayerNorm(width, elementwise_affine=affine)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"norm is {kind!r}; expected batch, layer or none")


def mlp(
    width: int, hidden: int, out: int, layers: int = 2, norm: Literal["batch", "layer", "none"] = "batch", last_norm: bool = False
) -> nn.Sequential:
    """`layers` linear maps with a norm and ReLU between them: the projection and prediction heads of SimCLR, BYOL and MoCo v3.

    `last_norm` adds a norm without learned scale after the last map (MoCo v3, section 3; SimCLR v1's code).
    """
    modules: list[nn.Module] = []
    for i in range(layers):
        final = i + 1 == layers
        target = out if final else hidden
        normed = last_norm if final else True
        modules.append(nn.Linear(width, target, bias=not (normed and norm == "batch")))
        if normed:
            modules.append(_norm(norm, target, affine=not final))
        if not final:
            modules.append(nn.ReLU(inplace=True))
        width = target
    return nn.Sequential(*modules)
