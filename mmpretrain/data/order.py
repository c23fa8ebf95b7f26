"""The order of samples (stage 3 of the data pipeline): a pure function of (seed, epoch, per-shard sample counts).

Shards are permuted, then samples within a window of shards, so that reads are local. A position is one number, the
slot; `epoch = slot // total`. No state is stored, so any slot can be located directly and a run resumes at any of
them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import gcd, lcm
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from mmpretrain import rng
from mmpretrain.system import lock_across_forks


class Place(NamedTuple):
    """The samples of slots; each int64 [n]."""

    shard: np.ndarray  # index in the list of shards
    sample: np.ndarray  # index in that shard
    epoch: np.ndarray


_LOCK = lock_across_forks()


class Recent:
    """A cache of the `keep` most recently used results; racing threads compute one twice rather than wait."""

    def __init__(self, make: Callable[[Any], Any], keep: int) -> None:
        self._make, self._keep = make, keep
        self._results: OrderedDict[Any, Any] = OrderedDict()

    def __call__(self, key: Any) -> Any:
        with _LOCK:
            if key in self._results:
                self._results.move_to_end(key)
                return self._results[key]
        value = self._make(key)
        with _LOCK:
            self._results[key] = value
            while len(self._results) > self._keep:
                self._results.popitem(last=False)
        return value


class Order:
    """The order of one set of shards.

    Its memory is a few numbers per shard, and a permutation of the current windows' samples.

    Args:
        counts: [S], samples per shard.
        seed: of the permutations.
        window: shards whose samples are mixed.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, seed: int | Tensor, window: int = 16) -> None:
        self.counts = np.asarray(counts, np.int64)
        self.total = int(self.counts.sum())
        self.window = max(1, window)
        self.first = np.concatenate([[0], np.cumsum(self.counts)])[:-1]  # [S] a shard's first sample in listing order
        self._seed = seed
        self._epoch = Recent(self._make_epoch, 2)
        self._window = Recent(self._make_window, 6)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        shards = rng.permutation(rng.combine(self._seed, epoch), len(self.counts)).numpy()
        ends = np.cumsum(self.counts[shards])
        starts = np.concatenate([[0], ends])
        windows = np.concatenate([starts[: len(shards) : self.window], [self.total]])  # first slot of each window, then the end
        return shards, ends, windows

    def _make_window(self, key: tuple[int, int]) -> np.ndarray:
        epoch, window = key
        _, _, windows = self._epoch(epoch)
        return rng.permutation(rng.combine(self._seed, epoch, window, 1), int(windows[window + 1] - windows[window])).numpy()

    def _place(self, epoch: int, within: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Locate positions in the concatenation of an epoch's permuted shards; return (shard, sample)."""
        shards, ends, _ = self._epoch(epoch)
        index = np.searchsorted(ends, within, side="right")
        shard = shards[index]
        return shard, within - (ends[index] - self.counts[shard])

    def locate(self, slots: np.ndarray) -> Place:
        """Locate slots, int64 [n] in any order. Raises ValueError without samples."""
        if self.total == 0:
            raise ValueError("there are no samples to put in order")
        slots = np.asarray(slots, np.int64)
        epoch, within = np.divmod(slots, self.total)
        shard, sample = np.empty_like(slots), np.empty_like(slots)
        for e in np.unique(epoch).tolist():
            rows = np.flatnonzero(epoch == e)
            windows = self._epoch(e)[2]
            window = np.searchsorted(windows, within[rows], side="right") - 1
            mixed = np.empty(len(rows), np.int64)
            for w in np.unique(window).tolist():
                inside = np.flatnonzero(window == w)
                mixed[inside] = windows[w] + self._window((e, w))[within[rows[inside]] - windows[w]]
            shard[rows], sample[rows] = self._place(e, mixed)
        return Place(shard, sample, epoch)

    def replacement(self, slot: int, attempt: int) -> tuple[int, int, int]:
        """Draw a replacement (shard, sample, epoch) of a bad sample, from its window; from the whole epoch after 16 attempts."""
        epoch, within = divmod(slot, self.total)
        windows = self._epoch(epoch)[2]
        w = int(np.searchsorted(windows, within, side="right")) - 1
        start, end = (int(windows[w]), int(windows[w + 1])) if attempt <= 16 else (0, self.total)
        draw = (int(rng.combine(self._seed, epoch, slot, attempt, 2)) & ((1 << 62) - 1)) % (end - start)
        shard, sample = self._place(epoch, np.array([start + draw]))
        return int(shard[0]), int(sample[0]), epoch

    def shards_from(self, slot: int, windows: int = 2) -> list[int]:
        """Return the shards of the next `windows` windows, that of `slot` first, to read ahead."""
        epoch, within = divmod(slot, max(self.total, 1))
        needed: list[int] = []
        shards, _, starts = self._epoch(epoch)
        w = int(np.searchsorted(starts, within, side="right")) - 1
        for _ in range(windows):
            if w * self.window >= len(shards):
                epoch, w = epoch + 1, 0
                shards = self._epoch(epoch)[0]
            needed += [s for s in shards[w * self.window : (w + 1) * self.window].tolist() if self.counts[s] and s not in needed]
            w += 1
        return needed


class Blend:
    """Assignment of slots to components in fixed proportions: a permuted cycle with an integer quota of slots per component."""

    def __init__(self, weights: Sequence[float], seed: int | Tensor) -> None:
        if not len(weights) or any(not weight > 0 for weight in weights):
            raise ValueError(f"weights {list(weights)}: each must be above 0")
        parts = [Fraction(weight).limit_denominator(1000) for weight in weights]
        common = lcm(*(part.denominator for part in parts))
        quotas = np.array([int(part * common) for part in parts], np.int64)
        quotas //= gcd(*quotas.tolist())
        if (quotas == 0).any() or quotas.sum() > 1_000_000:
            raise ValueError(f"weights {list(weights)} are too far apart: the smallest must be at least a thousandth of the largest")
        cycle = np.repeat(np.arange(len(quotas)), quotas)
        self.quotas = quotas
        self.cycle = cycle[rng.permutation(rng.combine(seed, 3), len(cycle)).numpy()]
        self._rank = np.zeros(len(cycle), np.int64)  # earlier slots of the same component in the cycle
        for component in range(len(quotas)):
            self._rank[self.cycle == component] = np.arange(quotas[component])

    def locate(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the component of each slot of the source [n], and that component's own slot [n]."""
        turn, index = np.divmod(np.asarray(slots, np.int64), len(self.cycle))
        component = self.cycle[index]
        return component, turn * self.quotas[component] + self._rank[index]
