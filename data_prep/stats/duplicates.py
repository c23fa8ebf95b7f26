"""Images that are the same by bytes, or look alike by perceptual hash, within a summarised set."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from data_prep.stats.summary import Groups, Ref

NEAR = 4  # bits of 64 in which the hashes of look-alikes may differ
_BANDS = [(0, 13), (13, 13), (26, 13), (39, 13), (52, 12)]  # one more than NEAR: two hashes that near agree in one of them


class Group(NamedTuple):
    """Images that belong together."""

    count: int
    refs: list[Ref]  # the first few


def exact(groups: Groups) -> list[Group]:
    return [Group(count, refs) for _, count, refs in groups.repeated()]


def alike(groups: Groups, same: Groups) -> list[Group]:
    """Images whose hashes differ in at most NEAR bits from that of one among them, the largest group first; not those whose bytes are
    all the same, which `same` holds. Groups do not chain: every member is near the group's centre."""
    groups.repeated()  # cuts to the sample of digests
    order = sorted(groups.groups, key=lambda digest: (-groups.groups[digest][0], digest))
    hashes = np.array(order, np.uint64)
    bands: list[dict[int, list[int]]] = []
    for start, bits in _BANDS:
        table: dict[int, list[int]] = defaultdict(list)
        for at, value in enumerate(((hashes >> np.uint64(start)) & np.uint64((1 << bits) - 1)).tolist()):
            table[value].append(at)
        bands.append({value: members for value, members in table.items() if len(members) > 1})
    identical = {ref: digest for digest, _, refs in same.repeated() for ref in refs}
    free = np.ones(len(hashes), bool)
    found: list[Group] = []
    for centre, digest in enumerate(order):
        if not free[centre]:
            continue
        near = {at for (start, bits), table in zip(_BANDS, bands) for at in table.get((digest >> start) & ((1 << bits) - 1), [])}
        candidates = np.array(sorted(at for at in near if free[at] and at != centre), np.int64)
        members = candidates[np.bitwise_count(hashes[candidates] ^ hashes[centre]) <= NEAR].tolist() if len(candidates) else []
        free[[centre, *members]] = False
        together = [groups.groups[order[at]] for at in (centre, *members)]
        count = sum(number for number, _ in together)
        refs = [ref for _, ref in sorted((m for _, entries in together for m in entries), key=lambda m: (m[0], m[1].key))]
        copies = identical.get(refs[0])
        if count > 1 and (copies is None or same.groups[copies][0] != count):
            found.append(Group(count, refs[: groups.keep]))
    return sorted(found, key=lambda group: (-group.count, group.refs[0].key))
