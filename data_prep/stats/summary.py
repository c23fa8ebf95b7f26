"""Mergeable summaries of bounded size, which do not depend on how samples are divided into shards.

Samples are ordered by a hash of their keys and the sizes of their members, so that neither random samples nor ties depend
on the sharding.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

MAX_ITEMS = 200_000  # distinct words, captions or images that are counted exactly


def hashed(text: str | bytes) -> int:
    """Hashes to 64 bits, the same on every machine."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


class Ref(NamedTuple):
    """Location of a sample."""

    shard: str
    sample: int
    key: str


class Histogram(Counter[int]):
    """Counts of integers."""

    def merge(self, other: Histogram) -> None:
        self.update(other)

    def quantile(self, share: float) -> int | None:
        """Returns the smallest value with at least `share` of the numbers at or below it; None for an empty histogram."""
        need, seen = share * self.total(), 0
        for value in sorted(self):
            seen += self[value]
            if seen >= need:
                return value
        return None

    def mean(self) -> float | None:
        """Returns the mean; None for an empty histogram."""
        return sum(value * count for value, count in self.items()) / self.total() if self else None


class Names(Counter[str]):
    """Counts of a few names: reasons, formats, extensions."""

    def merge(self, other: Names) -> None:
        self.update(other)


@dataclass
class Lowest:
    """The `keep` items of lowest rank. Ranks end in the hash of the sample, so ties do not depend on the order."""

    keep: int
    items: list[tuple[tuple[float, ...], Any]] = field(default_factory=list)

    def offer(self, rank: tuple[float, ...], item: Any) -> None:
        self.items.append((rank, item))
        if len(self.items) > 4 * self.keep + 64:
            self._cut()

    def _cut(self) -> None:
        self.items = heapq.nsmallest(self.keep, self.items, key=lambda entry: entry[0])

    def merge(self, other: Lowest) -> None:
        self.items += other.items
        self._cut()

    def sorted(self) -> list[Any]:
        self._cut()
        return [item for _, item in self.items]


@dataclass
class Frequent:
    """Counts of very many items, exact up to `cap` distinct ones.

    Beyond that, the rarest are dropped whenever there are twice as many as `cap`; `missed` bounds how much too low a count
    may be. `first` is the lowest hash of a sample with the item: it gives the number of distinct items as samples
    accumulate, in an order independent of the sharding.

    Source: Misra & Gries 1982, in the mergeable form of Agarwal et al. 2012.
    """

    cap: int = MAX_ITEMS
    items: dict[Any, tuple[int, int, str]] = field(default_factory=dict)  # item -> count, first, text to show
    missed: int = 0
    total: int = 0

    def add(self, item: Any, first: int, text: str = "", count: int = 1) -> None:
        old = self.items.get(item)
        self.items[item] = (count, first, text) if old is None else (old[0] + count, min(old[1], first), old[2])
        self.total += count
        if len(self.items) > 2 * self.cap:
            self._cut()

    def _cut(self) -> None:
        ranked = sorted(self.items.items(), key=lambda entry: (-entry[1][0], entry[1][1]))
        self.missed += ranked[self.cap][1][0]
        self.items = dict(ranked[: self.cap])

    def merge(self, other: Frequent) -> None:
        for item, (count, first, text) in other.items.items():
            old = self.items.get(item)
            self.items[item] = (count, first, text) if old is None else (old[0] + count, min(old[1], first), old[2])
        self.total += other.total
        self.missed += other.missed
        if len(self.items) > 2 * self.cap:
            self._cut()

    def top(self, number: int) -> list[tuple[Any, int, str]]:
        """Returns (item, count, text), the most frequent first; ties by the hashes of their samples."""
        ranked = heapq.nsmallest(number, self.items.items(), key=lambda entry: (-entry[1][0], entry[1][1], str(entry[0])))
        return [(item, count, text) for item, (count, _, text) in ranked]


class Picture(NamedTuple):
    """Images with equal pixels."""

    count: int
    refs: list[tuple[int, Ref]]  # (rank, sample) of the lowest ranks, ascending
    first: Ref  # in the order of shards and samples
    hash: int  # 64 bits, see `perceptual.signature`
    colour: bytes  # 27 bytes, likewise

    def joined(self, other: Picture, keep: int) -> Picture:
        refs = sorted([*self.refs, *other.refs], key=lambda entry: (entry[0], entry[1].key))[:keep]
        return self._replace(count=self.count + other.count, refs=refs, first=min(self.first, other.first))


