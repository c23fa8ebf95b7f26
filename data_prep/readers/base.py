"""What every reader needs: the form of a reader, an image's format by its content, keys, captions. Imports no torch."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

from data_prep.records import Record, Skipped
from mmpretrain.data.schema import BadSample

T = TypeVar("T")

# (first bytes, offset of more, those, extension); the formats that training decodes.
MAGIC = (
    (b"\xff\xd8\xff", 0, b"", "jpg"),
    (b"\x89PNG\r\n\x1a\n", 0, b"", "png"),
    (b"RIFF", 8, b"WEBP", "webp"),
    (b"GIF87a", 0, b"", "gif"),
    (b"GIF89a", 0, b"", "gif"),
    (b"BM", 0, b"", "bmp"),
    (b"II*\0", 0, b"", "tiff"),
    (b"MM\0*", 0, b"", "tiff"),
)


class Reader(Protocol):
    """An input of `build`, a frozen dataclass: picklable, and its repr states its options."""

    @property
    def classes(self) -> list[str] | tuple[str, ...] | None:
        """Written to classnames.txt."""

    def tasks(self, max_count: int) -> Iterator[Any]:
        """Small descriptions of `max_count` inputs each, never image bytes; lazily. Runs in the starting process."""
        ...

    def __call__(self, task: Any) -> Iterator[Record | Skipped]:
        """Runs in a worker: reads the bytes, makes the records."""
        ...

    def sources(self, task: Any) -> Iterator[str | None]:
        """The files that a task reads, so that a change of one is noticed; None is passed over."""
        ...


def extension_of(data: bytes) -> str | None:
    """The extension of an image by its content; None where it is no image that training decodes."""
    for start, at, more, extension in MAGIC:
        if data.startswith(start) and data[at : at + len(more)] == more:
            return extension
    return "ppm" if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace() else None


def chunks(items: Iterable[T], count: int) -> Iterator[tuple[T, ...]]:
    iterator = iter(items)
    while chunk := tuple(itertools.islice(iterator, count)):
        yield chunk


def safe(text: str) -> str:
    """Text as part of a key."""
    return re.sub(r"[^\w-]+", "_", text).strip("_")[:80]


def caption_text(text: str | bytes) -> str:
    """A caption as it is written: NFC, without outer white space. Raises BadSample: empty_caption, not_utf8."""
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text.encode("utf-8").decode()
    except UnicodeError as error:
        raise BadSample("not_utf8", str(error)) from error
    text = unicodedata.normalize("NFC", text).replace("\0", "").strip()
    if not text:
        raise BadSample("empty_caption")
    return text
