"""Undecoded samples of a source in the form of webdataset and in the order of training, for other training loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset
from webdataset.handlers import reraise_exception
from webdataset.utils import pytorch_worker_info

from mmpretrain.data.schema import BadSample
from mmpretrain.data.source import Source, SourceConfig

SLOTS_PER_LOOKUP = 256


class SampleStream(IterableDataset[dict[str, Any]]):
    """Dictionaries of a sample's members: `__key__`, `__url__`, `__slot__`, and its bytes by extension (`jpg`, `txt`, ...).

    It is the first stage of a `webdataset.DataPipeline`, or a dataset of `torch.utils.data.DataLoader`. The order is
    that of a run with this source and seed: a function of the seed, the source's name and the samples per shard. Ranks
    and workers (as reported by `webdataset.utils.pytorch_worker_info`) share it in blocks of `block` samples dealt in
    turn, so that no sample is lost or repeated, and a `DataLoader` with `batch_size=block` yields the same global
    batches with any number of workers.

    Args:
        config: the source, or its shards alone in any form that a recipe accepts.
        name: the source's name in the recipe; the order depends on it.
        seed: the run's seed.
        start: the first slot, to resume: the number of samples that all ranks together have consumed.
        epochs: the end, in epochs of the source counted from slot 0; None: endless. Where ranks do not divide an
            epoch, some get a block less.
        block: consecutive slots of one worker; the `batch_size` of a `DataLoader` that makes the batches.
        handler: called with the error of an unreadable sample (truncated, or different from its checksum), as in
            webdataset: true continues with the next sample, false ends the iteration; the default raises the error.

    Raises:
        ShardError: the shards cannot be used; the message names the shard and the remedy.
    """

    def __init__(
        self,
        config: SourceConfig | str | list[Any],
        name: str = "samples",
        seed: int = 0,
        *,
        start: int = 0,
        epochs: int | None = 1,
        block: int = 1,
        handler: Callable[[Exception], bool] = reraise_exception,
    ) -> None:
        if start < 0 or block < 1 or (epochs is not None and epochs < 1):
            raise ValueError(
                f"start {start}, epochs {epochs}, block {block}: expected a start of at least 0, and at least 1 for the others"
            )
        self.config = config if isinstance(config, SourceConfig) else SourceConfig(shards=config)
        self.name, self.seed = name, seed
        self.start, self.epochs, self.block, self.handler = start, epochs, block, handler
        self._source: Source | None = Source(name, self.config, (), seed=seed)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None}  # a spawned worker opens its own files and locks

    @property
    def source(self) -> Source:
        """The source, opened on first use in a worker."""
        if self._source is None:
            self._source = Source(self.name, self.config, (), seed=self.seed)
        return self._source

    @property
    def num_samples(self) -> int:
        """Samples of one epoch, over all ranks and workers."""
        return self.source.num_samples

    def _slots(self) -> Iterator[np.ndarray]:
        """Yield the slots of this rank's worker in groups, int64 [n]."""
        rank, ranks, worker, workers = pytorch_worker_info()
        stop = None if self.epochs is None else self.epochs * self.num_samples
        turns = np.arange(max(1, SLOTS_PER_LOOKUP // self.block))
        for turn in itertools.count(0, len(turns)):
            blocks = rank + ranks * (worker + workers * (turn + turns))
            slots = (self.start + blocks[:, None] * self.block + np.arange(self.block)).ravel()
            slots = slots if stop is None else slots[slots < stop]
            if not len(slots):
                return
            yield slots

    def __iter__(self) -> Iterator[dict[str, Any]]:
        source = self.source
        for slots in self._slots():
            source.read_ahead(int(slots[0]))
            component, _, shard, sample, _ = source.locate(slots)
            for slot, *place in zip(slots.tolist(), component.tolist(), shard.tolist(), sample.tolist()):
                try:
                    url, key, members = source.read(*place)
                except BadSample as error:
                    if self.handler(error):
                        continue
                    return
                yield {"__key__": key, "__url__": url, "__slot__": slot, **members}
