"""The tar reader: members of a tar in bytes or mmap, and the offset from which it cannot be read.

It takes microseconds per member. It reads regular files, with GNU and pax long names; a header counts only if its
checksum matches.
"""

from __future__ import annotations

import os
import struct
from typing import Any, NamedTuple

import numpy as np

from mmpretrain.data.schema import BadSample, ShardError

BLOCK = 512
REGULAR = ord("0")
_FIELDS = struct.Struct("B123x11sB20xB")  # of a header: first byte of the name, octal digits of the size, their terminator, type
_ENDS = (0, 32)  # NUL or a space; a digit there makes a number of twelve digits
_CHUNK = 2048  # headers checked at a time
MAX_NAME_BYTES = 1 << 16  # a longer pax or GNU name record is an attack or corruption


class Stop(NamedTuple):
    """The offset at which the headers end too early."""

    offset: int
    reason: str  # cut | corrupt_header | zeros
    detail: str


class Headers(NamedTuple):
    """The regular files of a tar, in order."""

    names: list[str]
    header: np.ndarray  # int64 [M], offset of each header
    offset: np.ndarray  # int64 [M], offset of each member's bytes
    size: np.ndarray  # int64 [M]


NO_HEADERS = Headers([], *np.zeros((3, 0), np.int64))


def _number(digits: bytes) -> int:
    """Parse a tar number: octal text, or base 256 where the first bit is set. Raises ValueError."""
    if digits[0] & 0x80:
        return int.from_bytes(bytes([digits[0] & 0x7F]) + digits[1:], "big")
    number = int(digits.strip(b" \0") or b"0", 8)
    if number < 0:  # going back would never end
        raise ValueError(f"a negative number, {number}")
    return number


def _pax(payload: bytes) -> dict[bytes, bytes]:
    records, offset = {}, 0
    while offset < len(payload):
        space = payload.index(b" ", offset)
        length = int(payload[offset:space])
        if length <= 0:
            raise ValueError("pax record of no length")
        name, _, value = payload[space + 1 : offset + length - 1].partition(b"=")
        records[name] = value
        offset += length
    return records


class _Walk:
    """The offsets of all headers, found by following them one by one. `size` is -1 for a header that is not of a member."""

    def __init__(self, data: Any) -> None:
        self.offsets: list[int] = []
        self.size: list[int] = []
        self.long_names: dict[int, bytes] = {}  # by index in `offsets`
        self.stop = self._follow(data)

    def _follow(self, data: Any) -> Stop | None:
        end, offset = len(data), 0
        long_name: bytes | None = None
        long_size: int | None = None
        add_offset, add_size, fields = self.offsets.append, self.size.append, _FIELDS.unpack_from
        while True:
            if offset + BLOCK > end:
                return _cut(offset, end)
            first, octal, after, kind = fields(data, offset)
            try:
                size = int(octal, 8)
            except ValueError:
                size = -1
            if (
                kind == REGULAR
                and first
                and after in _ENDS
                and size >= 0
                and offset + BLOCK + size <= end
                and long_name is long_size is None
            ):
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
            if kind in b"Lx":  # GNU long name, pax records: they describe the next header
                payload = data[offset + BLOCK : offset + BLOCK + size]
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
                    return Stop(offset, "corrupt_header", str(error))
            else:
                size = size if long_size is None else long_size
                if kind in b"0\x007":
                    if offset + BLOCK + size > end:
                        name = _text(block if long_name is None else long_name, long_name is None)
                        return Stop(offset, "cut", f"member {name!r} needs {size} bytes, {max(end - offset - BLOCK, 0)} are left")
                    if long_name is not None:
                        self.long_names[len(self.offsets) - 1] = long_name
                    self.size[-1] = size
                elif kind in b"12345":  # links, devices, folders carry no payload
                    size = 0
                long_name = long_size = None
            offset += BLOCK + -(-size // BLOCK) * BLOCK


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
    for position, raw in walk.long_names.items():
        if position < len(names):
            names[position] = _text(raw, False)
    headers = offsets
    if len(member := np.flatnonzero(size >= 0)) < len(offsets):
        names, offsets, size = [names[i] for i in member.tolist()], offsets[member], size[member]
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
    return Headers(names, offsets, offsets + BLOCK, size), stop


def read_at(file: int, offset: int, size: int) -> bytes:
    """Read `size` bytes of an open file. With pread, a file truncated meanwhile gives a short read, where mmap gives a bus error."""
    parts, left = [], size
    while left and (part := os.pread(file, left, offset)):
        parts.append(part)
        offset, left = offset + len(part), left - len(part)
    if left:
        raise BadSample("cut", f"{left} of {size} bytes missing at byte {offset}")
    return parts[0] if len(parts) == 1 else b"".join(parts)
