"""What every reader needs: the image by its content, captions from templates, keys, the members of a record. Imports no torch."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any, Protocol, TypeVar

from data_prep import files
from data_prep.records import InputError, Record, Skipped
from mmpretrain.data.schema import BadSample, ShardError

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


def image_from(data: bytes, where: str, what: str) -> dict[str, bytes] | Skipped:
    """{extension: bytes}, untouched."""
    extension = extension_of(data)
    if extension is None:
        return Skipped(where, "unknown_format", f"{what} is no image that is read; it begins with {data[:12]!r}")
    return {extension: data}


def read_image(url: str, where: str) -> dict[str, bytes] | Skipped:
    """{extension: bytes} of an image file, local or remote."""
    try:
        if "://" in url:
            data = files.read_bytes(url)
        else:
            with open(url, "rb", buffering=0) as file:
                data = file.readall()
    except (OSError, ShardError) as error:
        return Skipped(where, "missing_image", f"{url}: {getattr(error, 'strerror', None) or error}")
    except ValueError as error:  # a NUL in the path
        return Skipped(where, "missing_image", f"{url!r}: {error}")
    return image_from(data, where, url)


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


def caption_members(texts: list[str], metadata: Mapping[str, object], several: bool) -> dict[str, bytes]:
    """`txt` is the first caption; the json holds `metadata`, and where there may be several captions all of them as `captions`."""
    members: dict[str, bytes] = {}
    if texts:
        members["txt"] = texts[0].encode()
    whole = {**metadata, "captions": list(dict.fromkeys(texts))} if several and texts else dict(metadata)
    if whole:
        members["json"] = json.dumps(whole, ensure_ascii=False, sort_keys=True).encode()
    return members


@dataclass(frozen=True)
class Template:
    """A caption over columns, e.g. "{name}: {keywords}"; `join` replaces a mark in a column by ", "."""

    text: str
    fields: tuple[str, ...]
    join: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def parse(text: str, join: Mapping[str, str] = {}, option: str = "--caption") -> Template:
        """Raises InputError where a field is no name."""
        try:
            fields = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
        except ValueError as error:
            raise InputError(f"{option} {text!r}: {error}. Double a brace that is meant literally.") from error
        if "" in fields or any(form or conversion for _, _, form, conversion in Formatter().parse(text)):
            raise InputError(f"{option} {text!r}: name columns in braces, e.g. '{{name}}: {{keywords}}'")
        return Template(text, tuple(dict.fromkeys(fields)), tuple(sorted(join.items())))

    def fill(self, row: Mapping[str, Any]) -> str:
        """The template filled from a row, white space collapsed; "" where all its columns are empty."""
        marks = dict(self.join)
        values = {}
        for column in self.fields:
            value = "" if row[column] is None else str(row[column])
            values[column] = re.sub(r"\s+", " ", value.replace(marks[column], ", ") if column in marks else value).strip()
        text = "".join(literal + (values[name] if name is not None else "") for literal, name, _, _ in Formatter().parse(self.text)).strip()
        # An empty joined column leaves no dangling "name: ".
        text = text if all(values.values()) else text.rstrip(":;,-").strip()
        return text if any(values.values()) or not self.fields else ""


def captions_of(templates: Iterable[Template], row: Mapping[str, Any], where: str) -> list[str] | Skipped:
    """The captions that the templates make of a row; Skipped where there are templates, and all come out empty."""
    texts, fields = [], []
    try:
        for template in templates:
            fields += template.fields
            if text := template.fill(row):
                texts.append(caption_text(text))
    except BadSample as bad:
        return Skipped(where, bad.reason, f"columns {', '.join(fields)}: {bad.detail}")
    if fields and not texts:
        return Skipped(where, "empty_caption", f"columns {', '.join(fields)} are empty")
    return texts


def need(columns: Iterable[str], wanted: Iterable[str], what: str, option: str) -> None:
    """Raises InputError where a column is missing."""
    columns = list(columns)
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise InputError(f"{what} has no column {', '.join(map(repr, missing))} ({option}); it has {', '.join(columns)}")
