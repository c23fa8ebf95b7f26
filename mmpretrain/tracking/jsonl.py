"""JSON Lines files of a run: appended so that a crash can truncate only the last line; errors name file and line."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmpretrain.atomic import write_atomically
from mmpretrain.errors import FileError, MMPretrainError


def file_name(name: str, step: int | None) -> str:
    """Make a file name without folders: "clip/views" at step 40 -> "clip_views-00000040"; step None -> "clip_views-final"."""
    stem = re.sub(r"[^A-Za-z0-9_.@-]+", "_", name).strip(".") or "_"
    return f"{stem}-{step:08d}" if step is not None else f"{stem}-final"


def jsonable(value: Any) -> Any:
    """Convert for JSON: tensors and NumPy values to Python ones, bytes to base64, NaN and infinity to None."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(v) for v in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


class LogError(MMPretrainError, ValueError):
    """A line of a run's own files is corrupt. The message names file, line and remedy."""


class JsonLines:
    """A file of JSON objects, one per line, written so that a crash can truncate only the last line."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._repaired = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one line in a single write. Raises OSError where the disk is full; the file is then as before."""
        line = (json.dumps(jsonable(record), ensure_ascii=False) + "\n").encode("utf-8", "replace")
        if not self._repaired:
            self._repair()
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(file).st_size
            try:
                written = os.write(file, line)
            except OSError:
                os.ftruncate(file, size)
                raise
            if written < len(line):
                os.ftruncate(file, size)
                raise FileError(f"{self.path}: {written} of {len(line)} bytes of a line were written; is the disk full?")
        finally:
            os.close(file)

    def truncate_after(self, step: int) -> None:
        """Keep the lines whose `step` is null or at most `step`; drop a truncated last line. For resuming."""
        if not self.path.exists():
            return
        records = read_jsonl(self.path)
        if wrong := [r for r in records if not isinstance(r.get("step"), int | None)]:
            raise LogError(f"{self.path}: a line's step is {wrong[0]['step']!r:.60}, expected a number. Delete that line to continue.")
        kept = [r for r in records if r.get("step") is None or r["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))

    def _repair(self) -> None:
        """Remove a truncated last line, which would make the next one unreadable too."""
        self._repaired = True
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end == len(data):
            return
        with self.path.open("r+b") as file:
            if _record(data[end:]) is None:
                file.truncate(end)
            else:  # complete, but without its newline: an editor wrote it
                file.seek(len(data))
                file.write(b"\n")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_jsonl(path: str | Path, strict: bool = True) -> list[dict[str, Any]]:
    """Read the records of a JSON Lines file; [] if it does not exist. A truncated last line is left out.

    Args:
        path: of the file.
        strict: raise for any other line that is not a JSON object; else warn and leave it out.

    Raises:
        LogError: with file and line.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = _record(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):  # the last piece has no newline: truncated by a crash
            problem = f"{path}, line {number}: expected a JSON object, found {line[:60]!r}"
            if strict:
                raise LogError(f"{problem}. Delete that line to continue.")
            warnings.warn(f"{problem}; left out", stacklevel=2)
    return records


def latest_results(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the last line of each (evaluator, name, dataset), in order of first appearance."""
    last: dict[tuple, dict[str, Any]] = {}
    for line in lines:
        last[tuple(str(line.get(k)) for k in ("evaluator", "name", "dataset"))] = dict(line)
    return list(last.values())
