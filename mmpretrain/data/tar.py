"""The headers of a tar over bytes or mmap: members, and the place where it cannot be read on.

Microseconds a member. Read are regular files, with GNU and pax long names; a header counts only if its checksum fits.
"""

from __future__ import annotations

import os
import struct
from typing import Any, NamedTuple

import numpy as np

from mmpretrain.data.schema import BadSample, ShardError

BLOCK = 512
REGULAR = ord("0")
_FIELDS = struct.Struct("B123x11sB20xB")  # of a header: the first byte of its name, the size's octal digits, what ends them, its kind
_ENDS = (0, 32)  # NUL or a space; a further digit makes a number of twelve
_AT_ONCE = 2048  # headers
MAX_NAME_BYTES = 1 << 16  # a longer pax or GNU name record is an attack or corruption


class Stop(NamedTuple):
    """Where the headers end before their time."""

    offset: int
    reason: str  # cut | corrupt_header | zeros
    detail: str


class Headers(NamedTuple):
    """The regular files of a tar, in its order."""

    names: list[str]
    header: np.ndarray  # int64 [M]: where each one's header lies
    offset: np.ndarray  # int64 [M]: and its bytes
    size: np.ndarray  # int64 [M]


NO_HEADERS = Headers([], *np.zeros((3, 0), np.int64))


def _number(digits: bytes) -> int:
    """A tar number: octal text, or base 256 where the first bit is set. Raises ValueError."""
    if digits[0] & 0x80:
        return int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:], "big")
    number = int(digits.strip(b" \0") or b"0", 8)
    if number < 0:  # a walk that goes back never ends
        raise ValueError(f"a negative number, {number}")
    return number


def _pax(payload: bytes) -> dict[bytes, bytes]:
    records, at = {}, 0
    while at < len(payload):
        space = payload.index(b" ", at)
        length = int(payload[at:space])
        if length <= 0:
            raise ValueError("pax record of no length")
        name, _, value = payload[space + 1 : at + length - 1].partition(b"=")
        records[name] = value
        at += length
    return records


class _Walk:
    """Every header's place, by following them: what must be done one by one. `size` is -1 where a header is no member's."""

    def __init__(self, data: Any) -> None:
        self.at: list[int] = []
        self.size: list[int] = []
        self.long_names: dict[int, bytes] = {}  # by position in `at`
        self.stop = self._follow(data)

    def _follow(self, data: Any) -> Stop | None:
        end, at = len(data), 0
        long_name: bytes | None = None
        long_size: int | None = None
        add_place, add_size, fields = self.at.append, self.size.append, _FIELDS.unpack_from
        while True:
            if at + BLOCK > end:
                return _cut(at, end)
            first, octal, after, kind = fields(data, at)
            try:
                size = int(octal, 8)
            except ValueError:
                size = -1
            if kind == REGULAR and first and after in _ENDS and size >= 0 and at + BLOCK + size <= end and long_name is long_size is None:
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
            if kind in b"Lx":  # GNU long name, pax records: they describe the next header
                payload = data[at + BLOCK : at + BLOCK + size]
                try:
                    if size > MAX_NAME_BYTES or len(payload) < size:
                        raise ValueError("a name record beyond the file or of absurd size")
                    if kind == ord("L"):
                        long_name = payload.rstrip(b"\0")
                    else:
                        records = _pax(payload)
                        long_name = records.get(b"path", long_name)
                        long_size = int(records[b"size"]) if b"size" in records else long_size
                        if long_size is not None and long_size < 0:
                            raise ValueError(f"a pax record states {long_size} bytes")
                except ValueError as error:
                    return Stop(at, "corrupt_header", str(error))
            else:
                size = size if long_size is None else long_size
                if kind in b"0\x007":
                    if at + BLOCK + size > end:
                        name = _text(block if long_name is None else long_name, long_name is None)
                        return Stop(at, "cut", f"member {name!r} needs {size} bytes, {max(end - at - BLOCK, 0)} are left")
                    if long_name is not None:
                        self.long_names[len(self.at) - 1] = long_name
                    self.size[-1] = size
                elif kind in b"12345":  # links, devices, folders carry no payload
                    size = 0
                long_name = long_size = None
            at += BLOCK + -(-size // BLOCK) * BLOCK


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
    headers = at
    if len(member := np.flatnonzero(size >= 0)) < len(at):
        names, at, size = [names[i] for i in member.tolist()], at[member], size[member]
    if stop is not None and not len(headers):
        start = bytes(data[:64])
        what = (
            "gzip-compressed, which is not read: unpack it first"
            if start[:2] == b"\x1f\x8b"
            else f"not a tar: it begins with {start[:24]!r}"
        )
        if start.lstrip()[:1] == b"<":
            what = f"a web page rather than a tar: it begins with {start[:24]!r}"
        raise ShardError(f"{name}: {what} ({len(data)} bytes). Fetch or build the shard again.")
    return Headers(names, at, at + BLOCK, size), stop


def read_at(file: int, offset: int, size: int) -> bytes:
    """`size` bytes of an open file. pread rather than mmap: a file cut while it is read gives a short read, not a bus error."""
    parts, at, left = [], offset, size
    while left and (part := os.pread(file, left, at)):
        parts.append(part)
        at, left = at + len(part), left - len(part)
    if left:
        raise BadSample("cut", f"{left} of {size} bytes missing at byte {at}")
    return parts[0] if len(parts) == 1 else b"".join(parts)
