"""Collectives with gradients, and the rank of this process. With one process every collective is the identity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mmpretrain.picklable import picklable

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Return whether this is the main process, rank 0."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        out = x.new_empty(world_size() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        # Every rank used every row, so a row's gradient is the sum over ranks. gloo has no reduce_scatter: reduce, then slice.
        grad = grad.contiguous()
        rows = len(grad) // world_size()
        if grad.is_cuda:
            out = grad.new_empty(rows, *grad.shape[1:])
            dist.reduce_scatter_tensor(out, grad)
            return out
        dist.all_reduce(grad)
        return grad[rank() * rows : (rank() + 1) * rows]


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x.contiguous())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        out = torch.empty_like(grad)
        dist.all_to_all_single(out, grad.contiguous())
        return out


def exchange_with_grad(x: Tensor) -> Tensor:
    """Exchange rows, with gradient: row r of x [world, ...] goes to rank r, which places it at the sender's rank."""
    return x if world_size() == 1 else _Exchange.apply(x)  # type: ignore[return-value]


def all_gather_with_grad(x: Tensor) -> Tensor:
    """Gather [B, ...] of each rank to [world * B, ...] in rank order, with gradient. B must be equal on all ranks."""
    return x if world_size() == 1 else _AllGather.apply(x)  # type: ignore[return-value]


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, with gradient: each rank's input receives the sum of all ranks' output gradients."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)  # type: ignore[return-value]


@torch.no_grad()
def average(values: dict[str, Tensor]) -> dict[str, float]:
    """Average named scalars over ranks, in one collective. Every rank must pass the same names."""
    if not values:
        return {}
    names = sorted(values)
    dtype = torch.float32 if values[names[0]].device.type == "mps" else torch.float64  # MPS has no float64
    stacked = torch.stack([values[name].detach().to(dtype).reshape(()) for name in names])
    if world_size() > 1:
        dist.all_reduce(stacked)
        stacked /= world_size()
    return dict(zip(names, stacked.tolist()))


@torch.no_grad()
def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average the gradients over ranks in buckets of about 25 MB, as DDP's reducer does."""
    if world_size() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    bucket: list[Tensor] = []
    size = 0
    for i, grad in enumerate(grads):
        bucket.append(grad)
        size += grad.numel() * grad.element_size()
        last = i + 1 == len(grads) or grads[i + 1].dtype != grad.dtype
        if size >= 25 << 20 or last:
            flat = _flatten_dense_tensors(bucket)
            dist.all_reduce(flat)
            flat /= world_size()
            for target, value in zip(bucket, _unflatten_dense_tensors(flat, bucket)):
                target.copy_(value)
            bucket, size = [], 0


def any_rank(flags: Sequence[bool], device: torch.device | None = None) -> list[bool]:
    """Return each flag as true on every rank where it is true on one. Ranks must agree before they leave a loop."""
    if world_size() == 1:
        return list(flags)
    values = torch.tensor(list(flags), dtype=torch.int32, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def any_rank_later(flags: Tensor) -> Tensor:
    """Combine flags on the device, bool [n], as `any_rank` does, without waiting for the result."""
    if world_size() == 1:
        return flags
    values = flags.to(torch.int32)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.bool()


def gather_lists(items: list[Any]) -> list[Any]:
    """Concatenate small lists of plain data over ranks, in rank order."""
    if world_size() == 1:
        return items
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def broadcast_object(value: Any) -> Any:
    """Return the main rank's value on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(action: Callable[[], T]) -> T | None:
    """Call `action` on the main rank while the others wait and get None. Its exception is raised on every rank."""
    result, error = None, None
    if is_main():
        try:
            result = action()
        except Exception as raised:
            error = raised
    failed = broadcast_object(None if error is None else picklable(error, "on the main rank"))
    if failed is not None:
        raise error or failed
    return result
