"""Write a run's model in the format of another library.

    python scripts/export.py RUN_OR_CHECKPOINT --to open_clip --out FOLDER

A run means its newest valid checkpoint. The folder loads with open_clip.create_model_and_transforms("local-dir:FOLDER").
"""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from mmpretrain.checkpoint import MANIFEST, find_checkpoint
from mmpretrain.errors import MMPretrainError, file_errors
from mmpretrain.export import CONFIG, about_transparency, export_open_clip, load_model, recorded_transparency


class Format(StrEnum):
    open_clip = "open_clip"


def newest_checkpoint(path: Path) -> Path:
    """A run's newest valid checkpoint; a checkpoint of ours once verified; any other folder of open_clip's format as it is."""
    if (path / CONFIG).is_file() and not (path / MANIFEST).exists():
        return path
    return find_checkpoint(path)


def main(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="a run folder, or one of its checkpoints")],
    out: Annotated[Path, typer.Option(help="folder to write; new or empty")],
    to: Annotated[Format, typer.Option(help="the format to write")] = Format.open_clip,
) -> None:
    """Write a run's model in the format of another library."""
    try:
        with file_errors():
            checkpoint = newest_checkpoint(source)
            dual, leftovers = load_model(checkpoint)
            transparent = recorded_transparency(checkpoint)
            export_open_clip(dual, leftovers, out, transparent)
    except MMPretrainError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.status) from None
    if transparent is not None and transparent[0]:
        print(f"{about_transparency(dual.preprocess, transparent)} {out}/README.md has the lines of code.")
    print(f'{checkpoint} -> {out}: open_clip.create_model_and_transforms("local-dir:{out}")')


if __name__ == "__main__":
    typer.run(main)
