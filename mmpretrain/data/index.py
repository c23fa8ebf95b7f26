"""The index of a shard (stage 1 of the data pipeline): the location of each sample's bytes in the tar.

A header scan over mmap takes microseconds per member, so shards without an index are indexed on first use. The index
is saved beside the shard as `NAME.tar.index.npz`; that of `data_prep` also holds a checksum per member, which detects
corruption.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from mmpretrain.atomic import write_atomically
from mmpretrain.data.schema import ShardError, split_name
from mmpretrain.data.tar import BLOCK, Headers, Stop, read_headers
from mmpretrain.system import lock_across_forks

log = logging.getLogger(__name__)
VERSION = 2
_CHECKSUMS = {1: "sha256", 2: "checksum"}  # the array's name by version
SUFFIX = ".index.npz"
_PARSING = lock_across_forks()  # NumPy parses headers with `ast`, which in CPython 3.11 occasionally fails in two threads at once


# The checksum of a member is XXH3 of 128 bits, which detects damage at the speed of memory. It does not prevent forgery: whoever can
# change a shard can change the index beside it. Against that, `manifest.json` holds the sha256 of every shard, for `sha256sum`.
BYTES = 16
# By their length, which identifies the kind in an index; the first versions of the builder used sha256.
_KINDS: dict[int, Callable[[Any], bytes]] = {BYTES: xxhash.xxh3_128_digest, 32: lambda data: hashlib.sha256(data).digest()}


def checksum(data: bytes | memoryview, length: int = BYTES) -> bytes:
    """Compute the checksum of that length in bytes. Raises KeyError for a length of no known kind."""
    return _KINDS[length](data)


def known(length: int) -> bool:
    """Return whether a checksum of this length in bytes has a known kind."""
    return length in _KINDS


class Member(NamedTuple):
    """The location of a member's bytes in its shard."""

    offset: int
    size: int
    checksum: bytes | None = None

    def holds(self, data: bytes | memoryview) -> bool:
        """Return whether `data` matches the checksum; true without one."""
        return self.checksum is None or checksum(data, len(self.checksum)) == self.checksum


class Damage(NamedTuple):
    """An offset from which a shard cannot be read."""

    offset: int
    reason: str  # cut | corrupt_header | zeros
    key: str  # the sample it falls in, or ""
    lost: int  # samples lost, estimated from the bytes that follow; at least 1
    detail: str


class LeftOut(NamedTuple):
    """A member of a sample that cannot be read, such as a link out of the tar."""

    name: str
    offset: int  # of its header
    reason: str  # dangling_link | link_to_folder | special_member | sparse_member
    detail: str
    lost: bool  # no other member of its sample can be read

    @property
    def key(self) -> str:
        return (split_name(self.name) or (self.name, ""))[0]

    def __str__(self) -> str:
        return f"{self.name} is {self.detail}"


@dataclass
class ShardIndex:
    """Samples in order of first appearance; members are grouped by key, even where a writer interleaved them."""

    keys: list[str]
    extensions: list[str]  # the distinct ones
    starts: np.ndarray  # int64 [S+1] into the member arrays
    extension: np.ndarray  # uint16 or uint32 [M] into `extensions`
    offset: np.ndarray  # int64 [M]
    size: np.ndarray  # int64 [M]
    tar_bytes: int
    checksum: np.ndarray | None = None  # uint8 [M, 16], or [M, 32] of sha256
    damage: list[Damage] = field(default_factory=list)
    duplicates: int = 0  # repeated keys; each is a sample of its own, with ~2, ~3 ... after the key
    left_out: list[LeftOut] | None = None  # in the tar's order; None where unknown: written by the builder, or by an earlier version
    header: np.ndarray | None = None  # int64 [M], offset of each member's header; only after a scan

    @property
    def linked(self) -> np.ndarray | None:
        """bool [M]: which members are links to the bytes of another; None where that is not known."""
        return None if self.header is None else self.header + BLOCK != self.offset

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, sample: int) -> dict[str, Member]:
        """Return extension -> location, for one sample."""
        members = {}
        for m in range(int(self.starts[sample]), int(self.starts[sample + 1])):
            digest = None if self.checksum is None else self.checksum[m].tobytes()
            members[self.extensions[self.extension[m]]] = Member(int(self.offset[m]), int(self.size[m]), digest)
        return members

    def counts(self) -> dict[str, int]:
        """Return extension -> number of samples that have it."""
        number = np.bincount(self.extension, minlength=len(self.extensions))
        return dict(sorted((name, int(n)) for name, n in zip(self.extensions, number) if n))


