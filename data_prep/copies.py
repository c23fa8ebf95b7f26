"""Which sample stands for which: every dropped sample is a direct copy of a kept one.

Chains are not followed: where a brightened copy lies between two distinct pictures, it is dropped for the one that is kept first, and the
other picture stays. (Joining all that is linked would lose it.)

Near copies are settled best first: each sample is compared only with those kept before it, so memory grows with samples, not with pairs.
Flat images all have the hash 0, and a picture encoded many times has few: samples of equal hash form a group, and groups whose hashes are
near are neighbours.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from data_prep import engine as engines
from data_prep.perceptual import DIFFERENCE, HASH_DISTANCE, THUMBNAIL, alike_in_colour, decoded, differences, pairs_within, small
from data_prep.shards.read import SPAN, Place, Shard
from mmpretrain.data.shard_names import is_remote

KEEP = ("first", "largest", "longest-caption")
RULES = ("", "exact", "near", "embedding")  # the numbers in `Copies.rule`


def ranks(signatures: np.ndarray, training: int, keep: str) -> np.ndarray:
    """int64 [N]: who is kept before whom: evaluation samples, then the first in order, the most pixels, or the longest caption; the first
    of equals. Raises ValueError for another rule."""
    if keep not in KEEP:
        raise ValueError(f"--keep {keep!r}: expected {', '.join(KEEP)}")
    count = len(signatures)
    none = np.zeros(count, np.int64)
    score = {"first": none, "largest": signatures["area"], "longest-caption": signatures["caption"]}[keep].astype(np.int64)
    order = np.lexsort((np.arange(count), -score, np.arange(count) < training))
    result = np.empty(count, np.int64)
    result[order] = np.arange(count)
    return result


class Copies:
    """Of which kept sample each is a copy, and by which rule. 29 bytes a sample."""

    def __init__(self, signatures: np.ndarray, usable: np.ndarray, training: int, keep: str = "first", within: bool = True) -> None:
        """Equal digests are found here, in O(N log N). `within` false: only copies of evaluation samples (those from `training` on)."""
        count = len(signatures)
        self.training, self.within = training, within
        self.rank = ranks(signatures, training, keep)
        self.of = np.full(count, -1)  # the kept sample, or -1
        self.rule = np.zeros(count, np.uint8)
        self.value = np.zeros(count, np.float32)  # near: difference; embedding: cosine
        self.twin = np.arange(count)  # the best-ranked sample with equal pixels
        at = np.flatnonzero(usable)
        digest = signatures["digest"]
        order = at[np.lexsort((self.rank[at], digest[at, 1], digest[at, 0]))]
        begins = np.r_[True, (digest[order[1:]] != digest[order[:-1]]).any(1)][: len(order)]
        self.twin[order] = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
        first = order[begins]
        self.first = first[np.argsort(self.rank[first])]  # one of each group of equals, best first: these are compared further

    def wanted(self, pairs: np.ndarray) -> np.ndarray:
        """int64 [p,2] of `first` -> bool [p]: is it of interest whether they are copies?"""
        held = pairs >= self.training
        return np.asarray(~held.all(1) & (held.any(1) | self.within))

    def drop(self, kept: int, sample: int, rule: str, value: float) -> None:
        """Note a copy, unless either was dropped already. Pairs must come with `kept` ascending in rank."""
        if self.of[kept] < 0 and self.of[sample] < 0:
            self.of[sample], self.rule[sample], self.value[sample] = kept, RULES.index(rule), value

    def settle(self) -> None:
        """The equals of a dropped sample are copies of what it is a copy of; the others of the one that was compared for them."""
        for sample in np.flatnonzero(self.twin[: self.training] != np.arange(self.training)).tolist():
            first = int(self.twin[sample])
            if self.of[first] >= 0:
                self.of[sample], self.rule[sample], self.value[sample] = self.of[first], self.rule[first], self.value[first]
            elif self.within or first >= self.training:
                self.of[sample], self.rule[sample] = first, RULES.index("exact")


BATCH = 2048  # pictures compared with one at once: 50 MB
PENDING = 1 << 22  # pairs of groups found before those found twice are removed
NEIGHBOURS = 32  # pairs of groups held for each group, on average, above `PENDING`; where there are more, hashes are compared one by one


class Neighbours:
    """Which samples of `copies.first` may be copies of which, by their hashes and mean colours."""

    def __init__(self, copies: Copies, signatures: np.ndarray, distance: int, limit: float) -> None:
        self.copies, self.signatures, self.distance, self.limit = copies, signatures, distance, limit
        self.colour = signatures["colour"]
        self.hashes, first, self.group, size = np.unique(
            signatures["hash"][copies.first].astype(np.uint64), return_index=True, return_inverse=True, return_counts=True
        )
        self.starts: np.ndarray | None = None  # of each group's neighbours in `others`; None: too many to hold
        self.involved = copies.first if len(self.hashes) < len(copies.first) else copies.first[:0]
        if (pairs := self._pairs()) is None:
            self.involved = copies.first
            return
        one = copies.first[first[pairs]]  # [p,2]: of groups of one sample, the samples themselves tell whether they are of interest
        alone = (size[pairs] == 1).all(1)
        passed = ~alone | (copies.wanted(one) & alike_in_colour(self.colour[one[:, 0]], self.colour[one[:, 1]], limit))
        pairs = pairs[passed]
        both = np.concatenate([pairs, pairs[:, ::-1]])
        both = both[np.argsort(both[:, 0], kind="stable")]
        self.starts, self.others = np.searchsorted(both[:, 0], np.arange(len(self.hashes) + 1)), both[:, 1]
        shared = (size > 1) | (np.diff(self.starts) > 0)
        self.involved = copies.first[shared[self.group]]

    def _pairs(self) -> np.ndarray | None:
        """int64 [p,2]: pairs of groups; None where they are too many."""
        count, pending, size = len(self.hashes), [], 0
        unique = np.zeros(0, np.int64)
        for pairs in pairs_within(self.hashes, self.distance):
            pending.append(pairs[:, 0] * count + pairs[:, 1])
            size += len(pairs)
            if size > PENDING:
                unique, pending, size = np.unique(np.concatenate([unique, *pending])), [], 0
                if len(unique) > PENDING + NEIGHBOURS * count:
                    return None
        return np.stack(np.divmod(np.unique(np.concatenate([unique, *pending])), max(count, 1)), 1)

    def candidates(self) -> Iterator[tuple[int, np.ndarray]]:
        """(sample, int64: the kept before it that it may be a copy of, best first), for each of `involved`, best first.

        A sample counts as kept unless it was dropped before the next one is asked for.
        """
        kept: dict[int, array[int]] = {}
        every = array("q")  # where neighbours are not held: all kept
        copies, hashes = self.copies, self.signatures["hash"]
        among = np.zeros(len(self.colour), bool)
        among[self.involved] = True
        for at in np.flatnonzero(among[copies.first]).tolist():
            sample, group = int(copies.first[at]), int(self.group[at])
            if self.starts is None:
                near = _samples([every])
                near = near[np.bitwise_count(hashes[near] ^ hashes[sample]) <= self.distance]
            else:
                groups = [group, *self.others[self.starts[group] : self.starts[group + 1]].tolist()]
                near = _samples(kept[each] for each in groups if each in kept)
            near = near[alike_in_colour(self.colour[near], self.colour[sample], self.limit)]
            near = near[copies.wanted(np.stack([near, np.full(len(near), sample)], 1))]
            yield sample, near[np.argsort(copies.rank[near])]
            if copies.of[sample] < 0 and (copies.within or sample >= copies.training):
                (every if self.starts is None else kept.setdefault(group, array("q"))).append(sample)


def _samples(lists: Iterable[array[int]]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(np.frombuffer(each, np.int64) for each in lists)])


def settle(neighbours: Neighbours, samples: np.ndarray, small: np.ndarray) -> None:
    """Drop the near copies. `samples`: those involved, ascending; `small`: uint8 [n,32,32,3], their pictures.

    Of several that a sample is a copy of, it counts as one of the first that is so without a change of brightness, else of the first.
    """
    for sample, near in neighbours.candidates():
        if not len(near):
            continue
        picture = small[np.searchsorted(samples, sample)]
        for brightened in (False, True):
            found = _first(small, np.searchsorted(samples, near), picture, neighbours.limit, brightened)
            if found is not None:
                neighbours.copies.drop(int(near[found[0]]), sample, "near", found[1])
                break


def _first(small: np.ndarray, places: np.ndarray, picture: np.ndarray, limit: float, brightened: bool) -> tuple[int, float] | None:
    """(number among `places`, difference) of the first picture within `limit`."""
    for start in range(0, len(places), BATCH):
        apart = differences(small[places[start : start + BATCH]], picture[None], limit, brightened=brightened)
        if (apart <= limit).any():
            at = int(np.argmax(apart <= limit))
            return start + at, float(apart[at])
    return None


@dataclass(frozen=True)
class Wanted:
    """Some samples of a shard, to be looked at again."""

    name: str
    samples: tuple[int, ...]


def thumbnails(wanted: Wanted) -> np.ndarray:
    """The stage: uint8 [n,32,32,3]."""
    with Shard(wanted.name) as shard:
        return np.stack([small(decoded(shard, sample)) for sample in wanted.samples])


def drop_near(
    copies: Copies,
    signatures: np.ndarray,
    locate: Callable[[np.ndarray], Iterable[Place]],
    distance: int = HASH_DISTANCE,
    limit: float = DIFFERENCE,
    *,
    engine: str = "local",
    processes: int | None = None,
) -> None:
    """Drop the near copies among the samples of shards. Images that may be copies by their signatures are read once more.

    Args:
        locate: samples, ascending -> where they lie, in the same order.
        distance: bits of 64 in which the hashes of copies may differ.
        limit: see `perceptual.difference`.
    """
    neighbours = Neighbours(copies, signatures, distance, limit)
    samples = np.sort(neighbours.involved)
    if not len(samples):
        return
    with tempfile.TemporaryFile() as file:
        pictures = np.memmap(file, np.uint8, "w+", shape=(len(samples), THUMBNAIL, THUMBNAIL, 3))
        start = 0
        for images in engines.run(thumbnails, list(_tasks(locate(samples))), engine=engine, processes=processes, title="candidates"):
            pictures[start : start + len(images)] = images
            start += len(images)
        settle(neighbours, samples, pictures)
        del pictures


def _tasks(places: Iterable[Place]) -> Iterator[Wanted]:
    """What to read of each shard, at most a few hundred samples at a time."""
    for name, group in groupby(places, lambda place: place.shard):
        inside = [place.index for place in group]
        step = len(inside) if is_remote(name) else SPAN
        for start in range(0, len(inside), step):
            yield Wanted(name, tuple(inside[start : start + step]))
