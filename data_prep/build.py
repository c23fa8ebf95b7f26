"""`build`: whatever people have -> shards. One command per kind of input; the options about OUT are the same for all."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
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
    out: shared.Out,
    *,
    max_count: shared.MaxCount = 10_000,
    max_bytes: shared.MaxBytes = 1 << 30,
    resize: shared.Resize = None,
    reencode: shared.Reencode = None,
    quality: shared.Quality = 95,
    holdout: shared.Holdout = None,
    holdout_by: shared.HoldoutBy = "image",
    licence: shared.Licence = None,
    skip_bad: shared.SkipBad = False,
    engine: shared.Engine = "local",
    processes: shared.Processes = None,
    json_output: shared.JsonOutput = False,
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


def kind(name: str, epilog: str) -> Callable[[Callable[..., Reader]], Callable[..., None]]:
    """A command `build NAME` from a function that opens the reader of its inputs: the options of `finish` are added to its own."""
    common = [p for p in inspect.signature(finish, eval_str=True).parameters.values() if p.name != "reader"]

    def register(command: Callable[..., Reader]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())

        def wrapped(**arguments: Any) -> None:
            with shared.input_errors():
                reader = command(**{p.name: arguments[p.name] for p in own})
            finish(reader, **{p.name: arguments[p.name] for p in common})

        alone = [p for p in own if p.name not in {other.name for other in common}]  # `out`, where a command looks at it, is common
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*alone, *common)]
        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        wrapped.__signature__ = inspect.Signature(parameters)  # what typer reads
        wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
        return app.command(name, epilog=epilog)(wrapped)

    return register


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


@kind("folder", "python -m data_prep build folder photos/ --out shards/photos --label-from-folder")
def build_folder(
    out: str,
    folder: Annotated[str, typer.Argument(help="folder or URL of images, at any depth")],
    label_from_folder: Annotated[
        bool, typer.Option("--label-from-folder", help="the first folder is the class: cls and classnames.txt")
    ] = False,
) -> Reader:
    """Shards from a folder of images, with classes or without."""
    from data_prep.readers.folder import Folder

    shared.check_apart(out, folder)
    return Folder.open(folder, label_from_folder)