def scan_bytes(data: Any, name: str) -> ShardIndex:
    """Index a tar from its bytes (bytes or mmap). Raises ShardError where it is not a tar; later damage is recorded."""
    return from_headers(*read_headers(data, name), len(data))


def from_headers(headers: Headers, stop: Stop | None, tar_bytes: int) -> ShardIndex:
    """Build the index of a tar of `tar_bytes` from its headers."""
    grouping = group(headers.names)
    damage = []
    if stop is not None:
        offset, reason, detail = stop
        mean = offset / max(len(grouping.keys), 1)
        lost = max(1, round((tar_bytes - offset) / mean)) if mean and reason != "cut" else 1
        damage = [Damage(offset, reason, "", lost, detail)]
    return ShardIndex(
        keys=grouping.keys,
        extensions=grouping.extensions,
        starts=grouping.starts,
        extension=grouping.extension,
        offset=headers.offset[grouping.member],
        size=headers.size[grouping.member],
        tar_bytes=tar_bytes,
        damage=damage,
        duplicates=grouping.duplicates,
        left_out=left_out(headers, set(grouping.keys) if headers.unread else set()),
        header=headers.header[grouping.member],
    )


def left_out(headers: Headers, keys: set[str]) -> list[LeftOut]:
    """The members of samples that a tar names and that cannot be read; the first of a key that `keys` lack counts as a lost sample."""
    listed = []
    for name, offset, reason, detail in headers.unread:
        if (named := split_name(name)) is not None:
            lost = reason != "link_to_folder" and named[0] not in keys
            listed.append(LeftOut(name, offset, reason, detail, lost))
            if lost:
                keys.add(named[0])
    return listed


