"""The command `shuffle`: a control set with every caption on another sample, on which training should not beat chance."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Annotated

import typer

from data_prep.cli import command_line, input_errors, shard_names
from data_prep.records import Record
from data_prep.shards.read import Shard
from data_prep.shards.serial import write_shards
from mmpretrain.data.schema import ShardError

CAPTION_MEMBERS = ("txt", "json")


def shuffled(names: list[str], seed: int) -> Iterator[Record]:
    """Yields every sample with the caption members of its successor in one random cycle over all samples.

    No sample keeps its own caption. Raises ShardError for fewer than two samples.
    """
    shards = [Shard(name) for name in names]
    places = [(shard, i) for shard in shards for i in range(len(shard))]
    if len(places) < 2:
        raise ShardError(f"{', '.join(names)}: {len(places)} samples; at least two are needed to exchange captions")
    order = list(range(len(places)))
    random.Random(seed).shuffle(order)
    donor_of = {place: order[(n + 1) % len(order)] for n, place in enumerate(order)}
    for number, (shard, i) in enumerate(places):
        donor, donor_index = places[donor_of[number]]
        record, caption_members = shard.read(i), donor.read(donor_index, CAPTION_MEMBERS)
        own_members = {extension: data for extension, data in record.members.items() if extension not in CAPTION_MEMBERS}
        yield Record(f"{number:08d}", own_members | caption_members.members)


def shuffle(
    shards: Annotated[list[str], typer.Argument(help="shards: paths, globs, brace ranges, folders, URLs")],
    out: Annotated[str, typer.Option("--out", help="a new folder")],
    seed: Annotated[int, typer.Option(help="seed of the random cycle")] = 0,
) -> None:
    """Move every caption to another sample: the members txt and json move together; all others, labels included, stay."""
    with input_errors():
        manifest = write_shards(shuffled(shard_names(shards), seed), out, command=command_line())
    typer.echo(f"{manifest['num_samples']} samples in {len(manifest['shards'])} shards in {out}")
