"""`index`: write the index beside shards that others built, with a sha256 per member, and sizes.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from data_prep.writer import write_json
from mmpretrain.data import index as shard_index
from mmpretrain.data.schema import ShardError
from mmpretrain.data.shards import expand


def _settle(path: Path, found: shard_index.ShardIndex) -> None:
    """An index with checksums says what the shard should hold: it is not lost to a shard that has been damaged since.

    Checksums that were not taken this time are those that are known. Raises ShardError where the shard is not what its index says.
    """
    place = shard_index.index_path(path)
    if not place.exists():
        return
    known, _ = shard_index.load(place)
    if known.sha256 is None:
        return
    same = known.keys == found.keys and known.tar_bytes == found.tar_bytes
    same = same and np.array_equal(known.offset, found.offset) and np.array_equal(known.size, found.size)
    if same and found.sha256 is None:
        found.sha256 = known.sha256
    if not same or (known.sha256 != found.sha256).any():
        what = f"{len(found)} samples in {found.tar_bytes} bytes, its index says {len(known)} in {known.tar_bytes}"
        if same:
            member = int((known.sha256 != found.sha256).any(1).argmax())
            sample = int((found.starts > member).argmax()) - 1
            what = f"the bytes at {int(found.offset[member])}, of sample {found.keys[sample]}, are not those that its index was written for"
        raise ShardError(f"{path}: {what}. Fetch or build the shard again, or pass --replace to index it as it is.")


def index(
    shards: Annotated[list[str], typer.Argument(help="shards: paths, globs, brace ranges, folders")],
    checksums: Annotated[
        bool, typer.Option(help="read every member and note its sha256, so that corruption can be found; without, known ones stay")
    ] = True,
    replace: Annotated[
        bool, typer.Option("--replace", help="replace an index, checksums too, that differs from what the shard holds")
    ] = False,
) -> None:
    """Index shards; damaged ones are named, and make the exit status 1."""
    failed = 0
    sizes: dict[Path, dict[str, int]] = {}
    try:
        names = expand(shards)
    except ShardError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    for name in names:
        path = Path(name)
        try:
            found = shard_index.scan(path)
            for damage in found.damage:
                failed += 1
                typer.echo(f"{name}: {damage.reason} at byte {damage.offset}: {damage.detail}; {len(found)} samples before it", err=True)
            if checksums:
                shard_index.add_checksums(found, path)
            if not replace:
                _settle(path, found)
            shard_index.save(found, shard_index.index_path(path), path.stat().st_mtime_ns)
        except (ShardError, OSError) as error:
            failed += 1
            typer.echo(f"error: {error}", err=True)
            continue
        sizes.setdefault(path.parent, {})[path.name] = len(found)
        repeated = f", {found.duplicates} keys came again" if found.duplicates else ""
        typer.echo(f"{name}: {len(found)} samples ({', '.join(f'{n} {e}' for e, n in found.counts().items())}{repeated})")
    for folder, counts in sizes.items():
        place = folder / "sizes.json"
        known = json.loads(place.read_text()) if place.exists() else {}
        write_json(place, dict(sorted((known | counts).items())))
    if failed:
        raise typer.Exit(1)
