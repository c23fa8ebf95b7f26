"""The reader of CSV and TSV tables with image paths, as a stream: only the rows in progress are held in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, NamedTuple

from data_prep import files
from data_prep.build.readers.base import chunks
from data_prep.build.readers.columns import Columns
from data_prep.build.readers.members import attempt, class_names
from data_prep.records import InputError, Record, Skipped
from mmpretrain.data.schema import BadSample
from mmpretrain.data.tables import MAX_FIELD, START, Header, as_text, check_text, read_rows, separator_of, some


class Row(NamedTuple):
    """A row's number in the table, its first line, and the values of `used`; or the `problem` of a malformed row."""

    number: int
    line: int
    values: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True)
class Table:
    """Reader of a table: one record per row, in order."""

    file: str
    separator: str
    columns: Columns
    used: tuple[str, ...]  # the columns that go to the workers
    where: tuple[tuple[str, str], ...]  # column, value: rows kept
    exclude: tuple[tuple[str, str], ...]  # column, pattern: rows dropped

    @staticmethod
    def open(
        file: str,
        columns: Columns,
        where: Mapping[str, str] | None = None,
        exclude: Mapping[str, str] | None = None,
        separator: str | None = None,
    ) -> Table:
        """Opens a table and checks its columns; where there is a label without classes, reads the table once for them.

        Args:
            file: a path or URL.
            columns: the columns to use; its root "" means the folder of the table.
            where: column -> value that kept rows hold.
            exclude: column -> regular expression of dropped rows.
            separator: one character, or "tab"; None: what the header line shows.

        Raises:
            InputError: a missing column, or an option that cannot be used.
            TableError: a file of another kind, or a wanted column that comes twice.
        """
        separator = _guessed(file) if separator is None else "\t" if separator in ("\\t", "tab") else separator
        if len(separator) != 1:
            raise InputError(f"--separator {separator!r}: expected one character, or tab")
        header, where, exclude = _header(file, separator), dict(where or {}), dict(exclude or {})
        columns = replace(columns, root=columns.root or _folder(file), table=_folder(file))
        columns.check(header.named, file)
        for column in (*where, *exclude):
            if column not in header.named:
                raise InputError(f"{file} has no column {column!r} (--where, --exclude-regex); it has {some(header.named)}")
        for column, pattern in exclude.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"--exclude-regex {column}={pattern}: {error}") from error
        chosen = tuple(where.items()), tuple(exclude.items())
        if columns.label is not None and columns.classes is None:
            position = header.place(columns.label)
            labels = (row[position] for _, _, row in _chosen(file, separator, header, *chosen) if not isinstance(row, str))
            columns = replace(columns, classes=class_names(labels, f"column {columns.label}"))
        used = tuple(columns.top(header.named))
        for column in used:
            header.place(column)
        return Table(file, separator, columns, used, *chosen)

    @property
    def classes(self) -> list[str] | None:
        return None if self.columns.classes is None else list(self.columns.classes)

    def tasks(self, max_count: int) -> Iterator[tuple[Row, ...]]:
        header = _header(self.file, self.separator)
        positions = [header.place(column) for column in self.used]
        rows = _chosen(self.file, self.separator, header, self.where, self.exclude)
        yield from chunks(
            (
                Row(number, line, (), row) if isinstance(row, str) else Row(number, line, tuple([row[i] for i in positions]))
                for number, line, row in rows
            ),
            max_count,
        )

    def __call__(self, task: tuple[Row, ...]) -> Iterator[Record | Skipped]:
        name = self.file.rpartition("/")[2]
        for row in task:
            yield attempt(f"{name}, line {row.line}", lambda row=row: self._record(row))

    def _record(self, row: Row) -> Record:
        """Makes the record of a row. Raises BadSample."""
        if row.problem:
            raise BadSample("bad_row", row.problem)
        return self.columns.record(row.number, dict(zip(self.used, row.values)))

    def sources(self, task: tuple[Row, ...]) -> Iterator[str | None]:
        """Yields the images; the rows themselves are part of the task."""
        return (self.columns.source(dict(zip(self.used, row.values))) for row in task if not row.problem)


def _folder(file: str) -> str:
    return file.rpartition("/")[0] if files.is_remote(file) else str(Path(files.place(file)).parent)


@contextmanager
def _opened(file: str) -> Iterator[IO[str]]:
    """Opens a table as text. Raises TableError for a file of another kind, OSError."""
    with files.open_binary(file) as handle:
        check_text(file, handle.read(START))
        handle.seek(0)
        with as_text(handle) as text:
            yield text


def _header(file: str, separator: str) -> Header:
    with _opened(file) as text:
        return Header.read(file, read_rows(text, separator))


def _guessed(file: str) -> str:
    with _opened(file) as text:
        return separator_of(text.readline(MAX_FIELD))


def _chosen(
    file: str, separator: str, header: Header, where: tuple[tuple[str, str], ...], exclude: tuple[tuple[str, str], ...]
) -> Iterator[tuple[int, int, list[str] | str]]:
    """(number in the table, line, fields) of the rows that --where and --exclude-regex leave, and of those that are none."""
    wanted = [(header.place(column), value) for column, value in where]
    excluded = [(header.place(column), re.compile(pattern)) for column, pattern in exclude]
    with _opened(file) as text:
        rows = read_rows(text, separator)
        next(rows)
        for number, (line, fields) in enumerate(rows):
            row = fields if isinstance(fields, str) else header.fit(fields)
            if isinstance(row, str) or (
                all(row[i] == value for i, value in wanted) and not any(pattern.search(row[i]) for i, pattern in excluded)
            ):
                yield number, line, row
