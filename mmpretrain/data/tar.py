"""The tar reader: members of a tar in bytes or mmap, and the offset from which it cannot be read.

It takes microseconds per member. It reads regular files, with GNU and pax long names, and hard and symbolic links to
them; a header counts only if its checksum matches. Folders hold no bytes and are passed over; every other member is
listed with the reason why it cannot be read.
"""

from __future__ import annotations

import os
import posixpath
import struct
from bisect import bisect
from collections import deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mmpretrain.data.formats import foreign_kind
from mmpretrain.data.schema import BadSample, ShardError

BLOCK = 512
REGULAR = ord("0")
_FIELDS = struct.Struct("B123x11sB20xB")  # of a header: first byte of the name, octal digits of the size, their terminator, type
_ENDS = (0, 32)  # NUL or a space; a digit there makes a number of twelve digits
_CHUNK = 2048  # headers checked at a time
MAX_NAME_BYTES = 1 << 16  # a longer name is an attack or corruption; other pax records may be of any size
MAX_STEPS = 1000  # folders and links that a link leads through
_PAX_WANTED = (b"path", b"linkpath", b"size")
_SPECIAL = {
    ord("3"): "a character device",
    ord("4"): "a block device",
    ord("6"): "a FIFO",
    ord("M"): "the continuation of a file from another volume",
}


class Stop(NamedTuple):
    """The offset at which the headers end too early."""

    offset: int
    reason: str  # cut | corrupt_header | zeros
    detail: str


class Unread(NamedTuple):
    """A member whose bytes cannot be read."""

    name: str
    header: int  # offset of its header
    reason: str  # dangling_link | link_to_folder | special_member | sparse_member
    detail: str


class Headers(NamedTuple):
    """The regular files of a tar and the links to them, in order."""

    names: list[str]
    header: np.ndarray  # int64 [M], offset of each header
    offset: np.ndarray  # int64 [M], offset of each member's bytes: for a link, those of the file that it leads to
    size: np.ndarray  # int64 [M]
    unread: list[Unread]


_NONE = np.zeros(0, np.int64)
NO_HEADERS = Headers([], _NONE, _NONE, _NONE, [])


def _number(digits: bytes) -> int:
    """Parse a tar number: octal text, or base 256 where the first bit is set. Raises ValueError."""
    if digits[0] & 0x80:
        return int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:], "big")
    number = int(digits.strip(b" \0") or b"0", 8)
    if number < 0:  # going back would never end
        raise ValueError(f"a negative number, {number}")
    return number


def _pax(payload: bytes) -> dict[bytes, bytes]:
    """Read the records of a pax header that describe the next member, with those of GNU sparse files. Raises ValueError."""
    records, offset = {}, 0
    while offset < len(payload):
        space = payload.index(b" ", offset, offset + 20)
        length = int(payload[offset:space])
        if length <= 0 or offset + length > len(payload):
            raise ValueError(f"a pax record of {length} bytes")
        if payload.startswith((*_PAX_WANTED, b"GNU.sparse."), space + 1):
            name, _, value = payload[space + 1 : offset + length - 1].partition(b"=")
            if len(value) > MAX_NAME_BYTES:
                raise ValueError(f"the pax record {name.decode('ascii', 'replace')} has {len(value)} bytes")
            records[name] = value
        offset += length
    return records


@dataclass
class _Pending:
    """What the records before a header state about its member."""

    name: bytes | None = None
    link: bytes | None = None
    size: int | None = None
    sparse: bool = False

    def add(self, kind: int, payload: bytes) -> None:
        """Read one record. Raises ValueError."""
        if kind in b"LK":
            if len(payload) > MAX_NAME_BYTES:
                raise ValueError(f"a name of {len(payload)} bytes")
            text = payload.split(b"\0", 1)[0]
            self.name, self.link = (text, self.link) if kind == ord("L") else (self.name, text)
            return
        records = _pax(payload)
        self.name = records.get(b"GNU.sparse.name", records.get(b"path", self.name))
        self.link = records.get(b"linkpath", self.link)
        self.sparse = self.sparse or any(name.startswith(b"GNU.sparse.") for name in records)
        if b"size" in records:
            self.size = int(records[b"size"])
            if self.size < 0:
                raise ValueError(f"a pax record states {self.size} bytes")


