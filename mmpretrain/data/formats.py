"""Recognition of image formats by content, and decoding of captions and of named text files. Imports no torch."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmpretrain.config.build import OptionError
from mmpretrain.data.schema import BadSample
from mmpretrain.errors import file_errors

_EDGES = "".join(c for c in map(chr, range(0x3001)) if c.isspace()) + "\ufeff"  # what surrounds a text and is not part of it
_INVISIBLE = frozenset(["Cc", "Cf", "Zl", "Zp", "Zs"])
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
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


_UNPACK = "Unpack it first."
_CONVERT = "Convert it to JPEG or PNG."
_UTF8 = "Convert it to UTF-8, e.g. with iconv -f UTF-16 -t UTF-8."
# (first bytes, offset of more, those, what it is, remedy)
_FOREIGN = (
    (b"version https://git-lfs.github.com/", 0, b"", "a Git LFS pointer", "Run `git lfs pull` to fetch the file that it stands for."),
    (b"/annex/objects/", 0, b"", "a git-annex pointer", "Run `git annex get` to fetch the file that it stands for."),
    (b"\x1f\x8b", 0, b"", "a gzip-compressed file", _UNPACK),
    (b"\x28\xb5\x2f\xfd", 0, b"", "a zstd-compressed file", _UNPACK),
    (b"BZh", 0, b"", "a bzip2-compressed file", _UNPACK),
    (b"\xfd7zXZ\0", 0, b"", "an xz-compressed file", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", 0, b"", "a 7z archive", _UNPACK),
    (b"PK\3\4", 0, b"", "a ZIP archive or an Excel workbook", "Unpack it, or save it as CSV."),
    (b"\xd0\xcf\x11\xe0", 0, b"", "an Excel or Word file", "Save it as CSV."),
    (b"PAR1", 0, b"", "a parquet file", ""),
    (b"SQLite format 3\0", 0, b"", "an SQLite database", "Export its table as CSV."),
    (b"%PDF-", 0, b"", "a PDF document", ""),
    (b"\0\0", 4, b"ftyphei", "a HEIC image", _CONVERT),
    (b"\0\0", 4, b"ftypmif1", "a HEIF image", _CONVERT),
    (b"\0\0\0\x0cJXL ", 0, b"", "a JPEG XL image", _CONVERT),
    (b"\xff\x0a", 0, b"", "a JPEG XL image", _CONVERT),
    (b"\0\0\0\x0cjP  ", 0, b"", "a JPEG 2000 image", _CONVERT),
    (b"8BPS", 0, b"", "a Photoshop file", _CONVERT),
    (b"\xff\xfe", 0, b"", "a text in UTF-16", _UTF8),
    (b"\xfe\xff", 0, b"", "a text in UTF-16", _UTF8),
)


def foreign_kind(data: bytes) -> tuple[str, str] | None:
    """What the first bytes of a file show it to be, where it is often found in place of the file that was meant.

    Returns:
        (a noun with its article, a sentence with the remedy, or ""); None for anything else.
    """
    for start, at, more, noun, remedy in _FOREIGN:
        if data.startswith(start) and data[at : at + len(more)] == more:
            return noun, remedy
    text = data[:512].removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<"):
        svg = b"<svg" in text
        return ("an SVG drawing", _CONVERT) if svg else ("an XML document", "") if text.startswith(b"<?xml") else ("a web page", "")
    return None


def printable(text: str) -> str:
    """Text without bytes that are not UTF-8 and without characters that control a terminal, for messages."""
    return _UNPRINTABLE.sub("\ufffd", text)


def decoder_message(error: BaseException) -> str:
    """What a decoder says of a file, in one line, without the object in memory that Pillow names in place of the file."""
    text = " ".join(str(error).split())
    if text.startswith("cannot identify image file"):
        return "its header cannot be read"
    return re.sub(r"<[\w.]+( object)? at 0x[0-9a-fA-F]+>", "the file", text)[:200] or type(error).__name__


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold a text: it has no lone surrogates."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def clean_text(text: str) -> str:
    """Normalise a text to NFC without outer white space and byte order marks.

    Raises BadSample: empty_caption where no character is visible, not_utf8.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a lone surrogate
            raise BadSample("not_utf8", str(error)) from error
    text = unicodedata.normalize("NFC", text).replace("\0", "").strip(_EDGES)
    if all(unicodedata.category(character) in _INVISIBLE for character in text):
        raise BadSample("empty_caption")
    return text


def clean_texts(texts: Iterable[str]) -> list[str]:
    """Texts as `clean_text` gives them, without those in which nothing shows. Raises BadSample: not_utf8."""
    cleaned = []
    for text in texts:
        try:
            cleaned.append(clean_text(text))
        except BadSample as error:
            if error.reason != "empty_caption":
                raise
    return cleaned


def read_text(path: Path | str) -> str:
    """A UTF-8 file that an option names.

    Raises:
        FileError: it is missing or unreadable.
        OptionError: it is not UTF-8 text, or a pointer of Git LFS in its place.
    """
    with file_errors():
        data = Path(path).read_bytes()
    if (foreign := foreign_kind(data)) is not None and not data.lstrip().startswith(b"<"):
        raise OptionError(f"{path} is {foreign[0]}, expected a text in UTF-8. {foreign[1]}".rstrip())
    try:
        return data.decode("utf-8-sig")
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
