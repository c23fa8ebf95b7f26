"""`index`: write the index beside shards that others built, with a checksum per member, and sizes.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from data_prep import files
from data_prep.cli import Engine, Processes, one_line
from data_prep.engine import WorkerLostError, run
from mmpretrain.data import index as shard_index
from mmpretrain.data.cache import remote_index
from mmpretrain.data.index import BYTES
from mmpretrain.data.schema import ShardError


def _known(name: str) -> shard_index.ShardIndex | None:
    """The index beside a shard, if it has checksums."""
    if files.is_remote(name):
        known = remote_index(name)
    else:
        place = shard_index.index_path(name)
        known = shard_index.load(place)[0] if place.exists() else None
    return None if known is None or known.checksum is None else known


def _settle(name: str, found: shard_index.ShardIndex, known: shard_index.ShardIndex) -> None:
    """An index with checksums says what the shard should hold: it is not lost to a shard that has been damaged since.

    Checksums that were not taken this time are those that are known. Raises ShardError where the shard is not what its index says.
    """
    same = known.keys == found.keys and known.tar_bytes == found.tar_bytes
    same = same and np.array_equal(known.offset, found.offset) and np.array_equal(known.size, found.size)
    if same and found.checksum is None:
        found.checksum = known.checksum
    if not same or (known.checksum != found.checksum).any():
        what = f"{len(found)} samples in {found.tar_bytes} bytes, its index says {len(known)} in {known.tar_bytes}"
        if same:
            member = int((known.checksum != found.checksum).any(1).argmax())
            sample = int((found.starts > member).argmax()) - 1
            what = f"the bytes at {int(found.offset[member])}, of sample {found.keys[sample]}, are not those that its index was written for"
        raise ShardError(f"{name}: {what}. Fetch or build the shard again, or pass --replace to index it as it is.")


@dataclass
class Indexed:
    """What came of one shard. `count` is None where it got no index."""

    name: str
    count: int | None = None
    summary: str = ""
    damage: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class IndexShard:
    """Indexes the shard of a name, in a worker. A remote shard is fetched once."""

    checksums: bool
    replace: bool

    def __call__(self, name: str) -> Indexed:
        result = Indexed(name)
        try:
            with files.local(name) as path:
                self._index(name, path, result)
        except (ShardError, OSError) as error:
            result.damage.append(f"error: {error}")
        return result

    def _index(self, name: str, path: Path, result: Indexed) -> None:
        try:
            found = shard_index.scan(path)
        except ShardError as error:
            raise ShardError(str(error).replace(str(path), name)) from error
        for damage in found.damage:
            result.damage.append(f"{name}: {damage.reason} at byte {damage.offset}: {damage.detail}; {len(found)} samples before it")
        known = None if self.replace else _known(name)
        if self.checksums:
            shard_index.add_checksums(found, path, BYTES if known is None else known.checksum.shape[1])
        if known is not None:
            _settle(name, found, known)
        place = shard_index.index_path(path)
        shard_index.save(found, place, 0 if files.is_remote(name) else path.stat().st_mtime_ns)
        if files.is_remote(name):
            files.put(place, name + shard_index.SUFFIX)
        repeated = f", {found.duplicates} keys came again" if found.duplicates else ""
        result.summary = f"{len(found)} samples ({', '.join(f'{n} {e}' for e, n in found.counts().items())}{repeated})"
        result.count = len(found)


def _write_sizes(counts: dict[str, int]) -> None:
    """Into the sizes.json beside the shards, which keeps what it says of others. Raises ShardError where it is not of that form."""
    by_folder: dict[str, dict[str, int]] = {}
    for name, count in counts.items():
        folder, _, base = name.rpartition("/") if files.is_remote(name) else (str(Path(name).parent), "", Path(name).name)
        by_folder.setdefault(folder, {})[base] = count
    for folder, found in by_folder.items():
        place = files.join(folder, "sizes.json")
        try:
            known = json.loads(files.read_bytes(place)) if files.exists(place) else {}
            files.write_json(place, dict(sorted((known | found).items())))
        except (ValueError, TypeError) as error:
            raise ShardError(f'{place}: expected {{"00000.tar": count, ...}} ({error}). Correct or delete it.') from error


def index(
    shards: Annotated[list[str], typer.Argument(help="shards: paths, globs, brace ranges, folders, URLs")],
    checksums: Annotated[
        bool, typer.Option(help="read every member and note its checksum, so that corruption can be found; without, known ones stay")
    ] = True,
    replace: Annotated[
        bool, typer.Option("--replace", help="replace an index, checksums too, that differs from what the shard holds")
    ] = False,
    engine: Engine = "local",
    processes: Processes = None,
) -> None:
    """Index shards; damaged ones are named, and make the exit status 1."""
    from data_prep.shards.read import expand

    failed = 0
    counts: dict[str, int] = {}
    with one_line(ValueError, OSError, WorkerLostError):
        names = [name.removeprefix("file://") for name in expand(shards)]
        for result in run(IndexShard(checksums, replace), names, engine=engine, processes=processes, title="shards"):
            for damage in result.damage:
                typer.echo(damage, err=True)
            failed += len(result.damage)
            if result.count is not None:
                counts[result.name] = result.count
                typer.echo(f"{result.name}: {result.summary}")
        _write_sizes(counts)
    if failed:
        raise typer.Exit(1)
