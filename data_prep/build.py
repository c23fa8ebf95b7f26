"""`build`: whatever people have -> shards. One command per kind of input; the options about OUT are the same for all."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

import typer

from data_prep import files
from data_prep import options as shared
from data_prep.engine import WorkerLostError
from data_prep.job import part_folder
from data_prep.readers.base import Reader
from data_prep.writer import build

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Build shards from what you have. Image bytes pass through untouched unless asked.",
)


def finish(
    reader: Reader,
    out: str,
    *,
    max_count: int = 10_000,
    max_bytes: int = 1 << 30,
    resize: int | None = None,
    reencode: str | None = None,
    quality: int = 95,
    holdout: float | None = None,
    holdout_by: str = "image",
    licence: str | None = None,
    skip_bad: bool = False,
    engine: str = "local",
    processes: int | None = None,
    json_output: bool = False,
) -> dict[str, Any]:
    """Build what the reader reads, and print what came of it; returns the manifest. Errors are one line, and the exit status."""
    produce, split = reader, None
    if reencode is not None and reencode not in ("jpeg", "webp", "png"):
        raise typer.BadParameter(f"--reencode {reencode!r}: expected jpeg, webp or png")
    if holdout_by not in ("key", "image"):
        raise typer.BadParameter(f"--holdout-by {holdout_by!r}: expected key or image")
    if resize is not None or reencode is not None:
        from data_prep.images import Images

        produce = Images(reader, resize, reencode, quality)
    if holdout is not None:
        from data_prep.images import Holdout

        split = Holdout(holdout, holdout_by)
    options = repr(produce)
    if re.search(r" at 0x[0-9a-f]+>", options):
        raise TypeError(f"{type(reader).__name__} has no repr that is the same in the next run: {options}")
    with shared.one_line(ValueError, OSError, WorkerLostError):  # whatever is wrong from here on is wrong with the data, or with OUT
        manifest = build(
            out,
            produce,
            reader.tasks(max_count),
            plan={"reader": options, "max_count": max_count},
            max_bytes=max_bytes,
            engine=engine,
            processes=processes,
            command=shared.command_line(),
            licence=licence,
            allow_skipped=skip_bad,
            split=split,
            texts={"classnames.txt": "".join(f"{name}\n" for name in reader.classes)} if reader.classes else None,
        )
    _report(manifest, out, json_output)
    if not manifest["num_samples"]:
        typer.echo(f"error: no sample was written to {out}", err=True)
        raise typer.Exit(1)
    return manifest


def _report(manifest: dict[str, Any], out: str, json_output: bool) -> None:
    if json_output:
        typer.echo(json.dumps(manifest, indent=1, ensure_ascii=False))
        return
    for part, found in manifest.get("parts", {"": manifest}).items():
        members = ", ".join(f"{n} {name}" for name, n in found["members"].items())
        where = part_folder(out, part)
        typer.echo(f"{found['num_samples']} samples ({members}) in {len(found['shards'])} shards in {where}")
    if manifest["skipped"]:
        typer.echo(f"{manifest['skipped']} inputs left out: see {files.join(out, 'skipped.jsonl')}")


@app.command("folder", epilog="python -m data_prep build folder photos/ --out shards/photos --label-from-folder")
@shared.with_build_options
def build_folder(
    folder: Annotated[str, typer.Argument(help="folder or URL of images, at any depth")],
    label_from_folder: Annotated[
        bool, typer.Option("--label-from-folder", help="the first folder is the class: cls and classnames.txt")
    ] = False,
    **common: Any,
) -> None:
    """Shards from a folder of images, with classes or without."""
    from data_prep.readers.folder import Folder

    with shared.input_errors():
        shared.check_apart(common["out"], folder)
        reader = Folder.open(folder, label_from_folder)
    finish(reader, **common)
