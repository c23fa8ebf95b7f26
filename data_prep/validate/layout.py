"""Layout of a shard: the members of its samples, and samples with portable keys, as readers group them."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_prep.shards.read import LocalCopy
from data_prep.validate.kinds import Finding, Problem, is_image
from mmpretrain.data import index as shard_index
from mmpretrain.data.index import Member, ShardIndex
from mmpretrain.data.schema import IMAGE_EXTENSIONS, SAFE_KEY, ShardError, split_name
from mmpretrain.data.tar import NO_HEADERS, Headers, read_headers

MAX_KEY = 200
_HOSTILE = re.compile(r"(^|/)\.\.(/|$)|^/|^[A-Za-z]:|\\|[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass
class Unit:
    """One sample as --repair writes it: dotted keys split, every key sanitised."""

    key: str
    places: dict[str, Member]
    problems: list[Problem]  # of the key and the order of members; `examine` adds those of the content
    name: str = ""  # its key in the shard, where `key` has been sanitised

    @property
    def offset(self) -> int:
        return min((member.offset for member in self.places.values()), default=-1)


def clean(key: str) -> str:
    """Converts a key to one that every reader and file system accepts."""
    key = "/".join(part for part in re.sub(r"[^\w/-]+", "_", key).split("/") if part.strip("_")) or "sample"
    if len(key) > MAX_KEY:
        key = f"{key[: MAX_KEY - 13].rstrip('/')}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    return key


def _same_layout(a: ShardIndex, b: ShardIndex) -> bool:
    return a.keys == b.keys and np.array_equal(a.offset, b.offset) and np.array_equal(a.size, b.size)


def read_ahead(file: int) -> None:
    """Prefetches the whole file into the page cache, so that reading overlaps with the work on samples."""
    if hasattr(os, "posix_fadvise"):
        copy = os.dup(file)

        def fetch() -> None:
            with suppress(OSError):  # only a hint: reading reports problems of the file
                os.posix_fadvise(copy, 0, 0, os.POSIX_FADV_WILLNEED)
            os.close(copy)

        threading.Thread(target=fetch, daemon=True).start()


class Layout:
    """Locations of a shard's samples, from its headers, or from an index with checksums where the headers are damaged."""

    def __init__(self, name: str, image_member: str | None = None) -> None:
        """Reads the headers. `image_member`: the member that is the image, which is no end of a dotted key."""
        self.name, self._image_member = name, image_member
        self.findings: list[Finding] = []
        self.lost, self.estimated = 0, False
        self.trusted = True  # the locations are those of intact headers
        self.linked: np.ndarray | None = None  # bool [M]: members that are links; None where that is not known
        self.header: np.ndarray | None = None  # int64 [M]: where the members' headers lie
        self.index = shard_index.from_headers(NO_HEADERS, None, 0)
        self.size, self.file = 0, -1
        self._copy: LocalCopy | None = None
        try:
            self._copy = LocalCopy(name)
            self.file = os.open(self._copy.path, os.O_RDONLY)
            self.size = os.fstat(self.file).st_size
            read_ahead(self.file)
        except (ShardError, OSError) as error:
            self._add("unreachable", -1, str(error))
            self.lost, self.estimated = 1, True
            return
        try:
            self._read(self._copy.path)
        except BaseException:
            self.close()
            raise

    def _add(self, kind: str, offset: int, detail: str, key: str = "") -> None:
        self.findings.append(Finding(self.name, key, offset, kind, detail))

    def _read(self, path: Path) -> None:
        assert self._copy is not None
        saved = None
        if shard_index.index_path(path).exists():
            try:
                saved, _ = shard_index.load(shard_index.index_path(path))
            except ShardError as error:
                self._add("bad_index", -1, self._copy.explain(error))
        scanned = None
        try:
            headers, stop = read_headers(mmap.mmap(self.file, 0, access=mmap.ACCESS_READ) if self.size else b"", str(path))
            scanned = shard_index.from_headers(headers, stop, self.size)
            self._left_out(scanned, headers)
            if len(headers.names) > len(scanned.offset):
                for member, offset in zip(headers.names, headers.header.tolist()):
                    if split_name(member) is None and not re.fullmatch(r"(.*/)?__\w+__", member):
                        self._add("stray_member", offset, repr(member)[:200])
        except ShardError as error:
            self._add("no_tar", 0, self._copy.explain(error).removeprefix(f"{self.name}: "))
            self.lost, self.estimated = 1, True
        for damage in () if scanned is None else scanned.damage:  # an index without samples is falsy
            self._add(damage.reason, damage.offset, damage.detail)
            self.lost, self.estimated = self.lost + damage.lost, True
        self._choose(saved, scanned)

    def _left_out(self, scanned: ShardIndex, headers: Headers) -> None:
        """Adds the members that cannot be read, and counts the samples lost with them."""
        listed = scanned.left_out or []
        for member in listed:
            self._add(member.reason, member.offset, str(member)[:300], member.key)
        self.lost += sum(member.lost for member in listed)
        samples = {member.offset for member in listed}
        for member in headers.unread:
            if member.header not in samples:
                self._add("stray_member", member.header, f"{member.name!r} is {member.detail}"[:300])
        self.linked, self.header = scanned.linked, scanned.header

    def _choose(self, saved: ShardIndex | None, scanned: ShardIndex | None) -> None:
        """Chooses the layout: of a damaged shard, a saved index with checksums also locates the samples behind the damage."""
        if scanned is not None:
            self.index = scanned
        if saved is None:
            return
        if saved.checksum is None:
            if scanned is None or not _same_layout(saved, scanned):
                self._add("index_outdated", -1, f"the index lists {len(saved)} samples in {saved.tar_bytes} bytes")
            return
        if scanned is not None and saved.tar_bytes == self.size and _same_layout(saved, scanned):
            self.index = saved
            return
        here = f"{len(scanned)} samples in {self.size} bytes" if scanned is not None else f"not a tar, {self.size} bytes"
        self._add("index_disagrees", -1, f"{here}, its index lists {len(saved)} samples in {saved.tar_bytes} bytes")
        if scanned is None or scanned.damage or self.size < saved.tar_bytes:
            self.index, self.trusted = saved, False
            self.lost, self.estimated = 0, False
            self.linked = self.header = None

    def units(self) -> Iterator[Unit]:
        """Yields the samples in order, with those of dotted keys split."""
        return (unit for i in range(len(self.index)) for unit in self.units_of(i))

    @cached_property
    def crossed(self) -> np.ndarray | None:
        return _interleaved(self.index, self.index.offset if self.header is None else self.header)

    @cached_property
    def _repeated(self) -> set[str]:
        return set(self.index.keys) if self.index.duplicates else set()

    @cached_property
    def _rare_extensions(self) -> set[str]:
        return _rare(self.index)

    def units_of(self, i: int) -> Iterator[Unit]:
        key, places = self.index.keys[i], self.index.members(i)
        problems: list[Problem] = []
        base = key.rpartition("~")[0]
        if self._repeated and base in self._repeated and key[len(base) + 1 :].isdecimal():
            problems.append(("duplicate_key", -1, f"an earlier sample has {base}"))
            key = base
        if self.crossed is not None and self.crossed[i]:
            problems.append(("interleaved", -1, "other samples' members lie between its own"))
        if self.linked is not None:
            for m in range(int(self.index.starts[i]), int(self.index.starts[i + 1])):
                if self.linked[m]:
                    extension, offset = self.index.extensions[self.index.extension[m]], int(self.index.offset[m])
                    problems.append(("linked_member", offset, f"{extension} is a link to the bytes at {offset}"))
        yield from _split(Unit(key, places, problems), self._rare_extensions, self._image_member)

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1
        if self._copy is not None:
            self._copy.close()

    def __enter__(self) -> Layout:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _interleaved(index: ShardIndex, offset: np.ndarray) -> np.ndarray | None:
    """Marks samples interleaved with others, bool [S], by the places of members, int64 [M]; None for none."""
    if not len(offset) or (np.diff(offset) >= 0).all():
        return None
    rank = np.argsort(np.argsort(offset, kind="stable"), kind="stable")
    first, last = np.minimum.reduceat(rank, index.starts[:-1]), np.maximum.reduceat(rank, index.starts[:-1])
    return last - first + 1 != np.diff(index.starts)


