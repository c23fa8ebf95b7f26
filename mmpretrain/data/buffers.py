"""A pool of memory for batches, which is reused once no tensor refers to it.

The kernel provides fresh memory page by page, which takes several times as long as filling it; a batch of float32
images takes tens of megabytes, more than any allocator keeps.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 18  # bytes below which the allocator is fast
CPU = torch.device("cpu")


class Buffers:
    """A thread-safe pool of buffers; one is returned automatically when its tensor and all views of it are gone."""

    kept = 16  # greatest number of free buffers of one size

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[int, list[np.ndarray]] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensor:
        """Return an empty tensor, as `torch.empty`; memory of devices is pooled by torch."""
        size = math.prod(shape) * dtype.itemsize
        if size < SMALL or device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        with self._lock:
            free = self._free.setdefault(size, [])
            memory = free.pop() if free else None
        if memory is None:
            memory = self.allocate(size)
        lent = memory[:]  # the tensor's storage holds this array, which lives as long as all views
        weakref.finalize(lent, self._back, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(*shape)

    def allocate(self, size: int) -> np.ndarray:
        """Allocate fresh memory, uint8 [size]."""
        return np.empty(size, np.uint8)

    def _back(self, memory: np.ndarray) -> None:
        # The garbage collector may interrupt the thread that holds the lock, so none is taken here: appending needs none.
        free = self._free.get(memory.nbytes)
        if free is not None and len(free) < self.kept:
            free.append(memory)


_pool = Buffers()


def use(pool: Buffers) -> None:
    """Allocate the later batches of this process from `pool`."""
    global _pool
    _pool = pool


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Tensor:
    """Return an empty tensor from the pool of this process; see `Buffers.empty`."""
    return _pool.empty(shape, dtype, device)


def _rows(count: int, row: Tensor) -> Tensor:
    """Return an empty tensor [count, ...] for rows like `row`; images are channels-last where this one is."""
    if row.ndim == 3 and row.stride(0) == 1:
        C, H, W = row.shape
        return empty((count, H, W, C), row.dtype, row.device).permute(0, 3, 1, 2)
    return empty((count, *row.shape), row.dtype, row.device)


def cat(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dimension, into pooled memory."""
    return torch.cat(list(parts), out=_rows(sum(map(len, parts)), parts[0][0]))


def stack(parts: Iterable[Tensor], count: int) -> Tensor:
    """Stack `count` tensors into pooled memory; each is copied when produced, while the cache still holds it."""
    out = None
    for i, part in enumerate(parts):
        out = _rows(count, part) if out is None else out
        out[i] = part
    if out is None:
        raise ValueError("nothing to stack")
    return out
