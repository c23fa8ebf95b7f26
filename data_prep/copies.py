"""Choice of the sample to keep among copies: every dropped sample is a direct copy of a kept one.

Chains are not followed: a brightened copy between two distinct pictures is dropped for the one that is kept first, and
the other picture stays. (Merging connected components would lose it.)

Near copies are assigned greedily, best rank first: each sample is compared only with those kept before it, so memory
grows with samples, not with pairs. Many samples share a hash (flat images all have the hash 0): samples of equal hash
form a group, and groups with hashes within the distance are neighbours.
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
from mmpretrain.config.build import OptionError
from mmpretrain.data.shard_names import is_remote

KEEP = ("first", "largest", "longest-caption")
RULES = ("", "exact", "near", "embedding")  # indexed by `Copies.rule`


def ranks(signatures: np.ndarray, training: int, keep: str) -> np.ndarray:
    """Ranks samples by the priority of keeping them.

    Args:
        signatures: SIGNATURE [N].
        training: number of training samples; evaluation samples follow and rank before them.
        keep: "first" in order, "largest" in pixels, or "longest-caption"; ties go to the first.

    Returns:
        int64 [N]: the rank of each sample, 0 is kept before all others.

    Raises:
        OptionError: an unknown `keep`.
    """
    if keep not in KEEP:
        raise OptionError(f"--keep {keep!r}: expected {', '.join(KEEP)}")
    count = len(signatures)
    none = np.zeros(count, np.int64)
    score = {"first": none, "largest": signatures["area"], "longest-caption": signatures["caption"]}[keep].astype(np.int64)
    order = np.lexsort((np.arange(count), -score, np.arange(count) < training))
    result = np.empty(count, np.int64)
    result[order] = np.arange(count)
    return result


class Copies:
    """The kept sample that each sample is a copy of, and the rule that established it. 29 bytes a sample."""

    def __init__(self, signatures: np.ndarray, usable: np.ndarray, training: int, keep: str = "first", within: bool = True) -> None:
        """Groups samples with equal pixels, in O(N log N).

        Args:
            signatures: SIGNATURE [N].
            usable: bool [N]: samples with an image that could be decoded.
            training: number of training samples; the others are evaluation samples.
            keep: see `ranks`.
            within: also look for copies within the training samples, not only of evaluation samples.
        """
        count = len(signatures)
        self.training, self.within = training, within
        self.rank = ranks(signatures, training, keep)
        self.of = np.full(count, -1)  # the kept sample, or -1
        self.rule = np.zeros(count, np.uint8)
        self.value = np.zeros(count, np.float32)  # near: difference; embedding: cosine
        self.twin = np.arange(count)  # the best-ranked sample with equal pixels
        rows = np.flatnonzero(usable)
        digest = signatures["digest"]
        order = rows[np.lexsort((self.rank[rows], digest[rows, 1], digest[rows, 0]))]
        begins = np.r_[True, (digest[order[1:]] != digest[order[:-1]]).any(1)][: len(order)]
        self.twin[order] = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
        first = order[begins]
        self.first = first[np.argsort(self.rank[first])]  # the best of each group of equals, by rank: only these are compared further

    def wanted(self, pairs: np.ndarray) -> np.ndarray:
        """Selects the pairs to compare: int64 [p,2] of `first` -> bool [p]."""
        held = pairs >= self.training
        return np.asarray(~held.all(1) & (held.any(1) | self.within))

    def drop(self, kept: int, sample: int, rule: str, value: float) -> None:
        """Drops a copy, unless either sample is dropped already. Calls must come in ascending rank of `kept`."""
        if self.of[kept] < 0 and self.of[sample] < 0:
            self.of[sample], self.rule[sample], self.value[sample] = kept, RULES.index(rule), value

    def settle(self) -> None:
        """Assigns samples with equal pixels: to the kept sample of their best-ranked twin, or to that twin itself."""
        for sample in np.flatnonzero(self.twin[: self.training] != np.arange(self.training)).tolist():
            first = int(self.twin[sample])
            if self.of[first] >= 0:
                self.of[sample], self.rule[sample], self.value[sample] = self.of[first], self.rule[first], self.value[first]
            elif self.within or first >= self.training:
                self.of[sample], self.rule[sample] = first, RULES.index("exact")


BATCH = 2048  # pictures compared with one at a time: 50 MB
PENDING = 1 << 22  # pairs of groups held before repeated ones are removed
NEIGHBOURS = 32  # pairs held per group, on average, above `PENDING`; beyond that, hashes are compared one by one


class Neighbours:
    """Candidate copies among the samples of `copies.first`, by their hashes and mean colours."""

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
        one = copies.first[first[pairs]]  # [p,2]: a sample of each group; pairs of single samples are filtered at once
        single = (size[pairs] == 1).all(1)
        passed = ~single | (copies.wanted(one) & alike_in_colour(self.colour[one[:, 0]], self.colour[one[:, 1]], limit))
        pairs = pairs[passed]
        both = np.concatenate([pairs, pairs[:, ::-1]])
        both = both[np.argsort(both[:, 0], kind="stable")]
        self.starts, self.others = np.searchsorted(both[:, 0], np.arange(len(self.hashes) + 1)), both[:, 1]
        shared = (size > 1) | (np.diff(self.starts) > 0)
        self.involved = copies.first[shared[self.group]]

    def _pairs(self) -> np.ndarray | None:
        """Finds the pairs of neighbouring groups, int64 [p,2]; None for too many."""
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
        """Yields (sample, int64 [n] of the kept samples before it that it may be a copy of), both by rank, for each of `involved`.

        A sample counts as kept unless it is dropped before the next one is requested.
        """
        kept: dict[int, array[int]] = {}
        all_kept = array("q")  # where neighbours are not held
        copies, hashes = self.copies, self.signatures["hash"]
        involved = np.zeros(len(self.colour), bool)
        involved[self.involved] = True
        for index in np.flatnonzero(involved[copies.first]).tolist():
            sample, group = int(copies.first[index]), int(self.group[index])
            if self.starts is None:
                near = _concatenated([all_kept])
                near = near[np.bitwise_count(hashes[near] ^ hashes[sample]) <= self.distance]
            else:
                groups = [group, *self.others[self.starts[group] : self.starts[group + 1]].tolist()]
                near = _concatenated(kept[each] for each in groups if each in kept)
            near = near[alike_in_colour(self.colour[near], self.colour[sample], self.limit)]
            near = near[copies.wanted(np.stack([near, np.full(len(near), sample)], 1))]
            yield sample, near[np.argsort(copies.rank[near])]
            if copies.of[sample] < 0 and (copies.within or sample >= copies.training):
                (all_kept if self.starts is None else kept.setdefault(group, array("q"))).append(sample)


def _concatenated(lists: Iterable[array[int]]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *(np.frombuffer(each, np.int64) for each in lists)])


def settle(neighbours: Neighbours, samples: np.ndarray, small: np.ndarray) -> None:
    """Drops the near copies.

    A sample with several matches is a copy of the first that matches without a change of brightness, else of the first.

    Args:
        neighbours: the candidates.
        samples: the samples involved, int64 [n], ascending.
        small: uint8 [n,32,32,3], their thumbnails.
    """
    for sample, near in neighbours.candidates():
        if not len(near):
            continue
        picture = small[np.searchsorted(samples, sample)]
        for brightened in (False, True):
            match = _first_match(small, np.searchsorted(samples, near), picture, neighbours.limit, brightened)
            if match is not None:
                neighbours.copies.drop(int(near[match[0]]), sample, "near", match[1])
                break


def _first_match(small: np.ndarray, rows: np.ndarray, picture: np.ndarray, limit: float, brightened: bool) -> tuple[int, float] | None:
    """Returns (index in `rows`, difference) of the first thumbnail within `limit` of `picture`; None without one."""
    for start in range(0, len(rows), BATCH):
        distances = differences(small[rows[start : start + BATCH]], picture[None], limit, brightened=brightened)
        if (distances <= limit).any():
            index = int(np.argmax(distances <= limit))
            return start + index, float(distances[index])
    return None


@dataclass(frozen=True)
class ShardSamples:
    """Samples of a shard whose thumbnails are needed."""

    name: str
    samples: tuple[int, ...]


def thumbnails(wanted: ShardSamples) -> np.ndarray:
    """The task of a worker: reads the thumbnails of samples, uint8 [n,32,32,3]."""
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
    """Drops the near copies among the samples of shards. Reads the images of candidates once more.

    Args:
        copies: receives the dropped samples.
        signatures: SIGNATURE [N].
        locate: samples, ascending -> their places, in the same order.
        distance: maximum distance between the hashes of copies, in bits of 64.
        limit: maximum of `perceptual.difference` between copies.
        engine: see `engine.run`.
        processes: see `engine.run`.
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


def _tasks(places: Iterable[Place]) -> Iterator[ShardSamples]:
    """Groups places by shard, at most a few hundred samples of a local shard per task."""
    for name, group in groupby(places, lambda place: place.shard):
        inside = [place.index for place in group]
        step = len(inside) if is_remote(name) else SPAN
        for start in range(0, len(inside), step):
            yield ShardSamples(name, tuple(inside[start : start + step]))
