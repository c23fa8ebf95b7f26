"""Near-duplicate search: copies within training shards, and between them and evaluation shards."""

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
    """Criteria of copies; `near` or `embedding` None disables that criterion."""

    near: int | None = HASH_DISTANCE
    difference: float = DIFFERENCE
    embedding: str | None = None
    threshold: float = 0.95
    keep: str = "first"
    within: bool = True  # find copies within the training shards too, not only of evaluation samples
    caption: str = "txt"


class Findings:
    """Unusable samples, and copies with the samples that they are copies of. Evaluation samples are numbered last."""

    def __init__(self, names: list[str], against: list[str], options: Options) -> None:
        self.samples, self.options = Numbering([*names, *against]), options
        self.training_names = names
        self.signatures = np.zeros(0, SIGNATURE)
        self.bad: dict[int, tuple[str, str]] = {}  # sample -> (reason, detail)
        self.not_embedded: list[tuple[int, str]] = []
        self.damage: list[str] = []  # of shards
        self.copies = Copies(self.signatures, np.zeros(0, bool), 0)

    @cached_property
    def training(self) -> int:
        """Number of training samples; evaluation samples follow them."""
        return int(self.samples.counts[: len(self.training_names)].sum())

    @property
    def dropped(self) -> np.ndarray:
        """int64 [n], ascending: training samples that are copies of a kept or an evaluation sample."""
        return np.flatnonzero(self.copies.of >= 0)


def find(names: list[str], against: list[str], options: Options, *, engine_name: str = "local", processes: int | None = None) -> Findings:
    """Finds copies. Reads every image once, and candidates for near copies a second time.

    Takes 86 bytes of memory a sample (57 of signature, 29 of bookkeeping); thumbnails of candidates and embeddings are in
    temporary files.

    Args:
        names: the training shards.
        against: the evaluation shards.
        options: the criteria.
        engine_name: see `engine.run`.
        processes: see `engine.run`.

    Raises:
        ShardError: a shard cannot be read.
        OptionError: an option is out of range.
    """
    findings = Findings(names, against, options)
    parts = []
    run = {"engine": engine_name, "processes": processes}
    signed = findings.samples.run(Sign(options.caption), lambda result: len(result[0]), title="signatures", **run)
    for first, (signatures, bad, damage) in signed:
        findings.damage += damage
        parts.append(signatures)
        findings.bad |= {first + index: (reason, detail) for index, reason, detail in bad}
    findings.signatures = np.concatenate(parts) if parts else findings.signatures
    usable = np.ones(len(findings.samples), bool)
    usable[list(findings.bad)] = False
    copies = findings.copies = Copies(findings.signatures, usable, findings.training, options.keep, options.within)
    if options.near is not None:
        drop_near(copies, findings.signatures, findings.samples.places, options.near, options.difference, **run)
    if options.embedding is not None:
        from data_prep.dedup.embeddings import drop_alike

        findings.not_embedded = drop_alike(copies, findings.samples, options.embedding, options.threshold)
    copies.settle()
    return findings


@dataclass(frozen=True)
class Sign:
    """The task of a worker: computes the signatures of a span of samples.

    Returns SIGNATURE [n], (sample, reason, detail) of those without a usable image, and the damage of the shard.
    """

    caption: str = "txt"

    def __call__(self, span: Span) -> tuple[np.ndarray, list[tuple[int, str, str]], list[str]]:
        with Shard(span.name) as shard:
            stop = len(shard) if span.stop is None else span.stop
            signatures, bad = np.zeros(stop - span.start, SIGNATURE), []
            for sample in range(span.start, stop):
                try:
                    signatures[sample - span.start] = signature(decoded(shard, sample), self._length(shard, sample))
                except BadSample as error:
                    bad.append((sample, error.reason, error.detail))
            damage = [] if span.start else damage_lines(shard)
            return signatures, bad, damage

    def _length(self, shard: Shard, sample: int) -> int:
        try:
            return max(map(len, captions(shard.read(sample, {member_of(self.caption)}), self.caption)))
        except BadSample:  # the image alone may be a reason to keep a sample
            return 0
