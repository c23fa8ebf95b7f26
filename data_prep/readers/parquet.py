"""Parquet tables: a task is a span of rows. A worker holds no more than a row group or two of the columns that it needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from data_prep.readers.columns import Columns, lookup
from data_prep.readers.lines import open_bytes
from data_prep.readers.parts import attempt, class_names
from data_prep.records import InputError, Record, Skipped

BATCH = 32  # rows decoded at a time: they may hold whole photos


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop - 1` of a file; `number` is the first one's in the whole input."""

    file: str
    start: int
    stop: int
    number: int


@contextmanager
def opened(file: str) -> Iterator[Any]:
    """A pyarrow ParquetFile. Raises InputError for a file that is none."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError("reading parquet needs pyarrow: pip install pyarrow") from error
    with open_bytes(file) as handle:
        try:
            table = parquet.ParquetFile(handle, buffer_size=4 << 20)  # else a row group's column is held whole
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise InputError(f"{file}: not a readable parquet file ({error}). Fetch or write it again.") from error
        yield table


def rows(file: str, start: int, stop: int, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number in the file, row) of the rows from `start` to `stop`, of the columns `names`."""
    with opened(file) as table:
        first = 0
        for group in range(table.num_row_groups):
            end = first + table.metadata.row_group(group).num_rows
            if end > start and first < stop:
                at = first
                for batch in table.iter_batches(BATCH, row_groups=[group], columns=names):
                    low, high = max(start - at, 0), min(stop - at, len(batch))
                    if low < high:
                        yield from enumerate(batch.slice(low, high - low).to_pylist(), at + low)
                    at += len(batch)
                    if at >= stop:
                        break
            first = end


@dataclass(frozen=True)
class Parquet:
    inputs: tuple[str, ...]
    columns: Columns
    names: tuple[str, ...]  # the columns to read

    @property
    def classes(self) -> list[str] | None:
        return None if self.columns.classes is None else list(self.columns.classes)

    def tasks(self, max_count: int) -> Iterator[Rows]:
        number = 0
        for file in self.inputs:
            with opened(file) as table:
                total = table.metadata.num_rows
            for start in range(0, total, max_count):
                stop = min(start + max_count, total)
                yield Rows(file, start, stop, number + start)
            number += total

    def __call__(self, task: Rows) -> Iterator[Record | Skipped]:
        name, shift = task.file.rpartition("/")[2], task.number - task.start
        for i, row in rows(task.file, task.start, task.stop, list(self.names)):
            yield attempt(f"{name}, row {i}", lambda i=i, row=row: self.columns.record(shift + i, row))

    def sources(self, task: Rows) -> Iterator[str | None]:
        yield task.file


def _feature_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """The class names that Hugging Face `datasets` notes in the file's metadata, if it does."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
        return tuple(map(str, noted))
    except (KeyError, TypeError, ValueError):
        return None


def _holder(names: list[str], column: str) -> list[str]:
    """The column that must be read to have `column`: itself, or `a` for `a.b`."""
    return [column if column in names else column.partition(".")[0]]


def parquet_files(inputs: list[str], columns: Columns) -> Parquet:
    """A reader of parquet files. Raises InputError for a file of another kind or a missing column, OSError."""
    names: list[str] = []
    noted: tuple[str, ...] | None = None
    for file in inputs:
        with opened(file) as table:
            schema = table.schema_arrow
        columns.check(schema.names, file)
        names = columns.top(schema.names)
        noted = _feature_names(schema, columns.label) if columns.label else None
    if columns.label is not None and columns.classes is None:
        label = columns.label
        cells = (lookup(row, label) for file in inputs for _, row in rows(file, 0, 1 << 62, _holder(names, label)))
        columns = replace(columns, classes=noted or class_names(cells, f"column {label}"))
    return Parquet(tuple(inputs), columns, tuple(names))
