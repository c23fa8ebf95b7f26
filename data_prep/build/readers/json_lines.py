"""The reader of tables with one record per line: JSON Lines, and tab-separated values without quoting. A task is a span of lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_prep import files
from data_prep.build.readers.columns import Columns, lookup
from data_prep.build.readers.members import attempt, class_names
from data_prep.records import InputError, Record, Skipped
from mmpretrain.data.schema import BadSample
from mmpretrain.data.shard_names import is_remote
from mmpretrain.data.tables import START, Header, TableError, check_text, some

MAX_LINE = 256 << 20  # a longer line is skipped, and never held in memory
CHUNK = 4 << 20


@dataclass(frozen=True)
class Span:
    """Lines `line` (from 1) to `line + count - 1` of a file, from byte `offset`; `number` is that of the first in the whole input."""

    file: str
    offset: int
    line: int
    count: int
    number: int


def open_bytes(url: str) -> IO[bytes]:
    """Opens a file or URL for reading."""
    where = files.place(url)
    if isinstance(where, Path):
        return where.open("rb")
    system, path = files.filesystem(where)
    return system.open(path, "rb")


def _starts(handle: IO[bytes]) -> Iterator[int]:
    """Yields the byte offset of every line, in one pass."""
    offset, line_begins = 0, True
    while chunk := handle.read(CHUNK):
        if line_begins:
            yield offset
        ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + offset + 1
        offset += len(chunk)
        line_begins = len(ends) > 0 and int(ends[-1]) == offset
        yield from (ends[:-1] if line_begins else ends).tolist()


def _read(handle: IO[bytes]) -> bytes | None:
    """Reads the next line without its end; returns None for one that is too long to hold."""
    line = handle.readline(MAX_LINE)
    if len(line) < MAX_LINE or line.endswith(b"\n"):
        return line.rstrip(b"\r\n")
    while line and not line.endswith(b"\n"):
        line = handle.readline(CHUNK)
    return None


def parse_json(line: bytes) -> dict[str, Any]:
    """Parses a line of JSON Lines. Raises BadSample: not_utf8, bad_json."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSample("not_utf8", str(error)[:200]) from error
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error)[:200]) from error
    if not isinstance(value, dict):
        raise BadSample("bad_json", f"expected an object, found {type(value).__name__}")
    return value


@dataclass(frozen=True)
class Lines:
    """Reader of lines. `header`: the column names of tab-separated values; None: JSON Lines."""

    inputs: tuple[str, ...]
    columns: Columns
    header: tuple[str, ...] | None = None
    skip_first: bool = False  # the first line of each file is its header

    @property
    def classes(self) -> list[str] | None:
        return None if self.columns.classes is None else list(self.columns.classes)

    def parse(self, line: bytes) -> dict[str, Any]:
        """Parses a line to column -> value. Raises BadSample: not_utf8, bad_json, bad_row."""
        if self.header is None:
            return parse_json(line)
        try:
            cells = line.decode("utf-8-sig").split("\t")
        except UnicodeDecodeError as error:
            raise BadSample("not_utf8", str(error)[:200]) from error
        if len(cells) != len(self.header):
            raise BadSample("bad_row", f"{len(cells)} fields, expected {len(self.header)} ({', '.join(self.header)})")
        return dict(zip(self.header, cells))

    def tasks(self, max_count: int) -> Iterator[Span]:
        number = 0
        for file in self.inputs:
            line = count = offset = 0
            with open_bytes(file) as handle:
                for line, line_offset in enumerate(_starts(handle), 1):
                    if line == 1 and self.skip_first:
                        continue
                    if count == max_count:
                        yield Span(file, offset, line - count, count, number)
                        number, count = number + count, 0
                    offset = line_offset if count == 0 else offset
                    count += 1
            if count:
                yield Span(file, offset, line - count + 1, count, number)
                number += count

    def rows(self, span: Span) -> Iterator[tuple[int, bytes | None]]:
        """Yields (index in the span, line) of the lines that are not blank; None for a line that is too long."""
        with open_bytes(span.file) as handle:
            handle.seek(span.offset)
            for i in range(span.count):
                line = _read(handle)
                if line is None or line.strip(b" \t\r\n\xef\xbb\xbf"):
                    yield i, line

    def __call__(self, task: Span) -> Iterator[Record | Skipped]:
        name = task.file.rpartition("/")[2]
        for i, line in self.rows(task):
            where = f"{name}, line {task.line + i}"
            if line is None:
                yield Skipped(where, "long_line", f"more than {MAX_LINE} bytes")
            else:
                yield attempt(where, lambda i=i, line=line: self.columns.record(task.number + i, self.parse(line)))

    def sources(self, task: Span) -> Iterator[str | None]:
        yield task.file
        for _, line in self.rows(task) if not self.columns.base64 and not is_remote(self.columns.root) else ():
            if line is not None:
                with suppress(BadSample):
                    yield self.columns.source(self.parse(line))


