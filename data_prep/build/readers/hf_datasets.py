"""The reader of Hugging Face `datasets`: saved on disk, from the hub, or streamed. Image bytes pass through undecoded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from data_prep import files
from data_prep.build.readers.columns import CELL_ERRORS, Columns, lookup
from data_prep.build.readers.members import attempt, class_names
from data_prep.build.readers.parquet import rows_of
from data_prep.records import InputError, Record, Skipped
from mmpretrain.data.shard_names import is_remote

STREAM_BYTES = 128 << 20  # of image bytes in one task of a stream, which is held in memory
ROWS = 64  # read at a time


@dataclass(frozen=True)
class Rows:
    """Rows `start` to `stop - 1` of a set whose content is `fingerprint`."""

    start: int
    stop: int
    fingerprint: str


@dataclass(frozen=True, repr=False)
class Streamed:
    """Rows of a stream, numbered from `start`."""

    start: int
    rows: tuple[dict[str, Any], ...]

    def __repr__(self) -> str:  # identifies the task; short, though the rows hold images
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
        return f"Streamed(start={self.start}, rows={len(self.rows)}, sha256={digest.hexdigest()})"


@dataclass(frozen=True)
class Hub:
    """Reader of a data set.

    `dataset` is a Dataset or IterableDataset of the needed columns, undecoded. A Dataset pickles to a list of file names.
    """

    dataset: Any
    columns: Columns
    name: str
    stream: bool = False

    @property
    def classes(self) -> list[str] | None:
        return None if self.columns.classes is None else list(self.columns.classes)

    def tasks(self, max_count: int) -> Iterator[Rows | Streamed]:
        if not self.stream:
            fingerprint = _content(self.dataset)
            for start in range(0, len(self.dataset), max_count):
                yield Rows(start, min(start + max_count, len(self.dataset)), fingerprint)
            return
        held: list[dict[str, Any]] = []
        start = size = 0
        for row in _streamed(self.dataset):
            held.append(dict(row))
            size += _size(row.get(self.columns.image))
            if len(held) == max_count or size > STREAM_BYTES:
                yield Streamed(start, tuple(held))
                start, held, size = start + len(held), [], 0
        if held:
            yield Streamed(start, tuple(held))

    def __call__(self, task: Rows | Streamed) -> Iterator[Record | Skipped]:
        for i, row in _rows(self.dataset, task.start, task.stop) if isinstance(task, Rows) else enumerate(task.rows, task.start):
            yield attempt(f"{self.name}, row {i}", lambda i=i, row=row: self.columns.record(i, row))

    def __getstate__(self) -> dict[str, Any]:  # a stream's rows come to a worker with each task
        return self.__dict__ | ({"dataset": None} if self.stream else {})

    def sources(self, task: Rows | Streamed) -> Iterator[str | None]:
        """Yields nothing: the content of the rows is part of the task."""
        return iter(())


def _size(cell: Any) -> int:
    value = cell.get("bytes") if isinstance(cell, dict) else cell
    return len(value) if isinstance(value, bytes | str) else 0


def _rows(dataset: Any, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for low in range(start, stop, ROWS):
        high = min(low + ROWS, stop)
        try:
            batch = dataset[low:high]
        except CELL_ERRORS:
            yield from ((i, _row(dataset, i)) for i in range(low, high))
            continue
        for i in range(high - low):
            yield low + i, {name: values[i] for name, values in batch.items()}


def _row(dataset: Any, i: int) -> dict[str, Any]:
    """Reads one row, with a BadCell for each value that Python cannot hold."""
    try:
        return dataset[i]
    except CELL_ERRORS:
        return rows_of(dataset.with_format("arrow")[i])[0]


def _streamed(dataset: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows of a stream. Where one cannot be converted, those from there on are converted value by value."""
    done = 0
    try:
        for row in dataset:
            yield row
            done += 1
    except CELL_ERRORS as error:
        try:
            for batch in dataset.skip(done).with_format("arrow").iter(1):
                yield from rows_of(batch)
        except CELL_ERRORS as again:
            raise InputError(f"row {done} of the stream cannot be read ({error}). Load the set without --stream.") from again


