"""What `filter` knows of every sample. In memory, 18 bytes of each dropped one; what was found of it waits in a temporary file."""

from __future__ import annotations

import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator

import numpy as np

from data_prep import files
from data_prep.filter_keep import Part


class Judged:
    """Samples are numbered over all shards in order; `counts`: int64 [shards]."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.counts = np.zeros(len(names), np.int64)
        self.damage: list[str] = []
        self._samples, self._rules, self._places = array("q"), array("H"), array("q")
        self._numbers: dict[str, int] = {}  # of rules
        self._details = tempfile.TemporaryFile()  # noqa: SIM115 (goes with this object)

    @property
    def starts(self) -> np.ndarray:
        return np.r_[0, np.cumsum(self.counts)]

    def drop(self, sample: int, rule: str, detail: str) -> None:
        """A sample that was not dropped before."""
        self._samples.append(sample)
        self._rules.append(self._numbers.setdefault(rule, len(self._numbers)))
        self._places.append(self._details.tell())
        data = detail.encode("utf-8", "surrogatepass")
        self._details.write(len(data).to_bytes(4, "little") + data)

    def dropped_by(self) -> dict[str, int]:
        """Rule -> samples, sorted by name."""
        counts = Counter(self._rules)
        return {rule: counts[number] for rule, number in sorted(self._numbers.items())}

    def left(self) -> np.ndarray:
        """int64: the samples not dropped, ascending."""
        good = np.ones(int(self.counts.sum()), bool)
        good[np.array(self._samples, np.int64)] = False
        return np.flatnonzero(good)

    def places(self, samples: np.ndarray) -> Iterator[tuple[int, str, int]]:
        """(sample, shard, number in it)."""
        starts = self.starts
        shards = np.searchsorted(starts, samples, side="right") - 1
        for sample, shard in zip(samples.tolist(), shards.tolist()):
            yield sample, self.names[shard], sample - int(starts[shard])

    def parts(self) -> Iterator[Part]:
        """What to leave out of each shard; made one shard at a time."""
        samples, rules = np.array(self._samples, np.int64), list(self._numbers)
        order = np.argsort(samples)
        edges = np.searchsorted(samples[order], self.starts)
        for name, count, start, low, high in zip(self.names, self.counts.tolist(), self.starts.tolist(), edges, edges[1:]):
            drops = tuple((self._samples[i] - start, rules[self._rules[i]], self._detail(i)) for i in order[low:high].tolist())
            yield Part(name, count, drops, files.states([name]))

    def _detail(self, i: int) -> str:
        self._details.seek(self._places[i])
        return self._details.read(int.from_bytes(self._details.read(4), "little")).decode("utf-8", "surrogatepass")
