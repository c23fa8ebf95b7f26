"""Memory of batches that nobody holds any more, given out again.

The kernel hands out fresh memory page by page, which costs several times as much as filling it; a batch of float32 images is tens of
megabytes, more than any allocator keeps.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 18  # bytes below which the allocator does well
CPU = torch.device("cpu")


class Buffers:
    """Any thread may ask; a buffer comes back by itself when its tensor and all views of it are gone."""

    kept = 16  # free buffers of one size that wait for a use

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[int, list[np.ndarray]] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensor:
        """As `torch.empty`; memory of devices is not kept here, torch does that."""
        size = math.prod(shape) * dtype.itemsize
        if size < SMALL or device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        with self._lock:
            free = self._free.setdefault(size, [])
            memory = free.pop() if free else None
        if memory is None:
            memory = self.allocate(size)
        lent = memory[:]  # the tensor's storage holds this array: its end is the end of all views
        weakref.finalize(lent, self._back, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(*shape)

    def allocate(self, size: int) -> np.ndarray:
        """Memory that the kernel has yet to give: uint8 [size]."""
        return np.empty(size, np.uint8)

    def _back(self, memory: np.ndarray) -> None:
        # A lock here could be held by the very thread that the garbage collector interrupts: appending needs none.
        free = self._free.get(memory.nbytes)
        if free is not None and len(free) < self.kept:
            free.append(memory)


_pool = Buffers()


def use(pool: Buffers) -> None:
    """From now on this process's batches lie in memory of `pool`."""
    global _pool
    _pool = pool


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensor:
    """`Buffers.empty` of this process."""
    return _pool.empty(shape, dtype, device)


def _rows(count: int, row: Tensor) -> Tensor:
    """[count, ...] for rows of this shape and type; images lie channels last where this one does."""
    if row.ndim == 3 and row.stride(0) == 1:
        C, H, W = row.shape
        return empty((count, H, W, C), row.dtype, row.device).permute(0, 3, 1, 2)
    return empty((count, *row.shape), row.dtype, row.device)


def cat(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat` along the first dimension, into memory that was used before."""
    return torch.cat(list(parts), out=_rows(sum(map(len, parts)), parts[0][0]))


def stack(parts: Iterable[Tensor], count: int) -> Tensor:
    """`torch.stack` of `count` tensors; each is copied as it comes, while the cache still holds it."""
    out = None
    for i, part in enumerate(parts):
        out = _rows(count, part) if out is None else out
        out[i] = part
    if out is None:
        raise ValueError("nothing to stack")
    return out
