"""Recognition of image formats by content, and decoding of captions and of named text files. Imports no torch."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

from mmpretrain.config.build import OptionError
from mmpretrain.data.schema import BadSample
from mmpretrain.errors import file_errors

# (first bytes, offset of more, those, format)
_MAGIC = (
    (b"\xff\xd8\xff", 0, b"", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", 0, b"", "png"),
    (b"RIFF", 8, b"WEBP", "webp"),
    (b"GIF87a", 0, b"", "gif"),
    (b"GIF89a", 0, b"", "gif"),
    (b"BM", 0, b"", "bmp"),
    (b"II*\0", 0, b"", "tiff"),
    (b"MM\0*", 0, b"", "tiff"),
    (b"II+\0", 0, b"", "tiff"),  # BigTIFF
    (b"MM\0+", 0, b"", "tiff"),
)
_AVIF = (b"avif", b"avis")  # brands: an image, a sequence
_CONTAINERS = (b"mif1", b"msf1")  # brands of HEIF files, whatever codes their images


def sniff(data: bytes) -> str | None:
    """Return the image format by its first bytes; None where it is not an allowed one."""
    for start, offset, more, kind in _MAGIC:
        if data.startswith(start) and data[offset : offset + len(more)] == more:
            return kind
    if data[4:8] == b"ftyp":
        brands = bytes(data[16 : min(int.from_bytes(data[:4], "big"), 256)])
        listed = any(brands[i : i + 4] in _AVIF for i in range(0, len(brands), 4))
        return "avif" if data[8:12] in _AVIF or (data[8:12] in _CONTAINERS and listed) else None
    return "ppm" if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace() else None


def clean_text(text: str) -> str:
    """Normalise a text to NFC without outer white space. Raises BadSample: empty_caption."""
    text = unicodedata.normalize("NFC", text).replace("\0", "").strip()
    if not text:
        raise BadSample("empty_caption")
    return text


def read_text(path: Path | str) -> str:
    """A UTF-8 file that an option names. Raises FileError where it is missing or unreadable, OptionError where it is not UTF-8."""
    try:
        with file_errors():
            return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is not UTF-8 ({error}): convert it") from error


def read_json(path: Path | str) -> Any:
    """The JSON of a file that an option names. Raises as `read_text`, and OptionError where it is not JSON."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise OptionError(f"{path} is not JSON: {error}") from error


def decode_text(data: bytes) -> str:
    """Decode UTF-8 bytes to text in NFC without outer white space. Raises BadSample: empty_caption, not_utf8."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample("not_utf8", str(error)) from error
    return clean_text(text)
