"""What every reader needs: the form of a reader, an image's format by its content, keys, captions. Imports no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

from data_prep.records import Record, Skipped
from mmpretrain.data.formats import clean_text, decode_text, sniff

T = TypeVar("T")


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
    kind = sniff(data)
    return "jpg" if kind == "jpeg" else kind


def chunks(items: Iterable[T], count: int) -> Iterator[tuple[T, ...]]:
    iterator = iter(items)
    while chunk := tuple(itertools.islice(iterator, count)):
        yield chunk


def safe(text: str) -> str:
    """Text as part of a key."""
    return re.sub(r"[^\w-]+", "_", text).strip("_")[:80]


def caption_text(text: str | bytes) -> str:
    """A caption as it is written: NFC, without outer white space. Raises BadSample: empty_caption, not_utf8."""
    return decode_text(text) if isinstance(text, bytes) else clean_text(text)
