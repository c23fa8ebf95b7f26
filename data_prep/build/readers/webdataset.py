"""The reader of WebDataset shards of any origin, to rebuild them with another size, safe keys and an index, without damaged samples.

A task is a range of `max_count` samples over one or more shards; the bytes of members pass through.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data_prep.build.readers.base import caption_text, extension_of, safe
from data_prep.build.readers.members import attempt
from data_prep.records import InputError, Record, Skipped
from data_prep.shards.read import Shard, ShardRange, opened
from data_prep.shards.task import key_digests
from mmpretrain.data.cache import read_sizes, remote_index
from mmpretrain.data.formats import foreign_kind
from mmpretrain.data.index import ShardIndex
from mmpretrain.data.schema import SAFE_KEY, BadSample, ShardError, image_extension
from mmpretrain.data.shard_names import is_remote

KEYS = ("keep", "shard")


@dataclass(frozen=True)
class Part:
    """Samples `start` to `stop - 1` of a shard of `tar_bytes`.

    `repeated`: those whose key an earlier sample has. `problems`: other losses of the shard.
    """

    shard: str
    tar_bytes: int
    start: int
    stop: int
    repeated: tuple[int, ...] = ()
    partial: str = ""  # the members that the sample before the damage lacks
    problems: tuple[Skipped, ...] = ()


class _Surveyed(NamedTuple):
    """What is held of every shard while the tasks are made. `keys`: uint64 [samples], a digest of each key."""

    name: str
    tar_bytes: int
    problems: tuple[Skipped, ...]
    partial: str
    keys: np.ndarray


def partial(index: ShardIndex) -> str:
    """Returns the members that all samples but the last have: in a damaged shard, the last one was cut off."""
    last = index.members(len(index) - 1) if len(index) > 1 else {}
    return ", ".join(extension for extension, n in index.counts().items() if n == len(index) - 1 and extension not in last)


def safe_key(key: str) -> str:
    """Returns a key that the writer accepts; a changed key gets a digest of the original."""
    if len(key) <= 200 and SAFE_KEY.fullmatch(key):
        return key
    digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    return f"{safe(key) or 'sample'}_{digest}"


@dataclass(frozen=True)
class Shards:
    """Reader of shards; see `shards`. `expected`: (shard, samples, file that states it)."""

    names: tuple[str, ...]
    members: tuple[str, ...] = ()  # keep only these; all where empty
    require: tuple[str, ...] = ()
    keys: str = "keep"  # shard: the last `depth` parts of the shard's name before each key
    depth: int = 1
    expected: tuple[tuple[str, int, str], ...] = ()
    classes: None = None
    image_member: str | None = None  # the member that is the image; None: the first of the usual ones

    def _survey(self, name: str, stated: tuple[int, str] | None) -> _Surveyed:
        try:
            index = _index(name)
        except (ShardError, OSError) as error:
            return _Surveyed(name, 0, (Skipped(name, "unreadable_shard", str(error)),), "", np.zeros(0, np.uint64))
        problems = []
        for damage in index.damage:
            detail = f"{damage.detail}; {len(index)} samples lie before it, about {damage.lost} are lost"
            problems.append(Skipped(f"{name}, byte {damage.offset}", damage.reason, detail))
        problems += [Skipped(f"{name}, {member.name}", member.reason, str(member)) for member in index.left_out or () if member.lost]
        if stated is not None and stated[0] != len(index):
            problems.append(Skipped(name, "count_disagrees", f"{len(index)} samples found, {stated[1]} says {stated[0]}"))
        keys = key_digests(self.key(name, key) for key in index.keys)
        return _Surveyed(name, index.tar_bytes, tuple(problems), partial(index) if index.damage else "", keys)

    def tasks(self, max_count: int) -> Iterator[tuple[Part, ...]]:
        stated = {name: (count, by) for name, count, by in self.expected}
        surveyed = [self._survey(name, stated.get(name)) for name in self.names]
        digests = np.concatenate([*(shard.keys for shard in surveyed), np.zeros(0, np.uint64)])
        again = np.ones(len(digests), bool)
        again[np.unique(digests, return_index=True)[1]] = False  # the first of each key
        held: list[Part] = []
        room, first = max_count, 0
        for shard in surveyed:
            count, start, done = len(shard.keys), 0, False
            while start < count or (shard.problems and not done):
                stop = min(count, start + room)
                repeated = tuple((np.flatnonzero(again[first + start : first + stop]) + start).tolist())
                done = stop == count
                end = (shard.partial, shard.problems) if done else ("", ())
                held.append(Part(shard.name, shard.tar_bytes, start, stop, repeated, *end))
                room, start = room - (stop - start), stop
                if room == 0:
                    yield tuple(held)
                    held, room = [], max_count
            first += count
        if held:
            yield tuple(held)

    def __call__(self, task: tuple[Part, ...]) -> Iterator[Record | Skipped]:
        for part in task:
            if part.start < part.stop:
                with opened(part.shard, part.start, part.stop) as shard:
                    if shard.index.tar_bytes != part.tar_bytes:
                        raise InputError(f"{part.shard} changed while it was read. Start again when nothing writes to it.")
                    repeated = set(part.repeated) | _come_again(shard.index)
                    for i in range(part.start, part.stop):
                        where = f"{part.shard}, sample {shard.key(i)}"
                        yield attempt(where, functools.partial(self._record, shard, i, part, repeated))
            yield from part.problems

    def sources(self, task: tuple[Part, ...]) -> Iterator[str | None]:
        return (part.shard for part in task)

    def key(self, shard: str, key: str) -> str:
        before = "_".join(shard.removesuffix(".tar").split("/")[-self.depth :])
        return safe_key(f"{before}_{key}" if self.keys == "shard" else key)

    def _record(self, shard: Shard | ShardRange, i: int, part: Part, repeated: set[int]) -> Record:
        """Reads and checks a sample. Raises BadSample."""
        key = shard.key(i)
        if i in repeated:
            raise BadSample("duplicate_key", "an earlier sample has it. Where each shard counts from 0, pass --keys shard")
        if part.partial and i == part.stop - 1:
            raise BadSample("missing_member", f"{part.partial}: the shard is damaged after its other members")
        kept = shard.read(i, self.members or None).members
        if not kept:
            raise BadSample("missing_member", f"none of {', '.join(self.members)}; it has {', '.join(shard.index.members(i))}")
        lacking = [extension for extension in self.require if extension not in kept]
        if lacking:
            raise BadSample("missing_member", f"{', '.join(lacking)}; it has {', '.join(sorted(kept))}")
        check_members(kept, self.image_member)
        return Record(self.key(part.shard, key), kept)


def _come_again(index: ShardIndex) -> set[int]:
    """Returns the samples that repeat a key within the shard: the index names them KEY~2, KEY~3 ..."""
    keys = set(index.keys) if index.duplicates else set()
    named = ((i, *key.rpartition("~")) for i, key in enumerate(index.keys if keys else []))
    return {i for i, base, _, number in named if base in keys and number.isdecimal()}


def check_members(members: Mapping[str, bytes], image: str | None = None) -> None:
    """Raises BadSample for an image of unknown format, an empty or non-UTF-8 caption, or an invalid extension. Decodes nothing."""
    if any(not extension or "/" in extension or "\0" in extension for extension in members):
        raise BadSample("bad_member", f"its members are {', '.join(map(repr, members))}")
    extension = image_extension(members, image)
    if image is not None and extension is None:
        raise BadSample("missing_member", f"{image}; it has {', '.join(sorted(members))}")
    if extension is not None and extension_of(members[extension]) is None:
        data = members[extension]
        noun, _ = foreign_kind(data) or ("", "")
        what = f"{noun}, which begins" if noun else "begins"
        raise BadSample("unknown_format", f"{extension}: {f'{what} with {data[:12]!r}' if data else 'is empty'}")
    if "txt" in members:
        caption_text(members["txt"])


def _index(name: str) -> ShardIndex:
    """Opens the index of a shard, without the shard where it is remote and indexed. Raises ShardError, OSError."""
    if is_remote(name):
        index = remote_index(name)
        if index is not None:
            return index
    with closing(Shard(name)) as shard:
        return shard.index


def shards(
    names: list[str], members: tuple[str, ...] = (), require: tuple[str, ...] = (), keys: str = "keep", image: str | None = None
) -> Shards:
    """Opens a reader of shards.

    Args:
        names: paths or URLs.
        members: extensions to keep; empty: all.
        require: extensions without which a sample is skipped.
        keys: "keep", or "shard" to put the shard's name before each key.
        image: the member that is the image; None: the first of the usual ones.

    Raises:
        InputError: an option or a repeated shard.
        ShardError: a sizes.json beside the shards cannot be read.
    """
    if keys not in KEYS:
        raise InputError(f"--keys {keys!r}: expected {' or '.join(KEYS)}")
    twice = sorted(name for name, times in Counter(names).items() if times > 1)
    if twice:
        raise InputError(f"{', '.join(twice[:3])} named more than once")
    unmet = [extension for extension in require if members and extension not in members]
    if unmet:
        raise InputError(f"--require {', '.join(unmet)} is not among --member {', '.join(members)}")
    stated = tuple((name, count, "sizes.json") for name, count in sorted(read_sizes(names).items()))
    depth = 1
    while len({tuple(name.split("/")[-depth:]) for name in names}) < len(names):
        depth += 1
    return Shards(tuple(names), members, require, keys, depth, stated, image_member=image)
