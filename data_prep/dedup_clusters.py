"""Which sample stands for which: every dropped sample is a direct copy of a kept one.

Chains are not followed: where a brightened copy lies between two distinct pictures, it is dropped for the one that is kept first, and the
other picture stays. (Joining all that is linked would lose it.)
"""

from __future__ import annotations

import numpy as np

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
