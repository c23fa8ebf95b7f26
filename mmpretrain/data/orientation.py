"""Orientation of a stored image: from EXIF, else from XMP, read from the file itself so that every format follows one rule.

An orientation is a number from 1 to 8 (EXIF 2.32, tag 274): 1 is upright, 6 a photograph to be turned a quarter clockwise. Pillow finds
fewer of them, and rewrites the EXIF block to turn an image, which fails for blocks with one tag that it cannot write.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from mmpretrain.data import tiff_tags

EXIF = b"Exif\0\0"
XMP = b"http://ns.adobe.com/xap/1.0/\0"
QUARTER_TURNS = (5, 6, 7, 8)  # width and height change places
MAX_TEXT = 1 << 20  # bytes of a compressed PNG text that are read

_IN_XMP = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])\s*[\"'<]")
_FILL = re.compile(rb"\xff+")  # bytes that may stand before a marker
_WHOLE = (3, 4, 8, 9)  # kinds of tags that an orientation may have; the standard's is 3


class JpegHeader(NamedTuple):
    """What the segments before the first scan state."""

    width: int
    height: int
    components: int
    bits: int
    progressive: bool
    exif: bytes  # the first block, or b""
    xmp: bytes


def jpeg_header(data: bytes) -> JpegHeader | None:
    """None where there is no frame header."""
    offset, exif, xmp, frame = 2, b"", b"", None
    while offset + 9 < len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker == 0xFF:
            offset = _FILL.match(data, offset).end() - 1  # pyright: ignore[reportOptionalMemberAccess] (it is at one)
            continue
        if marker == 0xDA:
            break
        length = int.from_bytes(data[offset + 2 : offset + 4], "big")
        if frame is None and 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, offset + 5)
            frame = width, height, data[offset + 9], data[offset + 4], marker in (0xC2, 0xCA)
        elif marker == 0xE1:
            block = data[offset + 4 : offset + 2 + length]
            if not exif and length > 16 and block.startswith(EXIF):
                exif = block
            elif not xmp and block.startswith(XMP):
                xmp = block[len(XMP) :]
        offset += 2 + length
    return None if frame is None else JpegHeader(*frame, exif, xmp)


def exif_orientation(block: bytes) -> int | None:
    """The orientation in the first directory of an EXIF block (with or without its `Exif` mark); None without a valid one."""
    data = block[len(EXIF) :] if block.startswith(EXIF) else block
    head = tiff_tags.header(data)
    if head is None:
        return None
    for tag in tiff_tags.tags(data):
        if tag.number == tiff_tags.ORIENTATION and tag.kind in _WHOLE and tag.count == 1:
            (value,) = tiff_tags.integers(data, tag, head.order)
            return value if 1 <= value <= 8 else None
    return None


def xmp_orientation(packet: bytes) -> int | None:
    """`tiff:Orientation` of an XMP packet in UTF-8, 16 or 32; None without a valid one."""
    match = _IN_XMP.search(packet.replace(b"\0", b""))
    return int(match[1]) if match else None


def orientation(exif: bytes, xmp: bytes = b"") -> int:
    """The one rule: what EXIF states if that is valid, else what XMP states, else 1."""
    return (exif_orientation(exif) if exif else None) or (xmp_orientation(xmp) if xmp else None) or 1


def stored_orientation(data: bytes, kind: str) -> int:
    """The orientation that an image file states, 1 to 8; `kind` as `formats.sniff` names it.

    GIF, BMP and PNM have none. That of AVIF belongs to its container, which Pillow reads (`raster`).
    """
    if kind == "jpeg":
        header = jpeg_header(data)
        return 1 if header is None else orientation(header.exif, header.xmp)
    if kind in _BLOCKS:
        blocks: dict[str, bytes] = {}
        for name, block in _BLOCKS[kind](data):
            blocks.setdefault(name, block)
        return orientation(blocks.get("exif", b""), blocks.get("xmp", b""))
    return 1


def _png_blocks(data: bytes) -> Iterator[tuple[str, bytes]]:
    """EXIF and XMP in their own chunks, and as ImageMagick writes them into texts."""
    late: dict[str, bytes] = {}
    offset = 8
    while offset + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, offset)
        if name == b"eXIf":
            yield "exif", data[offset + 8 : offset + 8 + length]
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            keyword, _, rest = data[offset + 8 : offset + 8 + length].partition(b"\0")
            form = _PNG_TEXTS.get(keyword)
            if form is not None and form not in late:
                late[form] = _png_text(name, rest)
        elif name == b"IEND":
            break
        offset += 12 + length
    if "xmp" in late:
        yield "xmp", late["xmp"]
    for form in ("raw exif", "raw APP1", "raw xmp"):
        block = _raw_profile(late.get(form, b""))
        if block.startswith(XMP):
            yield "xmp", block[len(XMP) :]
        elif block:
            yield ("xmp" if form == "raw xmp" else "exif"), block


_PNG_TEXTS = {
    b"XML:com.adobe.xmp": "xmp",
    b"Raw profile type exif": "raw exif",
    b"Raw profile type APP1": "raw APP1",
    b"Raw profile type xmp": "raw xmp",
}


def _png_text(name: bytes, rest: bytes) -> bytes:
    """The text of a chunk, `rest` being what follows its keyword."""
    compressed = name == b"zTXt"
    if compressed:
        rest = rest[1:]
    elif name == b"iTXt":
        compressed = rest[:1] == b"\1"
        rest = [*rest[2:].split(b"\0", 2), b"", b""][2]
    if not compressed:
        return rest
    try:
        return zlib.decompressobj().decompress(rest, MAX_TEXT)
    except zlib.error:
        return b""


def _raw_profile(text: bytes) -> bytes:
    """A profile as ImageMagick writes it: its name, its length, hexadecimal digits."""
    try:
        return bytes.fromhex(b"".join(text.split()[2:]).decode("ascii"))
    except ValueError:
        return b""


def _webp_blocks(data: bytes) -> Iterator[tuple[str, bytes]]:
    offset = 12
    while offset + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, offset)
        if name in (b"EXIF", b"XMP "):
            yield ("exif" if name == b"EXIF" else "xmp"), data[offset + 8 : offset + 8 + length]
        offset += 8 + length + length % 2


def _tiff_blocks(data: bytes) -> Iterator[tuple[str, bytes]]:
    yield "exif", data  # a TIFF file is what an EXIF block holds
    for tag in tiff_tags.tags(data):
        if tag.number == tiff_tags.XMP:
            yield "xmp", data[tag.start : tag.end]


_BLOCKS = {"png": _png_blocks, "webp": _webp_blocks, "tiff": _tiff_blocks}
