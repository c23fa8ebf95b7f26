"""Projection, prediction and prototype heads, and BatchNorms with the statistics of the global batch."""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpretrain.distributed import all_reduce_sum, world_size
from mmpretrain.errors import ModelError


class GlobalBatchNorm(nn.Module):
    """BatchNorm over [B, D] with the mean and variance of all ranks' rows, on any device (SyncBatchNorm refuses CPU).

    With local statistics, a network could distinguish the ranks, and two ranks would differ from one. B must be equal
    on all ranks.
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


class _GlobalStatistics(nn.modules.batchnorm._BatchNorm):
    """A torch BatchNorm with the mean and variance of all ranks' rows; same parameters and buffers."""

    running_mean: Tensor  # never None: `use_global_statistics` refuses a BatchNorm that does not track them
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y = self._normalise(x)
        for name in ("drop", "act"):  # timm's BatchNormAct2d ends with its activation
            if isinstance(after := getattr(self, name, None), nn.Module):
                y = after(y)
        return y

    def _normalise(self, x: Tensor) -> Tensor:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        with torch.autocast(x.device.type, enabled=False):
            y = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
            if self.training:
                n = x.numel() // x.shape[1] * world_size()
                mean = all_reduce_sum(y.sum(axes)) / n
                var = all_reduce_sum((y - mean.view(shape)).square().sum(axes)) / n
                with torch.no_grad():
                    self.num_batches_tracked += 1
                    momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                    self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                    self.running_var.lerp_((var * n / max(n - 1, 1)).to(self.running_var.dtype), momentum)
            else:
                mean, var = self.running_mean, self.running_var
            y = (y - mean.view(shape)) * torch.rsqrt(var + self.eps).view(shape)
            if self.affine:
                y = y * self.weight.view(shape) + self.bias.view(shape)
            return y.to(x.dtype)


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a module is a BatchNorm of torch or of this project."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm | GlobalBatchNorm)


def use_global_statistics(module: nn.Module) -> int:
    """Let every BatchNorm in `module` use the statistics of all ranks' rows, on any device; return their number.

    Weights, names and running statistics are kept. Frozen ones (FrozenBatchNorm of open_clip and torchvision) have no
    batch statistics, and are left alone.

    Raises:
        ModelError: a BatchNorm without running statistics.
    """
    count = 0
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and not isinstance(part, _GlobalStatistics):
            if not part.track_running_stats:
                raise ModelError(f"{type(part).__name__} without running statistics cannot be synchronised between ranks")
            part.__class__ = type(f"Global{type(part).__name__}", (_GlobalStatistics, type(part)), {})
            count += 1
    return count


def _norm(kind: str, width: int, affine: bool = True) -> nn.Module:
    if kind == "batch":
        return GlobalBatchNorm(width, affine)
    if kind == "layer":
        return nn.LayerNorm(width, elementwise_affine=affine)
    if kind == "none":
        return nn.Identity()
    raise ModelError(f"norm is {kind!r}; expected batch, layer or none")


class PrototypeHead(nn.Module):
    """An MLP with GELU, a bottleneck normalised to unit length, and its similarities to K prototypes of unit length.

    Source: Caron et al. 2021 (DINO), appendix C. The paper applies weight norm to the last layer, with its gain fixed
    to 1; here the weights are divided by their length, which is the same function.
    """

    def __init__(self, width: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256, layers: int = 3) -> None:
        super().__init__()
        sizes = [width, *[hidden] * (layers - 1), bottleneck]
        parts = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.GELU())]
        self.mlp = nn.Sequential(*parts[:-1])
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last = nn.Linear(bottleneck, prototypes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, D] to similarities [B, K]."""
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.last.weight, dim=-1))


def mlp(
    width: int, hidden: int, out: int, layers: int = 2, norm: Literal["batch", "layer", "none"] = "batch", last_norm: bool = False
) -> nn.Sequential:
    """Build the projection or prediction head of SimCLR, BYOL and MoCo v3: linear maps with a norm and ReLU between them.

    Args:
        width: of the input.
        hidden: width of the hidden layers.
        out: width of the output.
        layers: number of linear maps.
        norm: after each hidden map.
        last_norm: add a norm without learned scale after the last map (MoCo v3, section 3; the code of SimCLR v1).
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
