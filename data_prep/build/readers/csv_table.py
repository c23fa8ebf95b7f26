"""A CSV or TSV table with image paths, read as a stream: of many million rows only those under way are held."""

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

MAX_FIELD = 16 << 20  # characters; a field that nothing closes would go on to the end of the table
MAX_LINE = 256 << 20
csv.field_size_limit(MAX_FIELD)


class Row(NamedTuple):
    """A row's number in the table, its first line, and the values of `used`; or `problem`: why it is none."""

    number: int
    line: int
    values: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True)
class Table:
    """One record a row, in the table's order."""

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
        """Checks the columns; where there is a label reads the table once for its classes. `columns.root` "": the table's folder.

        Raises InputError.
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
            at = header.index(columns.label)
            labels = (row[at] for _, _, row in _chosen(file, separator, header, *chosen) if not isinstance(row, str))
            columns = replace(columns, classes=class_names(labels, f"column {columns.label}"))
        return Table(file, separator, columns, tuple(columns.top(header)), *chosen)

    @property
    def classes(self) -> list[str] | None:
        return None if self.columns.classes is None else list(self.columns.classes)

    def tasks(self, max_count: int) -> Iterator[tuple[Row, ...]]:
        header = _header(self.file, self.separator)
        at = [header.index(column) for column in self.used]
        rows = _chosen(self.file, self.separator, header, self.where, self.exclude)
        yield from chunks(
            (
                Row(number, line, (), row) if isinstance(row, str) else Row(number, line, tuple([row[i] for i in at]))
                for number, line, row in rows
            ),
            max_count,
        )

    def __call__(self, task: tuple[Row, ...]) -> Iterator[Record | Skipped]:
        name = self.file.rpartition("/")[2]
        for row in task:
            yield attempt(f"{name}, line {row.line}", lambda row=row: self._record(row))

    def _record(self, row: Row) -> Record:
        """Raises BadSample."""
        if row.problem:
            raise BadSample("bad_row", row.problem)
        return self.columns.record(row.number, dict(zip(self.used, row.values)))

    def sources(self, task: tuple[Row, ...]) -> Iterator[str | None]:
        """The images; the rows themselves are in the task."""
        return (self.columns.source(dict(zip(self.used, row.values))) for row in task if not row.problem)


def _folder(file: str) -> str:
    return file.rpartition("/")[0] if files.is_remote(file) else str(Path(files.place(file)).parent)


def _rows(file: str, separator: str) -> Iterator[tuple[int, list[str] | str]]:
    """(first line, fields), the header's first; in place of fields, what is wrong with that line.

    A quote that nothing closes swallows the lines below: these are read again as rows of their own. Bytes that are not UTF-8 stay apart as
    surrogates, and are found when they are used.
    """
    with files.open_text(file) as handle:
        again: deque[str] = deque()  # lines to read before those of the file
        taken: list[str] = []  # the lines of the row under way
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
    """Raises csv.Error for a line that is too long to hold, once it is passed."""
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
    """(number in the table, line, fields) of the rows that --where and --exclude-regex leave, and of those that are none (see `_rows`)."""
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
