"""Duplicates within a summarised set, by the criteria of `dedup`: equal pixels, and near copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from data_prep.copies import Copies, drop_near
from data_prep.perceptual import SIGNATURE
from data_prep.shards.read import Place
from data_prep.stats.summary import Picture, Pictures, Ref


class Group(NamedTuple):
    """A group of duplicate images."""

    count: int
    refs: list[Ref]  # the first few


class Duplicates(NamedTuple):
    """Groups, the largest first. `superfluous`: images that `dedup` drops by default from the same shards."""

    exact: list[Group]  # equal pixels
    alike: list[Group]  # a kept picture and its near copies, with their exact copies
    superfluous: int


def find_duplicates(pictures: Pictures, names: Sequence[str], *, engine: str = "local", processes: int | None = None) -> Duplicates:
    """Groups the pictures of shards `names`. Candidates for near copies, by their hashes, are read again and compared."""
    distinct = pictures.distinct()
    number = {name: i for i, name in enumerate(names)}
    order = sorted(distinct, key=lambda digest: (number[distinct[digest].first.shard], distinct[digest].first.sample))
    ordered = [distinct[digest] for digest in order]
    signatures = np.zeros(len(order), SIGNATURE)
    for row, digest, picture in zip(signatures, order, ordered):
        row["digest"], row["hash"] = divmod(digest, 1 << 64), picture.hash
        row["colour"] = np.frombuffer(picture.colour, np.uint8)
    copies = Copies(signatures, np.ones(len(order), bool), len(order))

    def locate(samples: np.ndarray) -> Iterator[Place]:
        return (Place(sample, ordered[sample].first.shard, ordered[sample].first.sample) for sample in samples.tolist())

    drop_near(copies, signatures, locate, engine=engine, processes=processes)
    near: dict[int, list[Picture]] = defaultdict(list)
    for sample in np.flatnonzero(copies.of >= 0).tolist():
        near[int(copies.of[sample])].append(ordered[sample])
    exact = [_group([picture], pictures.keep) for picture in ordered if picture.count > 1]
    alike = [_group([ordered[kept], *others], pictures.keep) for kept, others in near.items()]
    dropped = sum(picture.count for others in near.values() for picture in others)
    of_kept = sum(picture.count - 1 for picture, of in zip(ordered, copies.of.tolist()) if of < 0)
    return Duplicates(_largest_first(exact), _largest_first(alike), dropped + of_kept)


def _group(members: Iterable[Picture], keep: int) -> Group:
    members = list(members)
    refs = sorted((entry for picture in members for entry in picture.refs), key=lambda entry: (entry[0], entry[1].key))
    return Group(sum(picture.count for picture in members), [ref for _, ref in refs[:keep]])


def _largest_first(groups: list[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: (-group.count, group.refs[0].key))
