"""The stage that `filter` and `dedup` write with: every shard again, less the samples that were found wanting."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import typer

from data_prep import files
from data_prep.job import key_digest, key_digests
from data_prep.samples import Shard
from data_prep.writer import Record, Skipped
from mmpretrain.data.cache import remote_index
from mmpretrain.data.index import open_index
from mmpretrain.data.schema import BadSample, ShardError
from mmpretrain.data.shard_names import is_remote

CARRIED = ("classnames.txt", "zeroshot_classification_templates.txt")  # beside the shards, and as true of a part of them


@dataclass(frozen=True)
class Part:
    """A shard and what to leave out of it: (sample, reason, detail), ascending."""

    name: str
    count: int  # samples that were judged
    drops: tuple[tuple[int, str, str], ...] = ()
    state: str = field(default="", compare=False)  # of the shard's file: one that changes gives another build


def keep(part: Part) -> Iterator[Record | Skipped]:
    """The samples that stay, byte for byte, and for each of the others the rule that dropped it.

    Raises ShardError where the shard is not the one that was judged, or a key is none that can be written.
    """
    drops = {sample: (reason, detail) for sample, reason, detail in part.drops}
    with Shard(part.name) as shard:
        if len(shard) != part.count:
            raise ShardError(
                f"{part.name}: {len(shard)} samples, but {part.count} when they were judged. Shards must not change meanwhile."
            )
        for damage in shard.index.damage:
            yield Skipped(part.name, damage.reason, f"at byte {damage.offset}: {damage.detail}; about {damage.lost} samples lost")
        for sample in range(len(shard)):
            where = f"{part.name}/{shard.key(sample)}"
            if sample in drops:
                yield Skipped(where, *drops[sample])
                continue
            try:
                record = shard.read(sample)
            except BadSample as error:  # a member that no rule had to read
                yield Skipped(where, error.reason, error.detail)
                continue
            try:
                record.check()
            except ValueError as error:
                raise ShardError(f"{part.name}: {error} `python -m data_prep build shards` replaces such keys: run it first.") from error
            yield record


def check_keys(parts: Callable[[], Iterable[Part]]) -> None:
    """Before anything is written: raises ValueError for a key that stays twice. A remote shard without an index is left to the writer."""
    digests = [key_digests(key for _, key in _staying(part)) for part in parts()]
    every = np.sort(np.concatenate([np.zeros(0, np.uint64), *digests]))
    again = {digest.tobytes() for digest in every[1:][every[1:] == every[:-1]]}
    seen: dict[str, str] = {}
    for part in parts() if again else ():
        for place, key in _staying(part):
            if key_digest(key) in again and seen.setdefault(key, place) != place:
                raise ValueError(
                    f"key {key!r} comes twice, in {seen[key].rpartition('#')[0]} and {part.name}: keys must be unique over the whole data "
                    "set. Where each shard counts from 0, run `python -m data_prep build shards --keys shard` on them first."
                )


def _staying(part: Part) -> Iterator[tuple[str, str]]:
    """(shard#number, key) of the samples that are not dropped."""
    index = remote_index(part.name) if is_remote(part.name) else open_index(files.place(part.name), save_new=False)
    drops = {sample for sample, _, _ in part.drops}
    for sample, key in enumerate(index.keys if index is not None else ()):
        if sample not in drops:
            yield f"{part.name}#{sample}", key


def damage_lines(shard: Shard) -> list[str]:
    """What of a shard cannot be read at all, for a report."""
    return [f"{shard.name} at byte {d.offset}: {d.reason}: {d.detail}; about {d.lost} samples lost" for d in shard.index.damage]


def carried(names: Iterable[str]) -> dict[str, str]:
    """Class names and templates that lie beside the input belong beside the output too, where the input is one folder."""
    folders = {name.rpartition("/")[0] or "." for name in names}
    if len(folders) != 1:
        return {}
    places = {name: files.join(next(iter(folders)), name) for name in CARRIED}
    return {name: files.read_bytes(place).decode("utf-8") for name, place in places.items() if files.exists(place)}


def show(result: dict[str, Any], out: str | None, as_json: bool) -> None:
    """How many samples each rule dropped; good + dropped = all. Ends with status 1 where shards were wanted and none is left to write."""
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        _print_table(result)
    if out is not None and not result["good"]:
        typer.echo(f"error: no sample is left to write to {out}", err=True)
        raise typer.Exit(1)


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "samples")
    for rule, count in result["dropped"].items():
        table.add_row(rule, f"{count:,}")
    table.add_row("good", f"{result['good']:,}")
    table.add_row("all", f"{result['samples']:,}")
    Console().print(table)
    for line in result.get("damage", []):
        typer.echo(f"damaged: {line}", err=True)
    if "evaluation" in result:
        held = result["evaluation"]
        line = f"{held['in_training']} of {held['samples']} evaluation samples have a copy among the training samples"
        typer.echo(line + (f"; not comparable: {held['unusable']}" if held["unusable"] else ""))
    if "not_embedded" in result:
        first = result["not_embedded"][0]
        typer.echo(f"{len(result['not_embedded'])} samples were not compared by embedding, first {first['sample']}: {first['reason']}")