@dataclass
class Pictures:
    """Images by their pixels: exact up to `cap` distinct ones, beyond that those with the `cap` lowest digests, a fair sample."""

    cap: int = MAX_ITEMS
    keep: int = 6  # samples remembered of each picture
    of_digest: dict[int, Picture] = field(default_factory=dict)
    cut: bool = False

    def add(self, digest: int, rank: int, ref: Ref, hash: int = 0, colour: bytes = bytes(27)) -> None:
        self._join(digest, Picture(1, [(rank, ref)], ref, hash, colour))

    def _join(self, digest: int, picture: Picture) -> None:
        known = self.of_digest.get(digest)
        self.of_digest[digest] = picture if known is None else known.joined(picture, self.keep)
        if len(self.of_digest) > 2 * self.cap:
            self._cut()

    def _cut(self) -> None:
        if len(self.of_digest) > self.cap:
            self.cut = True
            self.of_digest = {digest: self.of_digest[digest] for digest in heapq.nsmallest(self.cap, self.of_digest)}

    def merge(self, other: Pictures) -> None:
        for digest, picture in other.of_digest.items():
            self._join(digest, picture)
        self.cut |= other.cut

    def distinct(self) -> dict[int, Picture]:
        """Returns digest -> picture, at most `cap` of them."""
        self._cut()
        return self.of_digest


@dataclass
class Summary:
    """The contents of the report of a shard set."""

    shards: int = 0
    samples: int = 0  # by the indexes
    looked_at: int = 0  # of them read and decoded
    tar_bytes: int = 0
    lost: int = 0  # samples behind damaged places, estimated
    repeated_keys: int = 0
    members: Names = field(default_factory=Names)  # extension -> samples that have it
    member_bytes: Names = field(default_factory=Names)
    problems: Names = field(default_factory=Names)  # "image: undecodable_image" -> samples
    bad: Lowest = field(default_factory=lambda: Lowest(100))  # (Ref, what, reason, detail)
    unreadable: Lowest = field(default_factory=lambda: Lowest(50))  # (shard, reason, detail), damaged places too

    images: int = 0  # that decode
    formats: Names = field(default_factory=Names)
    modes: Names = field(default_factory=Names)
    misnamed: int = 0  # extension and content disagree
    short_side: Histogram = field(default_factory=Histogram)
    long_side: Histogram = field(default_factory=Histogram)
    aspect: Histogram = field(default_factory=Histogram)  # round(ASPECT_STEPS * log2(width / height))
    sizes: Frequent = field(default_factory=lambda: Frequent(20_000))  # "640 × 480"
    file_bytes: Histogram = field(default_factory=Histogram)  # floor(BYTE_STEPS * log2(bytes))
    smallest: Lowest = field(default_factory=lambda: Lowest(12))  # (Ref, note)
    elongated: Lowest = field(default_factory=lambda: Lowest(12))
    blank: Lowest = field(default_factory=lambda: Lowest(12))
    blanks: int = 0
    pictures: Pictures = field(default_factory=Pictures)

    captioned: int = 0  # samples with a usable caption
    captions_per_sample: Histogram = field(default_factory=Histogram)
    characters: Histogram = field(default_factory=Histogram)
    tokens: Histogram = field(default_factory=Histogram)  # of CLIP, with the two special ones
    num_words: int = 0
    words: Frequent = field(default_factory=Frequent)  # word -> samples whose captions have it
    captions: Frequent = field(default_factory=lambda: Frequent(100_000))
    scripts: Names = field(default_factory=Names)
    languages: Names = field(default_factory=Names)
    shortest: Lowest = field(default_factory=lambda: Lowest(12))  # (Ref, caption)
    longest: Lowest = field(default_factory=lambda: Lowest(12))
    json_captions: int = 0  # samples with unused `captions` in their json

    labelled: int = 0
    labels: Frequent = field(default_factory=lambda: Frequent(100_000))

    examples: Lowest = field(default_factory=lambda: Lowest(24))  # (Ref, caption, label)

    def merge(self, other: Summary) -> Summary:
        """Merges another summary in place."""
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            if isinstance(mine, int):
                setattr(self, f.name, mine + theirs)
            else:
                mine.merge(theirs)
        return self
