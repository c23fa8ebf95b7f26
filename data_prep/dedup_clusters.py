"""Pairs of copies -> clusters, and which member of each is kept."""

from __future__ import annotations

import numpy as np

KEEP = ("first", "largest", "longest-caption")
RULES = ("", "exact", "near", "embedding")  # how a sample is linked to its cluster; the numbers in `Clusters.rule`


class Clusters:
    """Union-find over N samples, and by which rule, and to which other, each was linked first. 21 bytes a sample."""

    def __init__(self, count: int) -> None:
        self._parent = np.arange(count)
        self.rule = np.zeros(count, np.uint8)
        self.partner = np.full(count, -1)
        self.value = np.zeros(count, np.float32)  # near: difference; embedding: cosine

    def find(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]  # halves the path
            i = int(parent[i])
        return i

    def join(self, i: int, j: int, rule: str, value: float = 0.0) -> None:
        a, b = self.find(i), self.find(j)
        self._parent[max(a, b)] = min(a, b)
        for one, other in ((i, j), (j, i)):
            if not self.rule[one]:
                self.rule[one], self.partner[one], self.value[one] = RULES.index(rule), other, value

    def joined(self, i: int, j: int) -> bool:
        return self.find(i) == self.find(j)

    def roots(self) -> np.ndarray:
        """int64 [N]: the lowest member of each sample's cluster."""
        parent = self._parent
        while not np.array_equal(parent, above := parent[parent]):
            parent = above
        self._parent = parent
        return parent.copy()


def exact_groups(signatures: np.ndarray, usable: np.ndarray, clusters: Clusters) -> np.ndarray:
    """Join what has equal digests; -> int64 [R], the first of each group, ascending. O(N log N)."""
    at = np.flatnonzero(usable)
    digest = signatures["digest"][at]
    order = at[np.lexsort((digest[:, 1], digest[:, 0]))]  # stable: equal digests stay in the order of the samples
    same = (signatures["digest"][order[1:]] == signatures["digest"][order[:-1]]).all(1)
    first = np.maximum.accumulate(np.where(np.r_[True, ~same], np.arange(len(order)), 0)) if len(order) else np.zeros(0, np.int64)
    for place in np.flatnonzero(np.r_[False, same]) if len(order) else ():
        clusters.join(int(order[first[place]]), int(order[place]), "exact")
    return np.sort(order[np.r_[True, ~same]]) if len(order) else at


def kept(roots: np.ndarray, signatures: np.ndarray, keep: str) -> np.ndarray:
    """int64 [N]: for every sample, the member of its cluster that the rule keeps: the first in order, the one with the most pixels, or
    with the longest caption; the first of equals. Raises ValueError for another rule."""
    if keep not in KEEP:
        raise ValueError(f"--keep {keep!r}: expected {', '.join(KEEP)}")
    none = np.zeros(len(roots), np.int64)
    score = {"first": none, "largest": signatures["area"], "longest-caption": signatures["caption"]}[keep].astype(np.int64)
    order = np.lexsort((np.arange(len(roots)), -score, roots))
    best = np.empty(len(roots), np.int64)
    leads = np.flatnonzero(np.r_[True, roots[order][1:] != roots[order][:-1]]) if len(roots) else none
    best[roots[order[leads]]] = order[leads]
    return best[roots]