def _known(extension: str) -> bool:
    return is_image(extension) or extension in ("txt", "json", "cls")


def _rare(index: ShardIndex) -> set[str]:
    """Returns dotted extensions of few samples, which look like the end of a dotted key."""
    counts = index.counts()
    return {e for e, n in counts.items() if "." in e and _known(e.rpartition(".")[2]) and n * 10 < len(index)}


def _split(unit: Unit, rare: set[str], image: str | None) -> Iterator[Unit]:
    """Splits `photo.1.jpg` and `photo.2.jpg`, which readers merge into one sample; `x.jpg` with `x.seg.png` stays one."""
    hidden: dict[str, dict[str, Member]] = {}
    for extension, member in unit.places.items():
        middle, dot, last = extension.rpartition(".")
        if not dot or not _known(last):
            continue
        plain = any(e in unit.places for e in (*IMAGE_EXTENSIONS, image)) if is_image(last) else last in unit.places
        if not plain or extension in rare:
            hidden.setdefault(f"{unit.key}.{middle}", {})[last] = member
    moved = {f"{key[len(unit.key) + 1 :]}.{last}" for key, places in hidden.items() for last in places}
    rest = {extension: member for extension, member in unit.places.items() if extension not in moved}
    if rest or not hidden:
        yield _with_checked_key(Unit(unit.key, rest, unit.problems))
    for key, places in hidden.items():
        yield _with_checked_key(
            Unit(key, places, [*unit.problems, ("dotted_key", -1, f"readers merge it with other members into {unit.key}")])
        )


def _with_checked_key(unit: Unit) -> Unit:
    key = unit.key.removeprefix("./")
    if _HOSTILE.search(key):
        unit.problems.append(("unsafe_key", -1, repr(unit.key)[:250]))
    elif len(key) > MAX_KEY or not (SAFE_KEY.fullmatch(key) or any(kind == "dotted_key" for kind, _, _ in unit.problems)):
        unit.problems.append(("unusual_key", -1, repr(unit.key)[:250]))
    return unit


def unique(units: Iterator[Unit], used: set[str]) -> Iterator[Unit]:
    """Yields units with sanitised keys, unique within the shard by suffixes -2, -3 ...; adds the keys to `used`."""
    for unit in units:
        key = name = unit.key if len(unit.key) <= MAX_KEY and SAFE_KEY.fullmatch(unit.key) else clean(unit.key)
        number = 1
        while name in used:
            number += 1
            name = f"{key[: MAX_KEY - 8]}-{number}"
        used.add(name)
        yield Unit(name, unit.places, unit.problems, unit.key)
