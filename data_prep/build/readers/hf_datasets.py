"""Hugging Face `datasets`: saved on disk, or from the hub, as a stream too. Images are not decoded: their bytes pass through."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from data_prep import files
from data_prep.build.readers.columns import Columns, lookup
from data_prep.build.readers.members import attempt, class_names
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
    """Rows that a stream gave, the first of them number `start`."""

    start: int
    rows: tuple[dict[str, Any], ...]

    def __repr__(self) -> str:  # what tells tasks apart: short, though the rows hold images
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
        return f"Streamed(start={self.start}, rows={len(self.rows)}, sha256={digest.hexdigest()})"


@dataclass(frozen=True)
class Hub:
    """`dataset` is a Dataset or IterableDataset of the columns that are needed, undecoded. Pickled, a Dataset is a list of file names."""

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
        for row in self.dataset:
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
        """The rows' content is in the task."""
        return iter(())


def _size(cell: Any) -> int:
    value = cell.get("bytes") if isinstance(cell, dict) else cell
    return len(value) if isinstance(value, bytes | str) else 0


def _rows(dataset: Any, start: int, stop: int) -> Iterator[tuple[int, dict[str, Any]]]:
    for low in range(start, stop, ROWS):
        batch = dataset[low : min(low + ROWS, stop)]
        for i in range(min(ROWS, stop - low)):
            yield low + i, {name: values[i] for name, values in batch.items()}


def _content(dataset: Any) -> str:
    """What the rows are, independent of how often the set was loaded: a Dataset's own fingerprint changes with the path it is cached at."""
    digest = hashlib.sha256(f"{len(dataset)} {dataset.features}".encode())
    for row in {0, len(dataset) // 2, len(dataset) - 1} if len(dataset) else ():
        digest.update(repr(dataset[row]).encode())
    return digest.hexdigest()[:16]


def folders(name: str, data_dir: str | None, data_files: list[str]) -> tuple[str, ...]:
    """Where the image files of a set may lie: in what was named, and where `datasets` keeps what it fetches."""
    from datasets import config
    from huggingface_hub.constants import HF_HUB_CACHE

    named = [name if os.path.isdir(name) else None, data_dir, *(file.partition("*")[0].rpartition("/")[0] or "." for file in data_files)]
    kept = [str(config.HF_DATASETS_CACHE), str(config.DOWNLOADED_DATASETS_PATH), str(HF_HUB_CACHE)]
    return tuple(dict.fromkeys(folder for folder in (*named, *kept) if folder is not None and not is_remote(folder)))


def load(name: str, config: str | None, split: str | None, stream: bool, data_dir: str | None, data_files: list[str] | None) -> Any:
    """A Dataset or IterableDataset. Raises InputError naming the splits where none was chosen of several, OSError."""
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
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, config, split=split, streaming=stream, data_dir=data_dir, data_files=data_files)
    except (DatasetsError, OSError) as error:
        raise InputError(f"{name}: {error}") from error
    if isinstance(found, dict):
        chosen = split or (next(iter(found)) if len(found) == 1 else None)
        if chosen is None or chosen not in found:
            names = ", ".join(map(str, found))
            raise InputError(f"{name} has the splits {names}, and not {split}." if split else f"{name}: --split one of {names}.")
        return found[chosen]
    if split and saved and str(getattr(found, "split", None) or split) != split:
        raise InputError(f"{name} is the split {found.split}, not {split}.")
    return found


def from_dataset(dataset: Any, columns: Columns, name: str) -> Hub:
    """A reader of a loaded set. Raises InputError for a missing column."""
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
        if class_names((lookup(row, label) for row in dataset.take(100)), f"column {label}") is None:
            return None
        raise InputError(f"column {label} of a stream has no class names of its own: give them in their order with --classes FILE.")
    holder = dataset.select_columns([label if label in dataset.features else label.partition(".")[0]])
    return class_names((lookup(row, label) for _, row in _rows(holder, 0, len(holder))), f"column {label}")
