"""The headers of a tar over bytes or mmap: members, and the place where it cannot be read on.

Microseconds a member. Read are regular files, with GNU and pax long names, and hard and symbolic links to them; a header counts only if its
checksum fits. Folders hold no bytes and are passed over; every other member is listed with the reason why it cannot be read.
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
_FIELDS = struct.Struct("B123x11sB20xB")  # of a header: the first byte of its name, the size's octal digits, what ends them, its kind
_ENDS = (0, 32)  # NUL or a space; a further digit makes a number of twelve
_AT_ONCE = 2048  # headers
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
    """Where the headers end before their time."""

    offset: int
    reason: str  # cut | corrupt_header | zeros
    detail: str


class Unread(NamedTuple):
    """A member whose bytes cannot be read."""

    name: str
    header: int  # where its header lies
    reason: str  # dangling_link | link_to_folder | special_member | sparse_member
    detail: str


class Headers(NamedTuple):
    """The regular files of a tar and the links to them, in its order."""

    names: list[str]
    header: np.ndarray  # int64 [M]: where each one's header lies
    offset: np.ndarray  # int64 [M]: and its bytes, which are those of the file that a link leads to
    size: np.ndarray  # int64 [M]
    unread: list[Unread]


_NONE = np.zeros(0, np.int64)
NO_HEADERS = Headers([], _NONE, _NONE, _NONE, [])


def _number(digits: bytes) -> int:
    """A tar number: octal text, or base 256 where the first bit is set. Raises ValueError."""
    if digits[0] & 0x80:
        return int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:], "big")
    number = int(digits.strip(b" \0") or b"0", 8)
    if number < 0:  # a walk that goes back never ends
        raise ValueError(f"a negative number, {number}")
    return number


def _pax(payload: bytes) -> dict[bytes, bytes]:
    """The records of a pax header that say what the next member is; those of GNU sparse files as well. Raises ValueError."""
    records, at = {}, 0
    while at < len(payload):
        space = payload.index(b" ", at, at + 20)
        length = int(payload[at:space])
        if length <= 0 or at + length > len(payload):
            raise ValueError(f"a pax record of {length} bytes")
        if payload.startswith((*_PAX_WANTED, b"GNU.sparse."), space + 1):
            name, _, value = payload[space + 1 : at + length - 1].partition(b"=")
            if len(value) > MAX_NAME_BYTES:
                raise ValueError(f"the pax record {name.decode('ascii', 'replace')} has {len(value)} bytes")
            records[name] = value
        at += length
    return records


@dataclass
class _Pending:
    """What records before a header say of its member."""

    name: bytes | None = None
    link: bytes | None = None
    size: int | None = None
    sparse: bool = False

    def add(self, kind: int, payload: bytes) -> None:
        """Raises ValueError."""
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
    """Every header's place, by following them: what must be done one by one. `size` is -1 where a header is not that of a file."""

    def __init__(self, data: Any) -> None:
        self.at: list[int] = []
        self.size: list[int] = []
        self.long_names: dict[int, bytes] = {}  # by position in `at`
        self.links: dict[int, tuple[bool, bytes]] = {}  # by position: whether it is symbolic, and what it leads to
        self.folders: list[int] = []  # positions
        self.unread: dict[int, tuple[str, str]] = {}  # by position: the reason, and the detail
        self.stop = self._follow(data)

    def _follow(self, data: Any) -> Stop | None:
        end, at = len(data), 0
        pending: _Pending | None = None
        add_place, add_size, fields = self.at.append, self.size.append, _FIELDS.unpack_from
        while True:
            if at + BLOCK > end:
                return _cut(at, end)
            first, octal, after, kind = fields(data, at)
            try:
                size = int(octal, 8)
            except ValueError:
                size = -1
            if kind == REGULAR and first and after in _ENDS and size >= 0 and at + BLOCK + size <= end and pending is None:
                add_place(at)
                add_size(size)
                at += BLOCK + (size + BLOCK - 1 & -BLOCK)
                continue
            block = data[at : at + BLOCK]
            if first == 0 and not any(block):
                return _after_zeros(data, at)
            try:
                size = _number(block[124:136])
            except ValueError:
                return Stop(at, "corrupt_header", f"the size field holds {block[124:136]!r}")
            add_place(at)
            add_size(-1)
            if kind in b"LKxX":  # GNU long names, pax records: they describe the next header
                payload = data[at + BLOCK : at + BLOCK + size]
                pending = pending or _Pending()
                try:
                    if len(payload) < size:
                        raise ValueError("a name record beyond the file")
                    pending.add(kind, payload)
                except ValueError as error:
                    return Stop(at, "corrupt_header", str(error))
            elif kind != ord("g"):  # pax records of all members that follow: none says what a member is
                described, pending = pending or _Pending(), None
                size = size if described.size is None else described.size
                if described.name is not None:
                    self.long_names[len(self.at) - 1] = described.name
                if kind == ord("1") and size and not _is_header(data, at + BLOCK):
                    kind = REGULAR  # pax may store a hard link's bytes again
                if kind in b"12345":  # links, devices, folders carry no payload
                    size = 0
                if kind in b"0\x007" and at + BLOCK + size > end:
                    name = _text(block if described.name is None else described.name, described.name is None)
                    return Stop(at, "cut", f"member {name!r} needs {size} bytes, {max(end - at - BLOCK, 0)} are left")
                self._member(len(self.at) - 1, kind, size, described, block)
                if kind == ord("S"):  # its map goes on in blocks before the data
                    more = at + BLOCK if block[482] else end
                    while more + BLOCK <= end:
                        at, more = more, more + BLOCK if data[more + 504] else end
            at += BLOCK + -(-size // BLOCK) * BLOCK

    def _member(self, position: int, kind: int, size: int, described: _Pending, block: bytes) -> None:
        """Note what a header's member is."""
        if kind in b"0\x007" and not described.sparse:
            self.size[position] = size
        elif kind in b"12":
            link = block[157:257].split(b"\0", 1)[0] if described.link is None else described.link
            self.links[position] = kind == ord("2"), link
        elif kind in b"5D":
            self.folders.append(position)
        elif kind == ord("S") or described.sparse:
            detail = "a GNU sparse file, which is stored in pieces; write the tar without --sparse"
            self.unread[position] = "sparse_member", detail
        elif kind not in b"V":  # a volume's label
            what = _SPECIAL.get(kind, f"a member of the unknown type {chr(kind)!r}")
            self.unread[position] = "special_member", f"{what}, expected a file"


def _is_header(data: Any, at: int) -> bool:
    """Whether a header, or the zeros that end a tar, begin at a place."""
    block = np.frombuffer(data[at : at + BLOCK], np.uint8)
    return len(block) == BLOCK and (not block.any() or _wrong_checksum(block[None]) is None)


@dataclass
class _Tree:
    """The paths in a tar, for following links."""

    files: dict[str, list[int]] = field(default_factory=dict)  # path -> positions of its headers
    links: dict[str, tuple[bool, str]] = field(default_factory=dict)  # path -> whether it is symbolic, and what it leads to
    folders: set[str] = field(default_factory=set)

    def add_folders(self, path: str) -> None:
        while path and path not in self.folders:
            self.folders.add(path)
            path = posixpath.dirname(path)

    def follow(self, position: int, name: str, symbolic: bool, target: str) -> int | tuple[str, str]:
        """The position of the file that a link leads to, or (reason, detail) where it leads to none."""
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
            earlier = bisect(self.files[path], position)  # where a path comes twice, the last one before the link
            return self.files[path][earlier - 1 if earlier else -1]
        if path in self.folders or not path:
            return "link_to_folder", f"{arrow}, a folder; its files are read where they lie"
        return "dangling_link", f"{arrow}, which is not in the tar"


def _parts(path: str) -> list[str]:
    """A member's path as the folders and the file that it names."""
    normal = posixpath.normpath(path).strip("/") if path else ""
    return [part for part in normal.split("/") if part not in ("", ".")]


def _resolve(walk: _Walk, names: list[str], size: np.ndarray) -> tuple[dict[int, int], list[tuple[int, str, str]]]:
    """Where links lead: (position of a link -> that of its file, [(position, reason, detail)] of those that lead to none)."""
    links = {position: link for position, link in walk.links.items() if position < len(names)}
    tree, targets, unread = _Tree(), {}, []
    if not links:
        return targets, unread
    for position in np.flatnonzero(size >= 0).tolist():
        path = "/".join(_parts(names[position]))
        tree.files.setdefault(path, []).append(position)
        tree.add_folders(posixpath.dirname(path))
    for position in walk.folders:
        if position < len(names):
            tree.add_folders("/".join(_parts(names[position])))
    as_text = {position: (symbolic, link.decode("utf-8", "surrogateescape")) for position, (symbolic, link) in links.items()}
    paths = {position: "/".join(_parts(names[position])) for position in as_text}
    tree.links.update((paths[position], link) for position, link in as_text.items())
    for path, (symbolic, target) in tree.links.items():
        other = "/".join(_parts(target))
        if not symbolic and other not in tree.files and tree.links.get(other, (False,))[0]:
            tree.links[path] = tree.links[other]  # a hard link to a symbolic one is that link, in its own folder
    for position, path in paths.items():
        symbolic, target = as_text[position] if as_text[position][0] else tree.links[path]
        leads = tree.follow(position, path, symbolic, target)
        if isinstance(leads, int):
            targets[position] = leads
        else:
            unread.append((position, *leads))
    return targets, unread


def _cut(at: int, end: int) -> Stop:
    where = (
        "at a header: the end-of-archive mark is missing" if at == end else "inside a header" if at < end else "inside a member's padding"
    )
    return Stop(min(at, end), "cut", f"the file ends at byte {end}, {where}")


def _after_zeros(data: Any, at: int) -> Stop | None:
    """A zero block ends a tar: nothing but zeros may follow."""
    rest = np.frombuffer(data, np.uint8, offset=at)
    for start in range(0, len(rest), 1 << 22):
        nonzero = rest[start : start + (1 << 22)]
        if nonzero.any():
            follow = at + start + int((nonzero != 0).argmax())
            return Stop(at, "zeros", f"zero blocks before the end; data goes on at byte {follow}")
    return None


def _text(raw: bytes, is_block: bool) -> str:
    """A member's name from its header, where ustar may keep the folders apart, or from a record of its own."""
    name = (raw[:100] if is_block else raw).split(b"\0", 1)[0]
    if is_block and raw[345] and raw[257:263] == b"ustar\0":
        name = raw[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _wrong_checksum(blocks: np.ndarray) -> int | None:
    """The first of the headers, uint8 [n, 512], whose checksum is wrong."""
    digits = blocks[:, 148:156] - np.uint8(ord("0"))  # six octal digits and two of NUL or space, as nearly all write it
    usual = (digits[:, :6] < 8).all(1) & ((digits[:, 6:] == 256 - 48) | (digits[:, 6:] == 256 - 16)).all(1)
    stated = digits[:, :6].astype(np.int64) @ (8 ** np.arange(5, -1, -1))
    for row in np.flatnonzero(~usual):
        try:
            stated[row] = _number(blocks[row, 148:156].tobytes())
        except ValueError:
            stated[row] = -1
    spaces = 8 * 32 - blocks[:, 148:156].sum(1, dtype=np.int64)  # the sum is taken with spaces in its own field
    wrong = np.flatnonzero(stated != blocks.sum(1, dtype=np.uint32) + spaces)
    for row in wrong.tolist():
        block = blocks[row].copy()
        block[148:156] = 32
        if stated[row] != block.view(np.int8).sum(dtype=np.int64):  # historic tars add signed bytes
            return row
    return None


def _names(blocks: np.ndarray) -> list[str]:
    """Of headers, uint8 [n, 512]."""
    raw = np.ascontiguousarray(blocks[:, :100]).view("S100").ravel().tolist()
    joined = b"\0".join(raw)
    if joined.count(b"\0") != len(raw) - 1 or blocks[:, 345].any():  # a NUL within a name, or folders that are kept apart
        return [_text(block.tobytes(), True) for block in blocks]
    return joined.decode("utf-8", "surrogateescape").split("\0")


def read_headers(data: Any, name: str) -> tuple[Headers, Stop | None]:
    """The members of a tar, bytes or mmap, up to where it can be read. Raises ShardError where it is no tar at all."""
    if len(data) == 0:
        raise ShardError(f"{name}: zero bytes, expected a tar. Fetch or build the shard again.")
    walk = _Walk(data)
    stop, names = walk.stop, []
    at, size = np.array(walk.at, np.int64), np.array(walk.size, np.int64)
    rows = np.frombuffer(data, np.uint8, len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
    for start in range(0, len(at), _AT_ONCE):
        blocks = rows[at[start : start + _AT_ONCE] // BLOCK]  # [n, 512]
        bad = _wrong_checksum(blocks)
        if bad is not None:
            stop = Stop(int(at[start + bad]), "corrupt_header", "the header's checksum does not match its bytes")
            at, size, blocks = at[: start + bad], size[: start + bad], blocks[:bad]
        names += _names(blocks)
        if bad is not None:
            break
    for position, raw in walk.long_names.items():
        if position < len(names):
            names[position] = _text(raw, False)
    headers, offset = at, at + BLOCK
    targets, dangling = _resolve(walk, names, size)
    for position, target in targets.items():
        offset[position], size[position] = offset[target], size[target]
    unread = sorted(dangling + [(position, *why) for position, why in walk.unread.items() if position < len(names)])
    left = [Unread(names[position], int(at[position]), reason, detail) for position, reason, detail in unread]
    if len(member := np.flatnonzero(size >= 0)) < len(at):
        names, at, offset, size = [names[i] for i in member.tolist()], at[member], offset[member], size[member]
    if stop is not None and not len(headers):
        start = bytes(data[:512])
        noun, remedy = foreign_kind(start) or ("", "")
        what = f"{noun} rather than a tar" if noun else "not a tar"
        remedy = remedy or "Fetch or build the shard again."
        raise ShardError(f"{name}: {what}: it begins with {start[:24]!r} ({len(data)} bytes). {remedy}")
    return Headers(names, at, offset, size, left), stop


def read_at(file: int, offset: int, size: int) -> bytes:
    """`size` bytes of an open file. pread rather than mmap: a file cut while it is read gives a short read, not a bus error."""
    parts, at, left = [], offset, size
    while left and (part := os.pread(file, left, at)):
        parts.append(part)
        at, left = at + len(part), left - len(part)
    if left:
        raise BadSample("cut", f"{left} of {size} bytes missing at byte {at}")
    return parts[0] if len(parts) == 1 else b"".join(parts)
