"""A CSV or TSV table with image paths, read as a stream: of many million rows only those under way are held."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import files
from data_prep.readers.base import Template, caption_members, captions_of, chunks, need, read_image, safe
from data_prep.records import InputError, Record, Skipped

Row = tuple[int, int, tuple[str, ...]]  # number in the table, line, the values of `used`
csv.field_size_limit(1 << 24)


@dataclass(frozen=True)
class Table:
    """One record a row, in the table's order. Keys are row numbers, followed by `key_column` where given.

    Of several caption templates the first makes `txt`, all together `captions` in the json.
    """

    file: str
    separator: str
    used: tuple[str, ...]  # the columns that go to the workers
    image_column: str
    templates: tuple[Template, ...]
    key_column: str | None
    label_column: str | None
    extra: tuple[str, ...]
    where: tuple[tuple[str, str], ...]  # column, value: rows kept
    exclude: tuple[tuple[str, str], ...]  # column, pattern: rows dropped
    classes: tuple[str, ...] | None

    @staticmethod
    def open(
        file: str,
        image_column: str,
        captions: list[str],
        key_column: str | None = None,
        label_column: str | None = None,
        extra: list[str] | None = None,
        join: Mapping[str, str] | None = None,
        where: Mapping[str, str] | None = None,
        exclude: Mapping[str, str] | None = None,
        separator: str = ",",
    ) -> Table:
        """Checks the columns; with `label_column` reads the table once for its classes. Raises InputError."""
        separator = "\t" if separator in ("\\t", "tab") else separator
        if len(separator) != 1:
            raise InputError(f"--separator {separator!r}: expected one character, or tab")
        columns = _columns(file, separator)
        join, where, exclude = dict(join or {}), dict(where or {}), dict(exclude or {})
        templates = tuple(Template.parse(caption, join) for caption in captions)
        need(columns, [image_column], file, "--image-column")
        need(columns, [field for template in templates for field in template.fields], file, "--caption")
        need(columns, [c for c in (key_column, label_column) if c], file, "--key-column, --label-column")
        need(columns, [*(extra or []), *join, *where, *exclude], file, "--extra, --join, --where, --exclude-regex")
        for column, pattern in exclude.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"--exclude-regex {column}={pattern}: {error}") from error
        fields = [image_column, *(field for t in templates for field in t.fields), key_column, label_column, *(extra or [])]
        used = tuple(dict.fromkeys(field for field in fields if field))
        chosen = tuple(where.items()), tuple(exclude.items())
        classes = None
        if label_column is not None:
            at = columns.index(label_column)
            classes = tuple(sorted({row[at] for _, _, row in _chosen(file, separator, columns, *chosen)}))
        return Table(file, separator, used, image_column, templates, key_column, label_column, tuple(extra or ()), *chosen, classes)

    def tasks(self, max_count: int) -> Iterator[tuple[Row, ...]]:
        columns = _columns(self.file, self.separator)
        at = [columns.index(column) for column in self.used]
        rows = _chosen(self.file, self.separator, columns, self.where, self.exclude)
        yield from chunks(((number, line, tuple([row[i] for i in at])) for number, line, row in rows), max_count)

    def __call__(self, task: tuple[Row, ...]) -> Iterator[Record | Skipped]:
        folder = _folder(self.file)
        name = self.file.rpartition("/")[2]
        number_of = {label: i for i, label in enumerate(self.classes or ())}
        for number, line, values in task:
            row = dict(zip(self.used, values))
            at = f"{name}, line {line}"
            members = read_image(_image_url(folder, row[self.image_column]), at)
            texts = captions_of(self.templates, row, at)
            if isinstance(members, Skipped) or isinstance(texts, Skipped):
                yield members if isinstance(members, Skipped) else texts  # type: ignore[misc]
                continue
            metadata: dict[str, Any] = {column: row[column] for column in self.extra}
            try:
                members |= caption_members(texts, metadata, len(self.templates) > 1)
            except UnicodeEncodeError as error:
                yield Skipped(at, "not_utf8", f"columns {', '.join(self.extra)}: {error}")
                continue
            if self.label_column is not None:
                members["cls"] = str(number_of[row[self.label_column]]).encode()
            suffix = safe(row[self.key_column]) if self.key_column else ""
            yield Record(f"{number:08d}_{suffix}" if suffix else f"{number:08d}", members)


def _folder(file: str) -> str:
    return file.rpartition("/")[0] if files.is_remote(file) else str(Path(files.place(file)).parent)


def _image_url(folder: str, value: str) -> str:
    """An image as the table names it: relative to the table, absolute, or a URL."""
    return value if "://" in value else files.join(folder, value)


def _rows(file: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields), the header's first. Bytes that are not UTF-8 stay apart as surrogates, and are found when they are used."""
    with files.open_text(file) as handle:
        reader = csv.reader(handle, delimiter=separator)
        try:
            for row in reader:
                if row:
                    yield reader.line_num, row
        except csv.Error as error:
            raise InputError(f"{file}, line {reader.line_num}: {error}. Correct the table.") from error


def _columns(file: str, separator: str) -> list[str]:
    for _, columns in _rows(file, separator):
        again = [column for column in columns if columns.count(column) > 1]
        if again:
            raise InputError(f"{file}: column {again[0]!r} comes twice in its header. Rename one.")
        return columns
    raise InputError(f"{file}: an empty table, expected a header line that names the columns")


def _chosen(
    file: str, separator: str, columns: list[str], where: tuple[tuple[str, str], ...], exclude: tuple[tuple[str, str], ...]
) -> Iterator[tuple[int, int, list[str]]]:
    """(number in the table, line, fields) of the rows that --where and --exclude-regex leave."""
    wanted = [(columns.index(column), value) for column, value in where]
    excluded = [(columns.index(column), re.compile(pattern)) for column, pattern in exclude]
    rows = _rows(file, separator)
    next(rows)
    for number, (line, row) in enumerate(rows):
        if len(row) != len(columns):
            raise InputError(f"{file}, line {line}: expected {len(columns)} fields ({', '.join(columns)}), found {len(row)}")
        if all(row[i] == value for i, value in wanted) and not any(pattern.search(row[i]) for i, pattern in excluded):
            yield number, line, row