class _Walk:
    """The offsets of all headers, found by following them one by one. `size` is -1 for a header that is not of a file."""

    def __init__(self, data: Any) -> None:
        self.offsets: list[int] = []
        self.size: list[int] = []
        self.long_names: dict[int, bytes] = {}  # by index in `offsets`
        self.links: dict[int, tuple[bool, bytes]] = {}  # by index: whether it is symbolic, and its target
        self.folders: list[int] = []  # indices
        self.unread: dict[int, tuple[str, str]] = {}  # by index: the reason, and the detail
        self.stop = self._follow(data)

    def _follow(self, data: Any) -> Stop | None:
        end, offset = len(data), 0
        pending: _Pending | None = None
        add_offset, add_size, fields = self.offsets.append, self.size.append, _FIELDS.unpack_from
        while True:
            if offset + BLOCK > end:
                return _cut(offset, end)
            first, octal, after, kind = fields(data, offset)
            try:
                size = int(octal, 8)
            except ValueError:
                size = -1
            if kind == REGULAR and first and after in _ENDS and size >= 0 and offset + BLOCK + size <= end and pending is None:
                add_offset(offset)
                add_size(size)
                offset += BLOCK + (size + BLOCK - 1 & -BLOCK)
                continue
            block = data[offset : offset + BLOCK]
            if first == 0 and not any(block):
                return _after_zeros(data, offset)
            try:
                size = _number(block[124:136])
            except ValueError:
                return Stop(offset, "corrupt_header", f"the size field holds {block[124:136]!r}")
            add_offset(offset)
            add_size(-1)
            if kind in b"LKxX":  # GNU long names, pax records: they describe the next header
                payload = data[offset + BLOCK : offset + BLOCK + size]
                pending = pending or _Pending()
                try:
                    if len(payload) < size:
                        raise ValueError("a name record beyond the file")
                    pending.add(kind, payload)
                except ValueError as error:
                    return Stop(offset, "corrupt_header", str(error))
            elif kind != ord("g"):  # pax records of all members that follow: none states what a member is
                described, pending = pending or _Pending(), None
                size = size if described.size is None else described.size
                if described.name is not None:
                    self.long_names[len(self.offsets) - 1] = described.name
                if kind == ord("1") and size and not _is_header(data, offset + BLOCK):
                    kind = REGULAR  # pax may store a hard link's bytes again
                if kind in b"12345":  # links, devices, folders carry no payload
                    size = 0
                if kind in b"0\x007" and offset + BLOCK + size > end:
                    name = _text(block if described.name is None else described.name, described.name is None)
                    return Stop(offset, "cut", f"member {name!r} needs {size} bytes, {max(end - offset - BLOCK, 0)} are left")
                self._member(len(self.offsets) - 1, kind, size, described, block)
                if kind == ord("S"):  # its map goes on in blocks before the data
                    more = offset + BLOCK if block[482] else end
                    while more + BLOCK <= end:
                        offset, more = more, more + BLOCK if data[more + 504] else end
            offset += BLOCK + -(-size // BLOCK) * BLOCK

    def _member(self, index: int, kind: int, size: int, described: _Pending, block: bytes) -> None:
        """Record what a header's member is."""
        if kind in b"0\x007" and not described.sparse:
            self.size[index] = size
        elif kind in b"12":
            link = block[157:257].split(b"\0", 1)[0] if described.link is None else described.link
            self.links[index] = kind == ord("2"), link
        elif kind in b"5D":
            self.folders.append(index)
        elif kind == ord("S") or described.sparse:
            detail = "a GNU sparse file, which is stored in pieces; write the tar without --sparse"
            self.unread[index] = "sparse_member", detail
        elif kind not in b"V":  # a volume's label
            what = _SPECIAL.get(kind, f"a member of the unknown type {chr(kind)!r}")
            self.unread[index] = "special_member", f"{what}, expected a file"


def _is_header(data: Any, offset: int) -> bool:
    """Return whether a header, or the zeros that end a tar, begin at an offset."""
    block = np.frombuffer(data[offset : offset + BLOCK], np.uint8)
    return len(block) == BLOCK and (not block.any() or _wrong_checksum(block[None]) is None)


@dataclass
class _Tree:
    """The paths in a tar, for following links."""

    files: dict[str, list[int]] = field(default_factory=dict)  # path -> indices of its headers
    links: dict[str, tuple[bool, str]] = field(default_factory=dict)  # path -> whether it is symbolic, and what it leads to
    folders: set[str] = field(default_factory=set)

    def add_folders(self, path: str) -> None:
        while path and path not in self.folders:
            self.folders.add(path)
            path = posixpath.dirname(path)

    def follow(self, index: int, name: str, symbolic: bool, target: str) -> int | tuple[str, str]:
        """Return the index of the file that a link leads to, or (reason, detail) where it leads to none."""
        arrow = f"a {'symbolic' if symbolic else 'hard'} link to {target!r}"
        done: list[str] = _parts(posixpath.dirname(name)) if symbolic else []
        todo, steps = deque(target.split("/")), 0
        if symbolic and target.startswith("/"):
            return "dangling_link", f"{arrow}, which lies outside the tar"
        while todo:
            steps += 1
            if steps > MAX_STEPS:
                return "dangling_link", f"{arrow[:200]}, which leads in a circle"
            part = todo.popleft()
            if part in ("", "."):
                continue
            if part == "..":
                if not done:
                    return "dangling_link", f"{arrow}, which lies outside the tar"
                done.pop()
                continue
            done.append(part)
            path = "/".join(done)
            if path in self.links and not (path in self.files and not todo):
                is_symbolic, further = self.links[path]
                if is_symbolic and further.startswith("/"):
                    return "dangling_link", f"{arrow}, which leads to {further!r} outside the tar"
                done = done[:-1] if is_symbolic else []
                todo.extendleft(reversed(further.split("/")))
        path = "/".join(done)
        if path in self.files:
            earlier = bisect(self.files[path], index)  # where a path comes twice, the last one before the link
            return self.files[path][earlier - 1 if earlier else -1]
        if path in self.folders or not path:
            return "link_to_folder", f"{arrow}, a folder; its files are read where they lie"
        return "dangling_link", f"{arrow}, which is not in the tar"


def _parts(path: str) -> list[str]:
    """Split a member's path into the folders and the file that it names."""
    normal = posixpath.normpath(path).strip("/") if path else ""
    return [part for part in normal.split("/") if part not in ("", ".")]


def _resolve(walk: _Walk, names: list[str], size: np.ndarray) -> tuple[dict[int, int], list[tuple[int, str, str]]]:
    """Follow the links: (index of a link -> index of its file, [(index, reason, detail)] of links that lead to none)."""
    links = {index: link for index, link in walk.links.items() if index < len(names)}
    tree, targets, unread = _Tree(), {}, []
    if not links:
        return targets, unread
    for index in np.flatnonzero(size >= 0).tolist():
        path = "/".join(_parts(names[index]))
        tree.files.setdefault(path, []).append(index)
        tree.add_folders(posixpath.dirname(path))
    for index in walk.folders:
        if index < len(names):
            tree.add_folders("/".join(_parts(names[index])))
    as_text = {index: (symbolic, link.decode("utf-8", "surrogateescape")) for index, (symbolic, link) in links.items()}
    paths = {index: "/".join(_parts(names[index])) for index in as_text}
    tree.links.update((paths[index], link) for index, link in as_text.items())
    for path, (symbolic, target) in tree.links.items():
        other = "/".join(_parts(target))
        if not symbolic and other not in tree.files and tree.links.get(other, (False,))[0]:
            tree.links[path] = tree.links[other]  # a hard link to a symbolic one is that link, in its own folder
    for index, path in paths.items():
        symbolic, target = as_text[index] if as_text[index][0] else tree.links[path]
        leads = tree.follow(index, path, symbolic, target)
        if isinstance(leads, int):
            targets[index] = leads
        else:
            unread.append((index, *leads))
    return targets, unread


def _cut(offset: int, end: int) -> Stop:
    if offset == end:
        where = "at a header: the end-of-archive mark is missing"
    else:
        where = "inside a header" if offset < end else "inside a member's padding"
    return Stop(min(offset, end), "cut", f"the file ends at byte {end}, {where}")


def _after_zeros(data: Any, offset: int) -> Stop | None:
    """Check that only zeros follow a zero block, which ends a tar."""
    rest = np.frombuffer(data, np.uint8, offset=offset)
    for start in range(0, len(rest), 1 << 22):
        nonzero = rest[start : start + (1 << 22)]
        if nonzero.any():
            follow = offset + start + int((nonzero != 0).argmax())
            return Stop(offset, "zeros", f"zero blocks before the end; data continues at byte {follow}")
    return None


def _text(raw: bytes, is_block: bool) -> str:
    """Decode a member's name from its header, where ustar may store folders separately, or from a long-name record."""
    name = (raw[:100] if is_block else raw).split(b"\0", 1)[0]
    if is_block and raw[345] and raw[257:263] == b"ustar\0":
        name = raw[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _wrong_checksum(blocks: np.ndarray) -> int | None:
    """Return the index of the first header, uint8 [n, 512], whose checksum is wrong."""
    digits = blocks[:, 148:156] - np.uint8(ord("0"))  # six octal digits and two of NUL or space, as most writers do
    usual = (digits[:, :6] < 8).all(1) & ((digits[:, 6:] == 256 - 48) | (digits[:, 6:] == 256 - 16)).all(1)
    stated = digits[:, :6].astype(np.int64) @ (8 ** np.arange(5, -1, -1))
    for row in np.flatnonzero(~usual):
        try:
            stated[row] = _number(blocks[row, 148:156].tobytes())
        except ValueError:
            stated[row] = -1
    spaces = 8 * 32 - blocks[:, 148:156].sum(1, dtype=np.int64)  # the checksum counts its own field as spaces
    wrong = np.flatnonzero(stated != blocks.sum(1, dtype=np.uint32) + spaces)
    for row in wrong.tolist():
        block = blocks[row].copy()
        block[148:156] = 32
        if stated[row] != block.view(np.int8).sum(dtype=np.int64):  # historic tars add signed bytes
            return row
    return None


def _names(blocks: np.ndarray) -> list[str]:
    """Decode the names in headers, uint8 [n, 512]."""
    raw = np.ascontiguousarray(blocks[:, :100]).view("S100").ravel().tolist()
    joined = b"\0".join(raw)
    if joined.count(b"\0") != len(raw) - 1 or blocks[:, 345].any():  # a NUL within a name, or folders stored separately
        return [_text(block.tobytes(), True) for block in blocks]
    return joined.decode("utf-8", "surrogateescape").split("\0")


def read_headers(data: Any, name: str) -> tuple[Headers, Stop | None]:
    """Read the members of a tar, bytes or mmap, as far as it can be read. Raises ShardError where it is not a tar."""
    if len(data) == 0:
        raise ShardError(f"{name}: zero bytes, expected a tar. Fetch or build the shard again.")
    walk = _Walk(data)
    stop, names = walk.stop, []
    offsets, size = np.array(walk.offsets, np.int64), np.array(walk.size, np.int64)
    rows = np.frombuffer(data, np.uint8, len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
    for start in range(0, len(offsets), _CHUNK):
        blocks = rows[offsets[start : start + _CHUNK] // BLOCK]  # [n, 512]
        bad = _wrong_checksum(blocks)
        if bad is not None:
            stop = Stop(int(offsets[start + bad]), "corrupt_header", "the header's checksum does not match its bytes")
            offsets, size, blocks = offsets[: start + bad], size[: start + bad], blocks[:bad]
        names += _names(blocks)
        if bad is not None:
            break
    for index, raw in walk.long_names.items():
        if index < len(names):
            names[index] = _text(raw, False)
    headers, offset = offsets, offsets + BLOCK
    targets, dangling = _resolve(walk, names, size)
    for index, target in targets.items():
        offset[index], size[index] = offset[target], size[target]
    unread = sorted(dangling + [(index, *why) for index, why in walk.unread.items() if index < len(names)])
    left = [Unread(names[index], int(offsets[index]), reason, detail) for index, reason, detail in unread]
    if len(member := np.flatnonzero(size >= 0)) < len(offsets):
        names, offsets, offset, size = [names[i] for i in member.tolist()], offsets[member], offset[member], size[member]
    if stop is not None and not len(headers):
        start = bytes(data[:512])
        noun, remedy = foreign_kind(start) or ("", "")
        what = f"{noun} rather than a tar" if noun else "not a tar"
        remedy = remedy or "Fetch or build the shard again."
        raise ShardError(f"{name}: {what}: it begins with {start[:24]!r} ({len(data)} bytes). {remedy}")
    return Headers(names, offsets, offset, size, left), stop


def read_at(file: int, offset: int, size: int) -> bytes:
    """Read `size` bytes of an open file. With pread, a file truncated meanwhile gives a short read, where mmap gives a bus error."""
    parts, left = [], size
    while left and (part := os.pread(file, left, offset)):
        parts.append(part)
        offset, left = offset + len(part), left - len(part)
    if left:
        raise BadSample("cut", f"{left} of {size} bytes missing at byte {offset}")
    return parts[0] if len(parts) == 1 else b"".join(parts)
