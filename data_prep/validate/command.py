"""The command `validate`: problems of shards of any origin and, with --repair, their good samples in new shards."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from data_prep.cli import Engine, ImageMember, JsonOutput, Processes, command_line, one_line
from data_prep.engine import run
from data_prep.shards.read import Shard, expand, image_member
from mmpretrain.data.decode import ImageLimits
from mmpretrain.data.schema import IMAGE_EXTENSIONS, ShardError
from mmpretrain.data.shard_names import is_remote

MAX_PROBED, MAX_PROBED_REMOTE = 16, 2  # shards read to determine the usual members


def usual(names: list[str]) -> list[str]:
    """Determines the members that most samples have, from a few shards, evenly spread."""
    max_shards = MAX_PROBED_REMOTE if any(map(is_remote, names)) else MAX_PROBED
    probed = [names[i * len(names) // min(max_shards, len(names))] for i in range(min(max_shards, len(names)))]
    samples, images, counts = 0, 0, {}
    for name in probed:
        try:
            with Shard(name) as shard:
                samples += len(shard)
                images += sum(number for extension, number in shard.index.counts().items() if extension in IMAGE_EXTENSIONS)
                for extension, number in shard.index.counts().items():
                    counts[extension] = counts.get(extension, 0) + number
        except (ShardError, OSError):
            continue  # `Examine` reports it
    image = ["image"] if images * 2 > samples else []
    return image + sorted(e for e, n in counts.items() if n * 2 > samples and image_member([e]) is None and "." not in e)


def validate(
    shards: Annotated[list[str], typer.Argument(help="shards: paths, URLs, globs, brace ranges, folders")],
    decode: Annotated[bool, typer.Option(help="decode every image; without, only formats and sizes are checked")] = True,
    checksums: Annotated[bool, typer.Option(help="compare members with the checksums of their index, where it has them")] = True,
    need: Annotated[
        str | None, typer.Option(help="members that every sample must have, e.g. image,txt; default: those that most have; none: ''")
    ] = None,
    image_member: ImageMember = None,
    caption: Annotated[str, typer.Option(help="the member that holds the caption, or json:FIELD")] = "txt",
    max_pixels: Annotated[int, typer.Option(min=1, help="width times height of an image")] = ImageLimits.max_pixels,
    min_side: Annotated[int, typer.Option(min=1, help="pixels of an image's shorter side")] = ImageLimits.min_side,
    max_aspect: Annotated[float, typer.Option(min=1, help="longer side over shorter side")] = ImageLimits.max_aspect,
    as_json: JsonOutput = False,
    max_findings: Annotated[int, typer.Option(min=1, help="findings of a kind that are listed; all are counted")] = 100,
    repair: Annotated[str | None, typer.Option(help="folder or URL to write the good samples to, in new shards")] = None,
    engine: Engine = "local",
    processes: Processes = None,
) -> None:
    """Check shards. Exit status 0: clean; 1: samples are lost or corrupt; 2: the check failed."""
    from rich.console import Console

    from data_prep.validate.members import Checks
    from data_prep.validate.report import repaired, show, summarise
    from data_prep.validate.shard import Examine

    with one_line(status=2):
        names = expand(shards)
        needed = usual(names) if need is None else [part.strip() for part in need.split(",") if part.strip()]
        if need is None and image_member is not None:
            needed = ["image", *(part for part in needed if part != image_member)]
        needed = list(dict.fromkeys("image" if part in IMAGE_EXTENSIONS or part == image_member else part for part in needed))
        limits = ImageLimits(max_pixels, min_side, max_aspect)
        checks = Checks(tuple(needed), image_member, caption, decode, checksums, limits)
        reports = list(run(Examine(checks, max_findings), names, engine=engine, processes=processes, title="validate"))
        verdict, clashes = summarise(reports, needed, max_findings)
        if repair is not None:
            from data_prep.validate.repair import ToRepair
            from data_prep.validate.repair import repair as write

            tasks = [ToRepair(i, name, again) for i, (name, again) in enumerate(zip(names, clashes))]
            manifest = write(repair, checks, tasks, engine=engine, processes=processes, command=command_line())
            verdict.repaired = repaired(verdict, repair, manifest)
    if as_json:
        typer.echo(json.dumps(verdict.as_json(), indent=1))
    else:
        show(verdict, Console())
    if not verdict.clean:
        raise typer.Exit(1)
