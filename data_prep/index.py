"""The command `index`: an index with a checksum per member beside shards of any origin, and sizes.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from data_prep import files
from data_prep.cli import Engine, Processes, one_line
from data_prep.engine import run
from mmpretrain.data import index as shard_index
from mmpretrain.data.cache import remote_index
from mmpretrain.data.index import BYTES
from mmpretrain.data.schema import ShardError


def _known(name: str) -> shard_index.ShardIndex | None:
    """Loads the index beside a shard; None unless it has checksums."""
    if files.is_remote(name):
        known = remote_index(name)
    else:
        place = shard_index.index_path(name)
        known = shard_index.load(place)[0] if place.exists() else None
    return None if known is None or known.checksum is None else known


def _check_known(name: str, scanned: shard_index.ShardIndex, known: shard_index.ShardIndex) -> None:
    """Checks a scanned index against the known one, whose checksums describe the undamaged shard.

    Copies the known checksums where none were computed. Raises ShardError where the shard differs from its known index.
    """
    same = known.keys == scanned.keys and known.tar_bytes == scanned.tar_bytes
    same = same and np.array_equal(known.offset, scanned.offset) and np.array_equal(known.size, scanned.size)
    if same and scanned.checksum is None:
        scanned.checksum = known.checksum
    if not same or (known.checksum != scanned.checksum).any():
        problem = f"{len(scanned)} samples in {scanned.tar_bytes} bytes, its index lists {len(known)} in {known.tar_bytes}"
        if same:
            member = int((known.checksum != scanned.checksum).any(1).argmax())
            sample = int((scanned.starts > member).argmax()) - 1
            problem = f"the bytes at {int(scanned.offset[member])}, of sample {scanned.keys[sample]}, do not match its checksum"
        raise ShardError(f"{name}: {problem}. Fetch or build the shard again, or pass --replace to index it as it is.")


@dataclass
class Indexed:
    """Result of indexing one shard. `count` is None where no index was written."""

    name: str
    count: int | None = None
    summary: str = ""
    damage: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # lines that are no failure


@dataclass(frozen=True)
class IndexShard:
    """The task of a worker: indexes one shard. A remote shard is fetched once."""

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
            scanned = shard_index.scan(path)
        except ShardError as error:
            raise ShardError(str(error).replace(str(path), name)) from error
        for damage in scanned.damage:
            result.damage.append(f"{name}: {damage.reason} at byte {damage.offset}: {damage.detail}; {len(scanned)} samples before it")
        for member in scanned.left_out or ():
            lines = result.damage if member.reason != "link_to_folder" else result.notes
            lines.append(f"{name}: {member.reason} at byte {member.offset}: {member}")
        known = None if self.replace else _known(name)
        if self.checksums:
            checksum = None if known is None else known.checksum
            shard_index.add_checksums(scanned, path, BYTES if checksum is None else checksum.shape[1])
        if known is not None:
            _check_known(name, scanned, known)
        place = shard_index.index_path(path)
        shard_index.save(scanned, place, 0 if files.is_remote(name) else path.stat().st_mtime_ns)
        if files.is_remote(name):
            files.put(place, name + shard_index.SUFFIX)
        links = int(np.count_nonzero(scanned.linked)) if scanned.linked is not None else 0
        linked = f", {links} of the members are links" if links else ""
        repeated = f", {scanned.duplicates} keys repeated" if scanned.duplicates else ""
        result.summary = f"{len(scanned)} samples ({', '.join(f'{n} {e}' for e, n in scanned.counts().items())}{repeated}{linked})"
        result.count = len(scanned)


def _write_sizes(counts: dict[str, int]) -> None:
    """Updates sizes.json beside the shards and keeps its entries of other shards. Raises ShardError for a malformed file."""
    by_folder: dict[str, dict[str, int]] = {}
    for name, count in counts.items():
        folder, _, base = name.rpartition("/") if files.is_remote(name) else (str(Path(name).parent), "", Path(name).name)
        by_folder.setdefault(folder, {})[base] = count
    for folder, sizes in by_folder.items():
        place = files.join(folder, "sizes.json")
        try:
            known = json.loads(files.read_bytes(place)) if files.exists(place) else {}
            files.write_json(place, dict(sorted((known | sizes).items())))
        except (ValueError, TypeError) as error:
            raise ShardError(f'{place}: expected {{"00000.tar": count, ...}} ({error}). Correct or delete it.') from error


def index(
    shards: Annotated[list[str], typer.Argument(help="shards: paths, globs, brace ranges, folders, URLs")],
    checksums: Annotated[
        bool, typer.Option(help="read every member and record its checksum, which reveals corruption; without it, known checksums stay")
    ] = True,
    replace: Annotated[
        bool, typer.Option("--replace", help="replace an index, checksums too, that differs from what the shard holds")
    ] = False,
    engine: Engine = "local",
    processes: Processes = None,
) -> None:
    """Index shards. Damaged shards are reported, and the exit status is then 1."""
    from data_prep.shards.read import expand

    failed = 0
    counts: dict[str, int] = {}
    with one_line(status=1):
        names = [name.removeprefix("file://") for name in expand(shards)]
        for result in run(IndexShard(checksums, replace), names, engine=engine, processes=processes, title="shards"):
            for line in (*result.damage, *result.notes):
                typer.echo(line, err=True)
            failed += len(result.damage)
            if result.count is not None:
                counts[result.name] = result.count
                typer.echo(f"{result.name}: {result.summary}")
        _write_sizes(counts)
    if failed:
        raise typer.Exit(1)