def _sample(reader: Lines, file: str, max_rows: int) -> Iterator[dict[str, Any]]:
    """Yields the first rows of a file, without unreadable ones."""
    for i, line in reader.rows(Span(file, 0, 1, max_rows, 0)):
        if line is not None and (i or not reader.skip_first):
            try:
                yield reader.parse(line)
            except BadSample:
                continue


def _checked(reader: Lines) -> Lines:
    """Checks the columns against the beginning of each file, and adds the classes of the label column."""
    for file in reader.inputs:
        if reader.header is None:
            existing: dict[str, None] = {}
            for row in _sample(reader, file, 100):
                existing |= dict.fromkeys(row)
            if existing:
                reader.columns.check(existing, file)
        else:
            reader.columns.check([name for name in reader.header if name.strip()], file)
    if reader.columns.label is None or reader.columns.classes is not None:
        return reader
    classes = class_names(_labels(reader, reader.columns.label), f"column {reader.columns.label}")
    return replace(reader, columns=replace(reader.columns, classes=classes))


def _labels(reader: Lines, label: str) -> Iterator[Any]:
    for span in reader.tasks(1 << 20):
        for _, line in reader.rows(span):
            try:
                value = lookup(reader.parse(line), label) if line is not None else None
            except BadSample:
                continue
            yield value if isinstance(value, str | int) else None


def _first_bytes(file: str, check: Callable[[bytes], str | None]) -> bytes:
    with open_bytes(file) as handle:
        start = handle.readline(START)
    try:
        check_text(file, start, bytewise=True)
    except TableError as error:
        raise InputError(str(error)) from error
    if problem := check(start):
        raise InputError(f"{file}: {problem}")
    return start


def json_lines(inputs: list[str], columns: Columns) -> Lines:
    """Opens a reader of JSON Lines files. Raises InputError for a file of another kind or a missing column, OSError."""

    def check(start: bytes) -> str | None:
        array = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
        return "a JSON array, expected one object a line: convert it, e.g. with jq -c '.[]'" if array else None

    for file in inputs:
        _first_bytes(file, check)
    return _checked(Lines(tuple(inputs), columns))


def tab_separated(inputs: list[str], columns: Columns, header: list[str] | None = None) -> Lines:
    """Opens a reader of tab-separated files without quoting.

    Args:
        inputs: paths or URLs.
        columns: the columns to use.
        header: the column names, where the files have no header line.

    Raises:
        InputError: the headers of the files differ or lack a column.
        OSError: a file cannot be read.
    """
    common = header
    for file in inputs:
        start = _first_bytes(file, lambda start: None if start.strip() else "empty, expected a header line")
        if header is None:
            names = start.decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")
            if common is not None and names != common:
                raise InputError(f"{file}: its header ({some(names)}) differs from that of {inputs[0]} ({some(common)})")
            common = names
    if not common:
        raise InputError(f"{inputs[0]}: no column names, expected a header line or --columns")
    for column in columns.top(common):
        if column in common:
            Header(inputs[0], tuple(common)).place(column)
    return _checked(Lines(tuple(inputs), columns, tuple(common), header is None))
