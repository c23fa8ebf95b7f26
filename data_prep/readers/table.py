"""A CSV or TSV table with image paths, read as a stream: of many million rows only those under way are held."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep import files
from data_prep.readers.base import chunks
from data_prep.readers.columns import Columns
from data_prep.readers.parts import attempt, class_names, some
from data_prep.records import InputError, Record, Skipped

Row = tuple[int, int, tuple[str, ...]]  # number in the table, line, the values of `used`
csv.field_size_limit(1 << 24)


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
            labels = (row[at] for _, _, row in _chosen(file, separator, header, *chosen))
            columns = replace(columns, classes=class_names(labels, f"column {columns.label}"))
        return Table(file, separator, columns, tuple(columns.top(header)), *chosen)

    @property
    def classes(self) -> list[str] | None:
        return None if self.columns.classes is None else list(self.columns.classes)

    def tasks(self, max_count: int) -> Iterator[tuple[Row, ...]]:
        header = _header(self.file, self.separator)
        at = [header.index(column) for column in self.used]
        rows = _chosen(self.file, self.separator, header, self.where, self.exclude)
        yield from chunks(((number, line, tuple([row[i] for i in at])) for number, line, row in rows), max_count)

    def __call__(self, task: tuple[Row, ...]) -> Iterator[Record | Skipped]:
        name = self.file.rpartition("/")[2]
        for number, line, values in task:
            row = dict(zip(self.used, values))
            yield attempt(f"{name}, line {line}", lambda number=number, row=row: self.columns.record(number, row))

    def sources(self, task: tuple[Row, ...]) -> Iterator[str | None]:
        """The images; the rows themselves are in the task."""
        return (self.columns.source(dict(zip(self.used, values))) for _, _, values in task)


def _folder(file: str) -> str:
    return file.rpartition("/")[0] if files.is_remote(file) else str(Path(files.place(file)).parent)


def _rows(file: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line, fields), the header's first. Bytes that are not UTF-8 stay apart as surrogates, and are found when they are used."""
    with files.open_text(file) as handle:
        reader = csv.reader(handle, delimiter=separator, strict=True)  # else a quote that nothing closes swallows the rows below it
        last = 0
        try:
            for row in reader:
                last = reader.line_num
                if row:
                    yield last, row
        except csv.Error as error:
            raise InputError(
                f"{file}, line {last + 1}: {error}. Close its quotes, and double those that are meant literally"
                + (", or build it as `tsv`, which knows no quotes." if separator == "\t" else ".")
            ) from error


def _header(file: str, separator: str) -> list[str]:
    for _, header in _rows(file, separator):
        again = [column for column, count in Counter(header).items() if count > 1]
        if again:
            raise InputError(f"{file}: column {again[0]!r} comes twice in its header. Rename one.")
        return header
    raise InputError(f"{file}: an empty table, expected a header line that names the columns")


def _chosen(
    file: str, separator: str, header: list[str], where: tuple[tuple[str, str], ...], exclude: tuple[tuple[str, str], ...]
) -> Iterator[tuple[int, int, list[str]]]:
    """(number in the table, line, fields) of the rows that --where and --exclude-regex leave."""
    wanted = [(header.index(column), value) for column, value in where]
    excluded = [(header.index(column), re.compile(pattern)) for column, pattern in exclude]
    rows = _rows(file, separator)
    next(rows)
    for number, (line, row) in enumerate(rows):
        if len(row) != len(header):
            raise InputError(f"{file}, line {line}: expected {len(header)} fields ({some(header)}), found {len(row)}")
        if all(row[i] == value for i, value in wanted) and not any(pattern.search(row[i]) for i, pattern in excluded):
            yield number, line, row
