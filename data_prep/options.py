"""Command-line options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Engine = Annotated[str, typer.Option("--engine", help="local: this machine's cores; ray: a cluster (RAY_ADDRESS, else one started here)")]
Processes = Annotated[int | None, typer.Option("--processes", min=1, help="worker processes; default: one per core")]
Out = Annotated[str, typer.Option("--out", help="folder or URL to write shards to; new, or holding an unfinished build of the same inputs")]
MaxCount = Annotated[int, typer.Option("--max-count", min=1, help="inputs per shard")]
MaxBytes = Annotated[int, typer.Option("--max-bytes", min=1 << 10, help="bytes per shard, where --max-count inputs exceed it")]
Licence = Annotated[str | None, typer.Option("--licence", help="licence of the data, noted in manifest.json")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="leave bad inputs out and list them in skipped.jsonl, instead of stopping")]
JsonOutput = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Resize = Annotated[int | None, typer.Option("--resize", min=1, help="shrink images whose shorter side exceeds so many pixels to it")]
Reencode = Annotated[str | None, typer.Option("--reencode", help="jpeg, webp or png: encode images so; else their bytes stay as they are")]
Quality = Annotated[int, typer.Option("--quality", min=1, max=100, help="of JPEG and WebP where --resize or --reencode encodes")]
Holdout = Annotated[
    float | None, typer.Option("--holdout", min=0, max=1, help="hold out this fraction: shards go to OUT/train and OUT/holdout")
]
HoldoutBy = Annotated[
    str, typer.Option("--holdout-by", help="image: by a hash of its pixels, so that duplicates stay on one side; key: by a hash of the key")
]
