"""Find the copies among shards, and between them and evaluation shards. Nothing is written here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_prep.copies import Copies, drop_near
from data_prep.perceptual import DIFFERENCE, HASH_DISTANCE, SIGNATURE, decoded, signature
from data_prep.shards.read import Shard, Span, captions, damage_lines
from data_prep.subset import Numbering
from mmpretrain.data.fields import member_of
from mmpretrain.data.schema import BadSample


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
    """What was found wrong with samples, and what is a copy of what. The samples of the evaluation shards come last."""

    def __init__(self, names: list[str], against: list[str], options: Options) -> None:
        self.samples, self.options = Numbering([*names, *against]), options
        self.training_names = names
        self.signatures = np.zeros(0, SIGNATURE)
        self.bad: dict[int, tuple[str, str]] = {}  # sample -> (reason, detail)
        self.not_embedded: list[tuple[int, str]] = []
        self.damage: list[str] = []  # shards that end early
        self.copies = Copies(self.signatures, np.zeros(0, bool), 0)

    @cached_property
    def training(self) -> int:
        """Samples before those of the evaluation shards."""
        return int(self.samples.counts[: len(self.training_names)].sum())

    @property
    def dropped(self) -> np.ndarray:
        """int64: training samples that are copies of a kept one, or of an evaluation sample; ascending."""
        return np.flatnonzero(self.copies.of >= 0)


def find(names: list[str], against: list[str], options: Options, *, engine_name: str = "local", processes: int | None = None) -> Found:
    """Read every image once, and those that may be near copies a second time.

    Memory: 57 bytes of signature and 29 of bookkeeping a sample; small images of candidates, and embeddings, go to a temporary file.
    Raises ShardError, ValueError for an option out of range.
    """
    found = Found(names, against, options)
    parts = []
    run = {"engine": engine_name, "processes": processes}
    signed = found.samples.run(Sign(options.caption), lambda result: len(result[0]), title="signatures", **run)
    for first, (signatures, bad, damage) in signed:
        found.damage += damage
        parts.append(signatures)
        found.bad |= {first + index: (reason, detail) for index, reason, detail in bad}
    found.signatures = np.concatenate(parts) if parts else found.signatures
    usable = np.ones(len(found.samples), bool)
    usable[list(found.bad)] = False
    copies = found.copies = Copies(found.signatures, usable, found.training, options.keep, options.within)
    if options.near is not None:
        drop_near(copies, found.signatures, found.samples.places, options.near, options.difference, **run)
    if options.embedding is not None:
        from data_prep.dedup.embeddings import drop_alike

        found.not_embedded = drop_alike(copies, found.samples, options.embedding, options.threshold)
    copies.settle()
    return found


@dataclass(frozen=True)
class Sign:
    """The stage: a span of samples -> SIGNATURE [n]; (sample, reason, detail) of those without a usable image; the shard's damage."""

    caption: str = "txt"

    def __call__(self, span: Span) -> tuple[np.ndarray, list[tuple[int, str, str]], list[str]]:
        with Shard(span.name) as shard:
            stop = len(shard) if span.stop is None else span.stop
            found, bad = np.zeros(stop - span.start, SIGNATURE), []
            for sample in range(span.start, stop):
                try:
                    found[sample - span.start] = signature(decoded(shard, sample), self._length(shard, sample))
                except BadSample as error:
                    bad.append((sample, error.reason, error.detail))
            damage = [] if span.start else damage_lines(shard)
            return found, bad, damage

    def _length(self, shard: Shard, sample: int) -> int:
        try:
            return max(map(len, captions(shard.read(sample, {member_of(self.caption)}), self.caption)))
        except BadSample:  # a sample without a caption may be kept for its image
            return 0
