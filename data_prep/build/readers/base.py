"""The protocol of readers, and what all of them use: image formats by content, safe keys, captions. Imports no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeVar

from data_prep.records import Record, Skipped
from mmpretrain.data.formats import clean_text, decode_text, sniff

T = TypeVar("T")


class Reader(Protocol):
    """An input of `build`: a frozen dataclass, picklable, whose repr states its options."""

    @property
    def classes(self) -> list[str] | tuple[str, ...] | None:
        """The class names, written to classnames.txt; None without classes."""

    def tasks(self, max_count: int) -> Iterator[Any]:
        """Yields descriptions of `max_count` inputs each, without image bytes. Runs in the starting process."""
        ...

    def __call__(self, task: Any) -> Iterator[Record | Skipped]:
        """Reads the inputs of a task and yields their records. Runs in a worker."""
        ...

    def sources(self, task: Any) -> Iterator[str | None]:
        """Yields the files that a task reads, whose changes make another build; None is ignored."""
        ...


def extension_of(data: bytes) -> str | None:
    """Returns the extension of an image by its content; None where training decodes no such format."""
    kind = sniff(data)
    return "jpg" if kind == "jpeg" else kind


def chunks(items: Iterable[T], count: int) -> Iterator[tuple[T, ...]]:
    """Divides items into tuples of `count`, the last one shorter."""
    iterator = iter(items)
    while chunk := tuple(itertools.islice(iterator, count)):
        yield chunk


def safe(text: str) -> str:
    """Makes text safe as part of a key: letters, digits, - and _, at most 80 characters."""
    return re.sub(r"[^\w-]+", "_", text).strip("_")[:80]


def caption_text(text: str | bytes) -> str:
    """Normalises a caption: NFC, without outer white space. Raises BadSample: empty_caption, not_utf8."""
    return decode_text(text) if isinstance(text, bytes) else clean_text(text)
