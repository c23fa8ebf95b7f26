"""JSON lines of a run: appended so that a crash can tear the last line only, read with file and line in every error."""

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

from mmpretrain.errors import FileError, MMPretrainError


def file_name(name: str, step: int | None) -> str:
    """A name that stays inside its folder: "clip/views" at step 40 -> "clip_views-00000040"; step None -> "clip_views-final"."""
    stem = re.sub(r"[^A-Za-z0-9_.@-]+", "_", name).strip(".") or "_"
    return f"{stem}-{step:08d}" if step is not None else f"{stem}-final"


def jsonable(value: Any) -> Any:
    """Tensors and NumPy values as Python ones, bytes in base64, and NaN or infinity as None: JSON knows none of these."""
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
    """A line of a run's own files that says nothing. The message names file, line and remedy."""


class JsonLines:
    """A file of JSON objects, one a line, written so that a crash can tear the last line only."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._mended = False

    def append(self, record: Mapping[str, Any]) -> None:
        """One write per line. Raises OSError, with the file as it was before, when the line does not fit on the disk."""
        line = (json.dumps(jsonable(record), ensure_ascii=False) + "\n").encode("utf-8", "replace")
        if not self._mended:
            self._mend()
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
        """Keep the lines whose `step` is null or at most `step`; drop the rest, and a torn last line. For resuming."""
        if not self.path.exists():
            return
        records = read_jsonl(self.path)
        if wrong := [r for r in records if not isinstance(r.get("step"), int | None)]:
            raise LogError(f"{self.path}: a line's step is {wrong[0]['step']!r:.60}, expected a number. Delete that line to go on.")
        kept = [r for r in records if r.get("step") is None or r["step"] <= step]
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def _mend(self) -> None:
        """Cut a torn last line, else the next line would be glued to it and both lost."""
        self._mended = True
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        end = data.rfind(b"\n") + 1
        if end == len(data):
            return
        with self.path.open("r+b") as file:
            if _record(data[end:]) is None:
                file.truncate(end)
            else:  # whole, but without its newline: an editor wrote it
                file.seek(len(data))
                file.write(b"\n")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_jsonl(path: str | Path, strict: bool = True) -> list[dict[str, Any]]:
    """The records of a JSON lines file; [] if it does not exist. A torn last line is left out.

    Any other line that is not a JSON object raises LogError naming file and line, or is left out with a warning if not `strict`.
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
        elif number < len(lines):  # the last piece has no newline behind it: torn by a crash
            problem = f"{path}, line {number}: expected a JSON object, found {line[:60]!r}"
            if strict:
                raise LogError(f"{problem}. Delete that line to go on.")
            warnings.warn(f"{problem}; left out", stacklevel=2)
    return records


def latest_results(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The last line of each (evaluator, name, dataset), in order of first appearance."""
    last: dict[tuple, dict[str, Any]] = {}
    for line in lines:
        last[tuple(str(line.get(k)) for k in ("evaluator", "name", "dataset"))] = dict(line)
    return list(last.values())
