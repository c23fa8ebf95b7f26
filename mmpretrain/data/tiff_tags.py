"""Directories of tags as TIFF, BigTIFF and EXIF blocks have them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

# Tag numbers (TIFF 6.0, section 8 and after)
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES = 273, 274, 277, 278, 279
PLANAR, PREDICTOR, COLOUR_MAP, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 284, 317, 320, 322, 323, 324, 325
EXTRA_SAMPLES, SAMPLE_FORMAT, YCBCR_SUBSAMPLING, XMP, ICC_PROFILE = 338, 339, 530, 700, 34675

INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q", 17: "q"}  # kinds of tags that hold whole numbers
_SIZES = {2: 1, 5: 8, 7: 1, 10: 8, 11: 4, 12: 8} | {kind: struct.calcsize("<" + code) for kind, code in INTEGERS.items()}
MAX_TAGS = 4096  # read of a directory; a BigTIFF may claim 2**64


class Tag(NamedTuple):
    number: int
    kind: int
    count: int
    entry: int  # offset of the directory's entry
    start: int  # offset of the values
    end: int


class Header(NamedTuple):
    order: str  # of bytes: "<" or ">"
    big: bool  # BigTIFF
    directory: int  # offset of the first one


def header(data: bytes) -> Header | None:
    """None where the bytes do not begin as TIFF or BigTIFF do."""
    form = {b"II*\0": ("<", False), b"MM\0*": (">", False), b"II+\0": ("<", True), b"MM\0+": (">", True)}.get(bytes(data[:4]))
    if form is None or len(data) < (16 if form[1] else 8):
        return None
    order, big = form
    return Header(order, big, struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)[0])


def tags(data: bytes) -> Iterator[Tag]:
    """The tags of the first directory, as far as the bytes reach; those whose values lie outside of them are left out."""
    head = header(data)
    if head is None:
        return
    order, big, directory = head
    counter, entry_form = (order + "Q", order + "HHQ") if big else (order + "H", order + "HHI")
    inline, entry_size, first = (8, 20, 8) if big else (4, 12, 2)
    if directory + first > len(data):
        return
    count = min(struct.unpack_from(counter, data, directory)[0], MAX_TAGS)
    for entry in range(directory + first, directory + first + count * entry_size, entry_size):
        if entry + entry_size > len(data):
            return
        number, kind, length = struct.unpack_from(entry_form, data, entry)
        size = length * _SIZES.get(kind, 0)
        start = entry + entry_size - inline
        if size > inline:
            start = struct.unpack_from(order + ("Q" if big else "I"), data, start)[0]
        if kind in _SIZES and start + size <= len(data):
            yield Tag(number, kind, length, entry, start, start + size)


def integers(data: bytes, tag: Tag, order: str) -> tuple[int, ...]:
    """The values of a tag of whole numbers; () for one of another kind."""
    code = INTEGERS.get(tag.kind)
    return struct.unpack_from(f"{order}{tag.count}{code}", data, tag.start) if code else ()
