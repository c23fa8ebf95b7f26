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


def pairs(items: list[str], option: str) -> dict[str, str]:
    """COLUMN=VALUE options as a dict."""
    for item in items:
        if "=" not in item:
            raise typer.BadParameter(f"{option} {item!r}: expected COLUMN=VALUE")
    return dict(item.split("=", 1) for item in items)


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


@app.command("csv", epilog="python -m data_prep build csv pairs.csv --out shards/pairs --image-column file --caption '{name}: {keywords}'")
@shared.with_build_options
def build_csv(
    file: Annotated[str, typer.Argument(help="the table, a path or URL; UTF-8, with a header line")],
    image_column: Annotated[str, typer.Option(help="column of image paths, or of data: URIs")] = "filepath",
    root: Annotated[str, typer.Option(help="folder or URL that image paths are relative to; default: the table's")] = "",
    caption: Annotated[
        list[str],
        typer.Option(help="a column, or a template over columns, '{name}: {keywords}'; repeated: several captions, all in json's captions"),
    ] = [],  # noqa: B006
    key_column: Annotated[str | None, typer.Option(help="column whose text is added to the keys, which are row numbers")] = None,
    label_column: Annotated[str | None, typer.Option(help="column of class names or indices, for cls and classnames.txt")] = None,
    extra: Annotated[list[str], typer.Option(help="column to keep in the json member; may be repeated")] = [],  # noqa: B006
    join: Annotated[list[str], typer.Option(help="COLUMN=MARK: in captions, replace MARK in the column by ', ' (keywords='|')")] = [],  # noqa: B006
    where: Annotated[list[str], typer.Option(help="COLUMN=VALUE: keep only rows that hold it")] = [],  # noqa: B006
    exclude_regex: Annotated[list[str], typer.Option(help="COLUMN=PATTERN: drop rows that match")] = [],  # noqa: B006
    separator: Annotated[str, typer.Option(help="field separator; tab for tabs")] = ",",
    **common: Any,
) -> None:
    """Shards from a table with image paths and captions."""
    from data_prep.readers.columns import Columns
    from data_prep.readers.table import Table

    marks, kept, dropped = pairs(join, "--join"), pairs(where, "--where"), pairs(exclude_regex, "--exclude-regex")
    with shared.input_errors():
        columns = Columns(
            image=image_column,
            captions=tuple(caption),
            key=key_column,
            label=label_column,
            extra=tuple(extra),
            join=tuple(marks.items()),
            root=root,
        )
        table = Table.open(file, columns, kept, dropped, separator)
    finish(table, **common)


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