def scan(path: str | Path) -> ShardIndex:
    """Index a local tar by its headers."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return scan_bytes(b"", str(path))
        return scan_bytes(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), str(path))


def add_checksums(index: ShardIndex, path: str | Path, length: int = BYTES) -> None:
    """Add the checksum of every member, `length` bytes each, by reading the shard."""
    digests = bytearray()
    with open(path, "rb", buffering=1 << 20) as file:
        for offset, size in zip(index.offset.tolist(), index.size.tolist()):
            file.seek(offset)
            digests += checksum(file.read(size), length)
    index.checksum = np.frombuffer(bytes(digests), np.uint8).reshape(-1, length)


def _text(items: list[str]) -> np.ndarray:
    return np.frombuffer("\0".join(items).encode("utf-8", "surrogateescape"), np.uint8)


def _items(blob: np.ndarray) -> list[str]:
    text = blob.tobytes().decode("utf-8", "surrogateescape")
    return text.split("\0") if text else []


def save(index: ShardIndex, path: Path, mtime_ns: int = 0) -> None:
    """Write an index atomically; its bytes depend on the content alone."""
    head = {"version": VERSION, "bytes": index.tar_bytes, "mtime_ns": mtime_ns, "duplicates": index.duplicates, "damage": index.damage}
    if index.left_out is not None:
        head["left_out"] = index.left_out
    arrays = {
        "head": _text([json.dumps(head)]),
        "keys": _text(index.keys),
        "extensions": _text(index.extensions),
        "starts": index.starts,
        "extension": index.extension,
        "offset": index.offset,
        "size": index.size,
        "checksum": np.zeros((0, BYTES), np.uint8) if index.checksum is None else index.checksum,
    }
    write_atomically(path, lambda file: np.savez(file, **arrays))


def _read(path: str | Path | Any) -> tuple[ShardIndex, int]:
    with _PARSING, np.load(path, allow_pickle=False) as saved:
        head = json.loads(_items(saved["head"])[0])
        if head["version"] not in _CHECKSUMS:
            raise ValueError(f"version {head['version']}, expected at most {VERSION}")
        digests = saved[_CHECKSUMS[head["version"]]]
        index = ShardIndex(
            keys=_items(saved["keys"]),
            extensions=_items(saved["extensions"]),
            starts=saved["starts"],
            extension=saved["extension"],
            offset=saved["offset"],
            size=saved["size"],
            tar_bytes=head["bytes"],
            checksum=digests if len(digests) else None,
            damage=[Damage(*d) for d in head["damage"]],
            duplicates=head["duplicates"],
            left_out=[LeftOut(*entry) for entry in head["left_out"]] if "left_out" in head else None,
        )
    return index, head["mtime_ns"]


def load(path: str | Path | Any) -> tuple[ShardIndex, int]:
    """Read a saved index; return (index, mtime of the tar in ns when scanned, 0 if written by the builder). Raises ShardError."""
    try:
        try:
            index, mtime_ns = _read(path)
        except SystemError:  # see _PARSING: caused by another thread, not by the file
            index, mtime_ns = _read(path)
        if len(index.starts) != len(index) + 1 or int(index.starts[-1]) != len(index.offset) or len(index.size) != len(index.offset):
            raise ValueError("its arrays disagree in length")
        if len(index.extension) != len(index.offset):
            raise ValueError("its arrays disagree in length")
        if index.checksum is not None and not (len(index.checksum) == len(index.offset) and known(index.checksum[0].nbytes)):
            raise ValueError("it has no checksum of a known kind for every member")
        ordered = int(index.starts[0]) == 0 and bool((np.diff(index.starts) > 0).all())
        inside = bool((index.offset >= 0).all() and (index.size >= 0).all() and (index.offset <= index.tar_bytes - index.size).all())
        if not ordered or not inside or (index.extension >= len(index.extensions)).any():
            raise ValueError("it names places outside the shard")
    except Exception as error:
        raise ShardError(f"{path}: not a readable shard index ({error}). Delete it, and run `python -m data_prep index`.") from error
    return index, mtime_ns


def index_path(shard: str | Path) -> Path:
    """Return the path of the index of a shard."""
    return Path(f"{shard}{SUFFIX}")


def _check_saved(shard: str, index: ShardIndex, tar_bytes: int) -> None:
    """Raise ShardError for a shard that differs in size from its builder's index: it was cut or changed."""
    if index.tar_bytes == tar_bytes:
        return
    ends = index.offset + index.size
    cut = int((ends > tar_bytes).argmax()) if (ends > tar_bytes).any() else len(ends)
    sample = int(np.searchsorted(index.starts, cut, side="right")) - 1
    where = f"; byte {tar_bytes} falls in or before sample {sample} of {len(index)} ({index.keys[sample]})" if cut < len(ends) else ""
    raise ShardError(
        f"{shard}: {tar_bytes} bytes, but its index says {index.tar_bytes} bytes and {len(index)} samples{where}. Fetch or build the "
        f"shard again; or, to use what is left of it, delete {index_path(shard)} and run `python -m data_prep index`."
    )


_COMPARED: set[str] = set()  # shards whose index of an earlier version was compared with their headers


def _warn_of_links(shard: str, index: ShardIndex) -> None:
    """Log what an index that `data_prep index` of an earlier version wrote does not list."""
    if shard in _COMPARED:
        return
    _COMPARED.add(shard)
    scanned = scan(shard)
    if scanned.left_out or scanned.keys != index.keys or len(scanned.offset) != len(index.offset):
        log.warning(
            "%s: its index lists %d samples and passes over links; the shard holds %d. Run `python -m data_prep index --replace`.",
            shard,
            len(index),
            len(scanned),
        )


def open_index(shard: str | Path, expected: int | None = None, save_new: bool = True, cache: Path | None = None) -> ShardIndex:
    """Open the index of a local shard: a saved one that fits the file, else from a scan.

    Args:
        shard: its path.
        expected: the sample count that a sizes.json states.
        save_new: save a scanned index beside the shard, or in `cache`.
        cache: folder for indexes of shards in read-only folders.

    Raises:
        ShardError: counts or bytes disagree, or the shard is not a tar.
    """
    shard = str(shard)
    try:
        status = os.stat(shard)
    except FileNotFoundError:
        raise ShardError(f"{shard}: no such file. Check the name, and the folder it is relative to.") from None
    places = [index_path(shard)]
    if cache is not None:
        places.append(cache / (hashlib.sha256(os.path.abspath(shard).encode()).hexdigest()[:24] + SUFFIX))
    index = None
    for place in places:
        if not place.exists():
            continue
        saved, mtime_ns = load(place)
        if saved.checksum is not None:
            _check_saved(shard, saved, status.st_size)
            if saved.left_out is None and mtime_ns:
                _warn_of_links(shard, saved)
        elif saved.tar_bytes != status.st_size or mtime_ns != status.st_mtime_ns:
            log.info("%s changed since it was indexed: scanning it again", shard)
            continue
        elif saved.left_out is None:
            continue  # by a version that passed over links
        index = saved
        break
    if index is None:
        index = scan(shard)
        if save_new:
            _save_somewhere(index, places, status.st_mtime_ns)
    if expected is not None and expected != len(index):
        where = f"; it stops at byte {index.damage[0].offset}: {index.damage[0].detail}" if index.damage else f" in {status.st_size} bytes"
        raise ShardError(f"{shard}: {len(index)} samples found, sizes.json says {expected}{where}. Fetch or build the shard again.")
    return index


