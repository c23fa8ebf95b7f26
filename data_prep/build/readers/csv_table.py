"""The reader of CSV and TSV tables with image paths, as a stream: only the rows in progress are held in memory."""

from __future__ import annotations

import csv
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, NamedTuple

from data_prep import files
from data_prep.build.readers.base import chunks
from data_prep.build.readers.columns import Columns
from data_prep.build.readers.members import attempt, class_names, some
from data_prep.records import InputError, Record, Skipped
from mmpretrain.data.schema import BadSample

MAX_FIELD = 16 << 20  # characters; an unclosed field would extend to the end of the table
MAX_LINE = 256 << 20
csv.field_size_limit(MAX_FIELD)


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
        separator: str = ",",
    ) -> Table:
        """Opens a table and checks its columns; where there is a label without classes, reads the table once for them.

        Args:
            file: a path or URL.
            columns: the columns to use; its root "" means the folder of the table.
            where: column -> value that kept rows hold.
            exclude: column -> regular expression of dropped rows.
            separator: one character, or "tab".

        Raises:
            InputError: a missing column, or an option that cannot be used.
        """
        separator = "\t" if separator in ("\\t", "tab") else separator
        if len(separator) != 1:
            raise InputError(f"--separator {separator!r}: expected one character, or tab")
        header, where, exclude = _header(file, separator), dict(where or {}), dict(exclude or {})
        columns = replace(columns, root=columns.root or _folder(file))
        columns.check(header, file)
        for column in (*where, *exclude):
            if column not in header:
                raise InputError(f"{file} has no column {column!r} (--where, --exclude-regex); it has {some(header)}")
        for column, pattern in exclude.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"--exclude-regex {column}={pattern}: {error}") from error
        chosen = tuple(where.items()), tuple(exclude.items())
        if columns.label is not None and columns.classes is None:
            position = header.index(columns.label)
            labels = (row[position] for _, _, row in _chosen(file, separator, header, *chosen) if not isinstance(row, str))
            columns = replace(columns, classes=class_names(labels, f"column {columns.label}"))
        return Table(file, separator, columns, tuple(columns.top(header)), *chosen)

    @property
    def classes(self) -> list[str] | None:
        return None if self.columns.classes is None else list(self.columns.classes)

    def tasks(self, max_count: int) -> Iterator[tuple[Row, ...]]:
        header = _header(self.file, self.separator)
        positions = [header.index(column) for column in self.used]
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


def _rows(file: str, separator: str) -> Iterator[tuple[int, list[str] | str]]:
    """Yields (first line, fields) of every row, the header first.

    A malformed row has a description of its problem in place of fields. An unclosed quote swallows the lines below it:
    these are
    read again as rows of their own. Bytes that are not UTF-8 remain as surrogates, and are reported when they are
    used.
    """
    with files.open_text(file) as handle:
        again: deque[str] = deque()  # lines to read before those of the file
        taken: list[str] = []  # the lines of the current row
        line = 1
        while True:
            try:
                for row in csv.reader(_lines(handle, again, taken), delimiter=separator, strict=True):
                    if row:
                        yield line, row
                    line += len(taken)
                    taken.clear()
                return
            except csv.Error as error:
                remedy = "Close its quotes, and double those that are meant literally"
                yield line, f"{error}. {remedy}" + (", or build it as `tsv`, which knows no quotes." if separator == "\t" else ".")
                again.extendleft(reversed(taken[1:]))
                line += 1
                taken.clear()


def _lines(handle: IO[str], again: deque[str], taken: list[str]) -> Iterator[str]:
    """Yields lines; raises csv.Error after a line that is too long to hold."""
    while line := again.popleft() if again else handle.readline(MAX_LINE):
        taken.append(line)
        if len(line) == MAX_LINE and not line.endswith("\n"):
            while (rest := handle.readline(MAX_LINE)) and not rest.endswith("\n"):
                pass
            raise csv.Error(f"a line of more than {MAX_LINE} characters")
        yield line


def _header(file: str, separator: str) -> list[str]:
    for line, header in _rows(file, separator):
        if isinstance(header, str):
            raise InputError(f"{file}, line {line}: {header}")
        again = [column for column, count in Counter(header).items() if count > 1]
        if again:
            raise InputError(f"{file}: column {again[0]!r} comes twice in its header. Rename one.")
        return header
    raise InputError(f"{file}: an empty table, expected a header line that names the columns")


def _chosen(
    file: str, separator: str, header: list[str], where: tuple[tuple[str, str], ...], exclude: tuple[tuple[str, str], ...]
) -> Iterator[tuple[int, int, list[str] | str]]:
    """Yields (number in the table, line, fields) of the rows that --where and --exclude-regex keep, and of malformed ones."""
    wanted = [(header.index(column), value) for column, value in where]
    excluded = [(header.index(column), re.compile(pattern)) for column, pattern in exclude]
    rows = _rows(file, separator)
    next(rows)
    for number, (line, row) in enumerate(rows):
        if isinstance(row, str):
            yield number, line, row
        elif len(row) != len(header):
            yield number, line, f"expected {len(header)} fields ({some(header)}), found {len(row)}"
        elif all(row[i] == value for i, value in wanted) and not any(pattern.search(row[i]) for i, pattern in excluded):
            yield number, line, row
