"""`shuffle`: the same shards with every caption on another sample, a control: a model trained on them should do no better than chance."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated

import typer

from data_prep.cli import command_line, input_errors, shard_names
from data_prep.records import Record
from data_prep.shards.read import Shard
from data_prep.shards.serial import write_shards

CAPTION_MEMBERS = ("txt", "json")


def shuffled(names: list[str], seed: int) -> Iterator[Record]:
    """Every sample with the caption members of its successor in one random cycle over all: none keeps its own.

    Raises ValueError for fewer than two samples.
    """
    shards = [Shard(name) for name in names]
    places = [(shard, i) for shard in shards for i in range(len(shard))]
    if len(places) < 2:
        raise ValueError(f"{', '.join(names)}: {len(places)} samples; at least two are needed to exchange captions")
    order = list(range(len(places)))
    random.Random(seed).shuffle(order)
    giver = {place: order[(n + 1) % len(order)] for n, place in enumerate(order)}
    for number, (shard, i) in enumerate(places):
        other, j = places[giver[number]]
        record, given = shard.read(i), other.read(j, CAPTION_MEMBERS)
        kept = {extension: data for extension, data in record.members.items() if extension not in CAPTION_MEMBERS}
        yield Record(f"{number:08d}", kept | given.members)


def shuffle(
    shards: Annotated[list[str], typer.Argument(help="shards: paths, globs, brace ranges, folders, URLs")],
    out: Annotated[str, typer.Option("--out", help="a new folder")],
    seed: Annotated[int, typer.Option(help="of the random cycle")] = 0,
) -> None:
    """Put every caption on another sample: the members txt and json move together, the others stay, labels too."""
    with input_errors():
        manifest = write_shards(shuffled(shard_names(shards), seed), out, command=command_line())
    typer.echo(f"{manifest['num_samples']} samples in {len(manifest['shards'])} shards in {out}")