def _save_somewhere(index: ShardIndex, places: list[Path], mtime_ns: int) -> None:
    """Save an index at the first writable place. Without one, the shard is scanned each time."""
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            save(index, place, mtime_ns)
            return
        except OSError:
            continue
    log.info("no place to save the index of a shard (tried %s): it will be scanned again next time", ", ".join(map(str, places)))


@dataclass
class Grouping:
    """Samples in order of first appearance, with M members; `member`: the index of each in the list of names."""

    keys: list[str]
    extensions: list[str]  # the distinct ones
    starts: np.ndarray  # int64 [S+1] into the members
    extension: np.ndarray  # uint16 or uint32 [M] into `extensions`
    member: np.ndarray  # int64 [M] into the names
    duplicates: int  # repeated keys; each is a sample of its own, with ~2, ~3 ... after the key


def group(names: Sequence[str]) -> Grouping:
    """Group member names to samples. It takes less than a microsecond per name, since shards are indexed when first opened."""
    numbers: dict[str, int] = {}  # extension -> its number
    spelt: dict[str, int] = {}  # extension as spelt in a name, without slashes -> its number
    samples: dict[str, int] = {}  # key -> its number
    of: list[int] = []  # [M] samples
    kinds: list[int] = []  # [M] extensions
    left_out: list[int] = []
    for i, name in enumerate(names):
        key, _, extension = name.partition(".")
        number = spelt.get(extension)
        if number is None or key[-1:] in ("", "/"):
            named = split_name(name)
            if named is None:
                left_out.append(i)
                continue
            key, lower = named
            number = numbers.setdefault(lower, len(numbers))
            if "/" not in extension:
                spelt[extension] = number
        of.append(samples.setdefault(key, len(samples)))
        kinds.append(number)
    sample, kind = np.array(of, np.int64), np.array(kinds, np.int64)
    keys, duplicates = list(samples), 0
    if len(np.unique(sample * max(len(numbers), 1) + kind)) < len(sample):
        keys, sample, duplicates = _apart(keys, of, kinds)
    member = np.delete(np.arange(len(names)), left_out)
    if (np.diff(sample) < 0).any():  # interleaved
        order = np.argsort(sample, kind="stable")
        sample, kind, member = sample[order], kind[order], member[order]
    extensions = sorted(numbers)
    place = np.zeros(
        len(numbers), np.uint16 if len(extensions) <= 1 << 16 else np.uint32
    )  # keys with dots may give every member an extension of its own
    place[[numbers[extension] for extension in extensions]] = np.arange(len(extensions))
    starts = np.concatenate([[0], np.cumsum(np.bincount(sample, minlength=len(keys)))]).astype(np.int64)
    return Grouping(keys, extensions, starts, place[kind], member, duplicates)


def _apart(keys: list[str], of: list[int], kinds: list[int]) -> tuple[list[str], np.ndarray, int]:
    """Begin another sample where one would have a member twice; return (keys, samples [M], number of repeated keys)."""
    current: dict[int, int] = {}
    times = [0] * len(keys)
    named: list[str] = []
    seen: list[set[int]] = []
    samples = np.zeros(len(of), np.int64)
    for i, (key, kind) in enumerate(zip(of, kinds)):
        number = current.get(key)
        if number is None or kind in seen[number]:
            times[key] += 1
            current[key] = number = len(named)
            named.append(keys[key] if times[key] == 1 else f"{keys[key]}~{times[key]}")
            seen.append(set())
        seen[number].add(kind)
        samples[i] = number
    return named, samples, len(named) - len(keys)