def _content(dataset: Any) -> str:
    """Digests the content of a set.

    The fingerprint of a Dataset changes with the path of its cache; this digest is the same however often the set is
    loaded.
    """
    digest = hashlib.sha256(f"{len(dataset)} {dataset.features}".encode())
    for row in {0, len(dataset) // 2, len(dataset) - 1} if len(dataset) else ():
        digest.update(repr(_row(dataset, row)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def folders(name: str, data_dir: str | None, data_files: list[str]) -> tuple[str, ...]:
    """Returns the folders in which image files of a set may lie: those named, and the caches of `datasets`."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    named = [name if os.path.isdir(name) else None, data_dir, *(file.partition("*")[0].rpartition("/")[0] or "." for file in data_files)]
    kept = [str(config.HF_DATASETS_CACHE), str(config.DOWNLOADED_DATASETS_PATH), str(HF_HUB_CACHE)]
    return tuple(dict.fromkeys(folder for folder in (*named, *kept) if folder is not None and not is_remote(folder)))


def load(name: str, config: str | None, split: str | None, stream: bool, data_dir: str | None, data_files: list[str] | None) -> Any:
    """Loads a Dataset or IterableDataset.

    Args:
        name: a folder of save_to_disk, a set of the hub, or a loader such as imagefolder.
        config: configuration of the set.
        split: its split; needed where there are several.
        stream: read the hub as a stream.
        data_dir: passed to load_dataset.
        data_files: passed to load_dataset.

    Raises:
        InputError: the set cannot be loaded, or none of several splits was chosen; the message lists them.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise InputError("reading Hugging Face sets needs datasets: pip install datasets") from error
    saved = any(files.exists(files.join(name, mark)) for mark in ("state.json", "dataset_dict.json"))
    try:
        if saved:
            if stream or config or data_dir or data_files:
                raise InputError(f"{name} was saved with save_to_disk: --stream, --name, --data-dir and --data-files are for the hub.")
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config, split=split, streaming=stream, data_dir=data_dir, data_files=data_files)
    except (DatasetsError, OSError) as error:
        raise InputError(f"{name}: {error}") from error
    if isinstance(loaded, dict):
        chosen = split or (next(iter(loaded)) if len(loaded) == 1 else None)
        if chosen is None or chosen not in loaded:
            names = ", ".join(map(str, loaded))
            raise InputError(f"{name} has the splits {names}, and not {split}." if split else f"{name}: --split one of {names}.")
        return loaded[chosen]
    if split and saved and str(getattr(loaded, "split", None) or split) != split:
        raise InputError(f"{name} is the split {loaded.split}, not {split}.")
    return loaded


def from_dataset(dataset: Any, columns: Columns, name: str) -> Hub:
    """Opens a reader of a loaded set; `name` is for messages. Raises InputError for a missing column."""
    import datasets

    stream = isinstance(dataset, datasets.IterableDataset)
    existing = list(dataset.features) if dataset.features else list(next(iter(dataset.take(1)), {}))
    columns.check(existing, name)
    dataset = dataset.select_columns(columns.top(existing))
    if dataset.features is not None:
        for column, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(column, datasets.Image(decode=False))
    if not stream:
        dataset = dataset.with_format(None)
    if columns.label is not None and columns.classes is None:
        columns = replace(columns, classes=_classes(dataset, columns.label, stream))
    return Hub(dataset, columns, name, stream)


def _classes(dataset: Any, label: str, stream: bool) -> tuple[str, ...] | None:
    feature = (dataset.features or {}).get(label)
    if feature is not None and hasattr(feature, "names"):
        return tuple(feature.names)
    if stream:
        if class_names((lookup(row, label) for row in _streamed(dataset.take(100))), f"column {label}") is None:
            return None
        raise InputError(f"column {label} of a stream has no class names of its own: give them in their order with --classes FILE.")
    holder = dataset.select_columns([label if label in dataset.features else label.partition(".")[0]])
    return class_names((lookup(row, label) for _, row in _rows(holder, 0, len(holder))), f"column {label}")
