"""The headers of a tar over bytes or mmap: members, and the place where it cannot be read on.

Microseconds a member. Read are regular files, with GNU and pax long names; a header counts only if its checksum fits.
"""

from __future__ import annotations

import mmap
import os
from typing import Any, NamedTuple

import numpy as np

from mmpretrain.data.schema import BadSample, ShardError

BLOCK = 512
MAX_NAME_BYTES = 1 << 16  # a longer pax or GNU name record is an attack or corruption


class Stop(NamedTuple):
    """Where the headers end before their time."""

    offset: int
    reason: str  # cut | corrupt_header | zeros
    detail: str


class Entry(NamedTuple):
    name: str
    header: int
    offset: int
    size: int


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


def _walk(data: mmap.mmap | bytes) -> tuple[list[Entry], list[int], Stop | None]:
    """Follow the headers. Gives entries, every header's offset, and (offset, reason, detail) where it had to stop early."""
    end, at = len(data), 0
    entries: list[Entry] = []
    headers: list[int] = []
    long_name: bytes | None = None
    long_size: int | None = None
    while True:
        if at + BLOCK > end:
            where = (
                "at a header: the end-of-archive mark is missing"
                if at == end
                else "inside a header"
                if at < end
                else "inside a member's padding"
            )
            return entries, headers, Stop(min(at, end), "cut", f"the file ends at byte {end}, {where}")
        block = data[at : at + BLOCK]
        if block[0] == 0 and not any(block):
            rest = np.frombuffer(data, np.uint8, offset=at)
            for start in range(0, len(rest), 1 << 22):
                nonzero = rest[start : start + (1 << 22)]
                if nonzero.any():
                    follow = at + start + int(nonzero.argmax() if nonzero[0] else (nonzero != 0).argmax())
                    return entries, headers, Stop(at, "zeros", f"zero blocks before the end; data goes on at byte {follow}")
            return entries, headers, None
        kind = block[156]
        try:
            size = _number(block[124:136])
        except ValueError:
            return entries, headers, Stop(at, "corrupt_header", f"the size field holds {block[124:136]!r}")
        headers.append(at)
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
                return entries, headers, Stop(at, "corrupt_header", str(error))
        else:
            size = size if long_size is None else long_size
            if kind in b"0\x007":
                raw = block[:100].split(b"\0", 1)[0]
                if long_name is not None:
                    raw = long_name.split(b"\0", 1)[0]
                elif block[345] and block[257:263] == b"ustar\0":
                    raw = block[345:500].split(b"\0", 1)[0] + b"/" + raw
                name = raw.decode("utf-8", "surrogateescape")
                if at + BLOCK + size > end:
                    found = max(end - at - BLOCK, 0)
                    return entries, headers, Stop(at, "cut", f"member {name!r} needs {size} bytes, {found} are left")
                entries.append(Entry(name, at, at + BLOCK, size))
            elif kind in b"12345":  # links, devices, folders carry no payload
                size = size if at + BLOCK + size <= end and kind not in b"12345" else 0
            long_name = long_size = None
        at += BLOCK + -(-size // BLOCK) * BLOCK


def _first_bad_checksum(data: Any, headers: list[int]) -> int | None:
    """The first header whose checksum is wrong: its position in `headers`."""
    raw = np.frombuffer(data, np.uint8)
    for start in range(0, len(headers), 4096):
        at = np.asarray(headers[start : start + 4096], np.int64)
        blocks = raw[at[:, None] + np.arange(BLOCK)]  # [n, 512]
        stated = np.full(len(at), -1, np.int64)
        for row, digits in enumerate(blocks[:, 148:156]):
            try:
                stated[row] = _number(digits.tobytes())
            except ValueError:
                continue
        blocks[:, 148:156] = 32  # the sum is taken with spaces in its own field
        unsigned = blocks.sum(1, dtype=np.int64)
        signed = blocks.view(np.int8).sum(1, dtype=np.int64)  # historic tars
        wrong = (stated != unsigned) & (stated != signed)
        if wrong.any():
            return start + int(wrong.argmax())
    return None


def read_headers(data: Any, name: str) -> tuple[list[Entry], Stop | None]:
    """The members of a tar, bytes or mmap, up to where it can be read. Raises ShardError where it is no tar at all."""
    if len(data) == 0:
        raise ShardError(f"{name}: zero bytes, expected a tar. Fetch or build the shard again.")
    entries, headers, stop = _walk(data)
    bad = _first_bad_checksum(data, headers)
    if bad is not None:
        stop = Stop(headers[bad], "corrupt_header", "the header's checksum does not match its bytes")
        entries = [entry for entry in entries if entry.header < headers[bad]]
        headers = headers[:bad]
    if stop is not None and not headers:
        start = bytes(data[:64])
        what = (
            "gzip-compressed, which is not read: unpack it first"
            if start[:2] == b"\x1f\x8b"
            else f"not a tar: it begins with {start[:24]!r}"
        )
        if start.lstrip()[:1] == b"<":
            what = f"a web page rather than a tar: it begins with {start[:24]!r}"
        raise ShardError(f"{name}: {what} ({len(data)} bytes). Fetch or build the shard again.")
    return entries, stop


def read_at(file: int, offset: int, size: int) -> bytes:
    """`size` bytes of an open file. pread rather than mmap: a file cut while it is read gives a short read, not a bus error."""
    parts, at, left = [], offset, size
    while left and (part := os.pread(file, left, at)):
        parts.append(part)
        at, left = at + len(part), left - len(part)
    if left:
        raise BadSample("cut", f"{left} of {size} bytes missing at byte {at}")
    return parts[0] if len(parts) == 1 else b"".join(parts)
