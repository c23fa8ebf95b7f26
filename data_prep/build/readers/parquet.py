"""The reader of parquet tables. A task is a span of rows; a worker holds a few rows of the needed columns at a time."""

from __future__ import annotations

import json
from bisect import bisect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

from data_prep import files
from data_prep.build.readers.columns import CELL_ERRORS, BadCell, Columns, lookup
from data_prep.build.readers.json_lines import open_bytes
from data_prep.build.readers.members import attempt, class_names
from data_prep.records import InputError, Record, Skipped
from mmpretrain.data.formats import foreign_kind

BATCH = 32  # rows decoded at a time: they may hold whole photos


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop - 1` of a file; `number` is that of the first in the whole input."""

    file: str
    start: int
    stop: int
    number: int


@contextmanager
def opened(file: str) -> Iterator[Any]:
    """Opens a file as a pyarrow ParquetFile. Raises InputError for a file of another kind."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError("reading parquet needs pyarrow: pip install pyarrow") from error
    with open_bytes(file) as handle:
        try:
            table = parquet.ParquetFile(handle, buffer_size=4 << 20)  # without it, a column of a row group is held whole
        except (pyarrow.ArrowInvalid, OSError) as error:
            handle.seek(0)
            noun, remedy = foreign_kind(handle.read(512)) or ("", "")
            what = (
                f"{noun}, not a parquet file. {remedy}" if noun and noun != "a parquet file" else f"not a readable parquet file ({error})."
            )
            raise InputError(f"{file}: {what}{'' if remedy else ' Fetch or write it again.'}") from error
        yield table


def rows_of(batch: Any) -> list[dict[str, Any]]:
    """Converts a pyarrow RecordBatch or Table to rows, with a BadCell for each value that Python cannot hold."""
    try:
        return batch.to_pylist()
    except CELL_ERRORS:
        columns = {name: [_value(cell) for cell in batch.column(name)] for name in batch.schema.names}
        return [dict(zip(columns, cells)) for cells in zip(*columns.values())]


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except CELL_ERRORS as error:
        return BadCell(f"a {cell.type}: {' '.join(str(error).split())[:200]}")


class _Cursor:
    """A position in a file. A row group is decoded from its start, so the tasks of a large one share a cursor."""

    def __init__(self, file: str, names: tuple[str, ...]) -> None:
        self._file, self._names = file, names
        self._open = ExitStack()
        self._table = self._open.enter_context(opened(file))
        self.edges = [0, *accumulate(self._table.metadata.row_group(i).num_rows for i in range(self._table.num_row_groups))]
        self._group, self._first = -1, 0  # the batch begins at row `_first`
        self._batch: Any = ()  # a pyarrow.RecordBatch, once one is read
        self._batches: Iterator[Any] = iter(())

    def __del__(self) -> None:
        self._open.close()

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (number in the file, row) of rows `start` to `stop - 1`. Raises InputError where the file cannot be decoded."""
        while start < min(stop, self.edges[-1]):
            self._seek(start)
            end = min(stop, self._first + len(self._batch))
            yield from enumerate(rows_of(self._batch.slice(start - self._first, end - start)), start)
            start = end

    def _seek(self, row: int) -> None:
        import pyarrow

        group = bisect(self.edges, row) - 1
        try:
            if group != self._group or row < self._first:
                self._group, self._first, self._batch = group, self.edges[group], ()
                self._batches = self._table.iter_batches(BATCH, row_groups=[group], columns=list(self._names))
            while row >= self._first + len(self._batch):
                self._first += len(self._batch)
                self._batch = next(self._batches)
        except (pyarrow.ArrowException, OSError, StopIteration) as error:
            detail = " ".join(str(error).split()) or "it ends early"
            raise InputError(f"{self._file}, rows from {self._first}: not decodable ({detail}). Fetch or write the file again.") from error


@lru_cache(maxsize=1)
def _cursor(file: str, names: tuple[str, ...], state: str) -> _Cursor:
    """Caches the last cursor: the next task of a worker usually continues in the same file. `state` changes with the file."""
    return _Cursor(file, names)


def rows(file: str, start: int, stop: int, names: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number in the file, row) of rows `start` to `stop - 1`, of the columns `names`. Raises InputError."""
    return _cursor(file, tuple(names), files.states([file])).rows(start, stop)


@dataclass(frozen=True)
class Parquet:
    """Reader of parquet files; see `parquet_files`."""

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
    """Returns the class names that Hugging Face `datasets` stores in the metadata of a file; None without them."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
        return tuple(map(str, noted))
    except (KeyError, TypeError, ValueError):
        return None


def _holder(names: list[str], column: str) -> list[str]:
    """Returns the column that must be read for `column`: itself, or `a` for `a.b`."""
    return [column if column in names else column.partition(".")[0]]


def parquet_files(inputs: list[str], columns: Columns) -> Parquet:
    """Opens a reader of parquet files. Raises InputError for a file of another kind or a missing column, OSError."""
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
