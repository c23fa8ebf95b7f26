"""One task of a build, run by a worker: its shards, and a record of them from which a build resumes.

While a build runs, OUT/unfinished/ holds its plan and one record (a "note") per finished task.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import files
from data_prep.records import InputError, OutputError, Record, RecordError, Skipped, Split
from data_prep.shards.tar_writer import ShardFile, open_temporary
from mmpretrain.data import index as shard_index
from mmpretrain.data.cache import remote_index

UNFINISHED = "unfinished"


@dataclass
class Done:
    """Result of a task. `shards`: part -> name -> count, bytes, sha256, members; `keys`: uint64 [n], a digest per key."""

    task: str
    shards: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    keys: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))


def part_folder(out: str, part: str) -> str:
    """Returns the folder of a part's shards; "" is the only part of a build without a split."""
    return files.join(out, part) if part else out


def digest_of(*values: object) -> str:
    """Digests the reprs of values."""
    return hashlib.sha256("\0".join(map(repr, values)).encode("utf-8", "surrogateescape")).hexdigest()


def key_digest(key: str) -> bytes:
    """Digests a key to 8 bytes."""
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def key_digests(keys: Iterable[str]) -> np.ndarray:
    """Digests keys to uint64 [n]."""
    return np.frombuffer(b"".join(map(key_digest, keys)), np.uint64)


def index_keys(shard: str) -> list[str]:
    """Returns the keys in the index beside a shard; [] without an index."""
    index = remote_index(shard) if files.is_remote(shard) else shard_index.load(shard_index.index_path(files.place(shard)))[0]
    return [] if index is None else index.keys


class _Shards:
    """The shards of one task in one part; another begins where `max_bytes` would be exceeded."""

    def __init__(self, folder: str, number: int, max_bytes: int) -> None:
        self._folder, self._number, self._max_bytes = folder, number, max_bytes
        self._file: ShardFile | None = None
        self._scratch: tempfile.TemporaryDirectory | None = None
        self.written: dict[str, dict[str, Any]] = {}

    def _name(self) -> str:
        after = f"-{len(self.written):02d}" if self.written else ""
        return f"{self._number:05d}{after}.tar"

    def _where(self) -> Path:
        """Returns the path to write to: that of the shard, or for a URL one in a temporary folder."""
        where = files.place(self._folder)
        if isinstance(where, Path):
            where.mkdir(parents=True, exist_ok=True)
            return where / self._name()
        self._scratch = self._scratch or tempfile.TemporaryDirectory(prefix="data_prep-")
        return Path(self._scratch.name) / self._name()

    def add(self, record: Record) -> None:
        if self._file is not None and self._file.bytes + record.tar_bytes() > self._max_bytes:
            self.finish()
        if self._file is None:
            self._file = ShardFile(open_temporary(self._where()))
        self._file.add(record)

    def finish(self) -> None:
        if self._file is None:
            return
        file, name = self._file, self._name()
        index, sha256 = file.close()
        place = shard_index.index_path(self._where())
        shard_index.save(index, place)
        if self._scratch is not None:
            files.put(place, files.join(self._folder, place.name))
        files.put(file.path, files.join(self._folder, name))  # last: a shard at its final name is complete and indexed
        self._file = None
        self.written[name] = {"count": file.count, "bytes": file.bytes, "sha256": sha256, "members": index.counts()}

    def abandon(self) -> None:
        if self._file is not None:
            self._file.abandon()
        if self._scratch is not None:
            self._scratch.cleanup()


@dataclass(frozen=True)
class Job:
    """Does one numbered task, unless its note records that it is done. Runs in the workers."""

    out: str
    produce: Callable[[Any], Iterator[Record | Skipped]]
    plan: str
    max_bytes: int
    allow_skipped: bool
    split: Split | None

    def __call__(self, numbered: tuple[int, Any]) -> Done:
        number, task = numbered
        digest = self.task_digest(numbered)
        note = files.join(files.join(self.out, UNFINISHED), f"{number:05d}.json")
        done = self._known(note, digest) if files.exists(note) else None
        if done is None:
            done = self._do(number, task, digest)
            files.write_json(note, {"task": done.task, "shards": done.shards, "skipped": [asdict(item) for item in done.skipped]})
        return done

    def task_digest(self, numbered: tuple[int, Any]) -> str:
        """Digests a task and the state of its local input files, where `produce` names them (`sources`)."""
        sources = getattr(self.produce, "sources", None)
        return digest_of(self.plan, *numbered, *([files.states(sources(numbered[1]))] if sources else []))

    def _known(self, note: str, digest: str) -> Done | None:
        with suppress(ValueError, KeyError):  # truncated by a crash of the machine
            content = json.loads(files.read_bytes(note))
            if content["task"] != digest:
                if not any(content["shards"].values()):
                    return None
                raise OutputError(
                    f"{self.out} holds an unfinished build of other samples than these inputs give, or an input has "
                    f"changed since (see {note}). Choose another --out, or delete it."
                )
            names = [files.join(part_folder(self.out, part), name) for part, shards in content["shards"].items() for name in shards]
            sizes = [shard["bytes"] for shards in content["shards"].values() for shard in shards.values()]
            if [files.size(name) for name in names] == sizes:
                keys = key_digests(key for name in names for key in index_keys(name))
                return Done(digest, content["shards"], [Skipped(**item) for item in content["skipped"]], keys)
        return None

    def _do(self, number: int, task: Any, digest: str) -> Done:
        parts = self.split.parts if self.split else ("",)
        shards = {part: _Shards(part_folder(self.out, part), number, self.max_bytes) for part in parts}
        keys: dict[bytes, None] = {}
        done = Done(digest)
        try:
            for item in self.produce(task):
                if isinstance(item, Skipped):
                    if not self.allow_skipped and not item.harmless:
                        raise InputError(f"{item.where}: {item.reason}: {item.detail}. Correct it, or leave such inputs out (--skip-bad).")
                    done.skipped.append(item)
                    continue
                item.check()
                key = key_digest(item.key)
                if key in keys:
                    raise RecordError(f"key {item.key!r} comes twice: keys must be unique over the whole data set")
                keys[key] = None
                shards[self.split(item) if self.split else ""].add(item)
            for part in shards.values():
                part.finish()
        finally:
            for part in shards.values():
                part.abandon()
        done.shards = {name: part.written for name, part in shards.items() if part.written}
        done.keys = np.frombuffer(b"".join(keys), np.uint64)
        return done
