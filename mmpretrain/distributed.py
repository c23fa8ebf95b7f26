"""Collectives that pass gradients, and who this process is. With one process every call is the identity."""

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
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
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
    """[world, ...] on each rank: row r goes to rank r, which puts it at the sender's number."""
    return x if world_size() == 1 else _Exchange.apply(x)  # type: ignore[return-value]


def all_gather_with_grad(x: Tensor) -> Tensor:
    """[B, ...] on each rank -> [world * B, ...], ranks in order. Every rank must hold the same number of rows."""
    return x if world_size() == 1 else _AllGather.apply(x)  # type: ignore[return-value]


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over ranks, with gradient: each rank's input receives the sum of all ranks' output gradients."""
    return x if world_size() == 1 else _AllReduceSum.apply(x)  # type: ignore[return-value]


@torch.no_grad()
def average(values: dict[str, Tensor]) -> dict[str, float]:
    """Mean over ranks of named scalars, in one collective. Every rank must pass the same names."""
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
    """Mean of the gradients over ranks, in buckets of about 25 MB: what DDP's reducer does, made explicit."""
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
    """Each flag, true on every rank when it is true on one: ranks must agree before they leave a loop. One collective."""
    if world_size() == 1:
        return list(flags)
    values = torch.tensor(list(flags), dtype=torch.int32, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def any_rank_later(flags: Tensor) -> Tensor:
    """The same for flags that lie on the device, bool [n], left there: nobody waits for them yet."""
    if world_size() == 1:
        return flags
    values = flags.to(torch.int32)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values.bool()


def gather_lists(items: list[Any]) -> list[Any]:
    """Concatenation over ranks of small lists of plain data; complete on the main rank only matters there."""
    if world_size() == 1:
        return items
    parts: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def broadcast_object(value: Any) -> Any:
    """The main rank's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_main(action: Callable[[], T]) -> T | None:
    """Do it on the main rank while the others wait (and get None). What it raises is raised on every rank: none waits for ever."""
    result, error = None, None
    if is_main():
        try:
            result = action()
        except Exception as found:
            error = found
    failed = broadcast_object(None if error is None else picklable(error, "on the main rank"))
    if failed is not None:
        raise error or failed
    return result
