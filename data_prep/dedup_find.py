"""Find the copies among shards, and between them and evaluation shards. Nothing is written here."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_prep import engine
from data_prep.dedup_clusters import Copies
from data_prep.dedup_near import DIFFERENCE, HASH_DISTANCE
from data_prep.dedup_settle import Neighbours, settle
from data_prep.dedup_signatures import SIGNATURE, THUMBNAIL, Sign, Wanted, spans, thumbnails
from data_prep.samples import Shard
from mmpretrain.data.cache import remote_index
from mmpretrain.data.shard_names import is_remote


@dataclass(frozen=True)
class Options:
    """How copies are told. `near`, `embedding` None: not by this."""

    near: int | None = HASH_DISTANCE
    difference: float = DIFFERENCE
    embedding: str | None = None
    threshold: float = 0.95
    keep: str = "first"
    within: bool = True  # also copies within the training shards; else only those that the evaluation shards hold
    caption: str = "txt"


class Found:
    """All samples in order, those of the evaluation shards last; what was found wrong with them, and what is a copy of what."""

    def __init__(self, names: list[str], against: list[str], options: Options) -> None:
        self.names, self.options = [*names, *against], options
        self.training_shards = len(names)
        self.counts = np.zeros(len(self.names), np.int64)
        self.signatures = np.zeros(0, SIGNATURE)
        self.bad: dict[int, tuple[str, str]] = {}  # sample -> (reason, detail)
        self.not_embedded: list[tuple[int, str]] = []
        self.damage: list[str] = []  # shards that end early
        self.copies = Copies(self.signatures, np.zeros(0, bool), 0)
        self._keys: tuple[str, list[str]] = ("", [])

    @cached_property
    def starts(self) -> np.ndarray:
        return np.r_[0, np.cumsum(self.counts)]

    @cached_property
    def training(self) -> int:
        """Samples before those of the evaluation shards."""
        return int(self.counts[: self.training_shards].sum())

    @property
    def dropped(self) -> np.ndarray:
        """int64: training samples that are copies of a kept one, or of an evaluation sample; ascending."""
        return np.flatnonzero(self.copies.of >= 0)

    def place(self, sample: int) -> tuple[str, int]:
        """(shard, number in it)."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return self.names[shard], sample - int(self.starts[shard])

    def where(self, sample: int) -> str:
        """shard/key. The keys of one shard are held at a time."""
        name, at = self.place(sample)
        if self._keys[0] != name:
            index = remote_index(name) if is_remote(name) else None
            if index is None:
                with Shard(name) as shard:
                    index = shard.index
            self._keys = name, index.keys
        return f"{name}/{self._keys[1][at]}"


def find(names: list[str], against: list[str], options: Options, *, engine_name: str = "local", processes: int | None = None) -> Found:
    """Read every image once, and those that may be near copies a second time.

    Memory: 57 bytes of signature and 29 of bookkeeping a sample; small images of candidates, and embeddings, go to a temporary file.
    Raises ShardError, ValueError for an option out of range.
    """
    found = Found(names, against, options)
    parts, start = [], 0
    tasks = list(spans(found.names))
    of = {name: i for i, name in enumerate(found.names)}
    sign = engine.run(Sign(options.caption), tasks, engine=engine_name, processes=processes, title="signatures")
    for span, (signatures, bad, damage) in zip(tasks, sign, strict=True):
        found.damage += damage
        parts.append(signatures)
        found.counts[of[span.name]] += len(signatures)
        found.bad |= {start + sample - span.start: (reason, detail) for sample, reason, detail in bad}
        start += len(signatures)
    found.signatures = np.concatenate(parts) if parts else found.signatures
    usable = np.ones(start, bool)
    usable[list(found.bad)] = False
    copies = found.copies = Copies(found.signatures, usable, found.training, options.keep, options.within)
    if options.near is not None:
        _near(found, engine_name, processes)
    if options.embedding is not None:
        from data_prep.dedup_embedding import drop_alike

        drop_alike(found, options.embedding, options.threshold)
    copies.settle()
    return found


def _tasks(found: Found, samples: np.ndarray) -> Iterator[Wanted]:
    """Ascending samples -> what to read of each shard, at most a few hundred at a time."""
    shard = np.searchsorted(found.starts, samples, side="right") - 1
    for number in np.unique(shard).tolist():
        inside = (samples[shard == number] - found.starts[number]).tolist()
        step = len(inside) if is_remote(found.names[number]) else 500
        for start in range(0, len(inside), step):
            yield Wanted(found.names[number], tuple(inside[start : start + step]))


def _near(found: Found, engine_name: str, processes: int | None) -> None:
    neighbours = Neighbours(found.copies, found.signatures, found.options.near or 0, found.options.difference)
    samples = np.sort(neighbours.involved)
    if not len(samples):
        return
    with tempfile.TemporaryFile() as file:
        small = np.memmap(file, np.uint8, "w+", shape=(len(samples), THUMBNAIL, THUMBNAIL, 3))
        at = 0
        for images in engine.run(thumbnails, list(_tasks(found, samples)), engine=engine_name, processes=processes, title="candidates"):
            small[at : at + len(images)] = images
            at += len(images)
        settle(neighbours, samples, small)
        del small
