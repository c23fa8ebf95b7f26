"""Command-line options that several commands share."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from data_prep import files
from data_prep.engine import ENGINES
from data_prep.records import InputError
from mmpretrain.config.build import OptionError
from mmpretrain.data.formats import foreign_kind, printable
from mmpretrain.data.schema import ShardError
from mmpretrain.errors import MMPretrainError, file_errors


def _engine(name: str) -> str:
    if name not in ENGINES:
        raise typer.BadParameter(f"{name!r}: expected {' or '.join(ENGINES)}")
    return name


Engine = Annotated[
    str, typer.Option("--engine", callback=_engine, help="local: this machine's cores; ray: a cluster (RAY_ADDRESS, else one started here)")
]
Processes = Annotated[int | None, typer.Option("--processes", min=1, help="worker processes; default: one per core")]
Out = Annotated[str, typer.Option("--out", help="folder or URL to write shards to; new, or holding an unfinished build of the same inputs")]
MaxCount = Annotated[int, typer.Option("--max-count", min=1, help="inputs per shard")]
MaxBytes = Annotated[int, typer.Option("--max-bytes", min=1 << 10, help="bytes per shard, where --max-count inputs exceed it")]
Licence = Annotated[str | None, typer.Option("--licence", help="licence of the data, noted in manifest.json")]
Classes = Annotated[str | None, typer.Option("--classes", help="file of class names, one a line, in the order of their indices")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="leave bad inputs out and list them in skipped.jsonl, instead of stopping")]
JsonOutput = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Resize = Annotated[int | None, typer.Option("--resize", min=1, help="shrink images whose shorter side exceeds N pixels to N")]
ImageMember = Annotated[
    str | None, typer.Option("--image-member", help="the member that is the image (png, input.jpg); default: the first of jpg, png, ...")
]
Reencode = Annotated[str | None, typer.Option("--reencode", help="encode images as jpeg, webp or png; else their bytes stay as they are")]
Quality = Annotated[int, typer.Option("--quality", min=1, max=100, help="of JPEG and WebP where --resize or --reencode encodes")]
Holdout = Annotated[
    float | None, typer.Option("--holdout", min=0, max=1, help="hold out this fraction: shards go to OUT/train and OUT/holdout")
]
HoldoutBy = Annotated[
    str, typer.Option("--holdout-by", help="image: by a hash of its pixels, so that duplicates stay on one side; key: by a hash of the key")
]


def command_line() -> str:
    """Returns the command line of this process, as recorded in manifests."""
    return shlex.join(["python", "-m", "data_prep", *sys.argv[1:]])


@contextmanager
def one_line(status: int | None = None) -> Iterator[None]:
    """Prints a known error (MMPretrainError, or what the operating system refuses) as one line and exits; a bug keeps its traceback.

    Args:
        status: the exit status; by default the error's own.
    """
    try:
        with file_errors():
            yield
    except MMPretrainError as error:
        typer.echo(f"error: {printable(str(error))}", err=True)
        raise typer.Exit(error.status if status is None else status) from error


@contextmanager
def input_errors() -> Iterator[None]:
    """As `one_line`, but an error in the command itself is shown with its usage, and exits with status 2."""
    with one_line():
        try:
            yield
        except (InputError, OptionError) as error:
            raise typer.BadParameter(printable(str(error))) from error


def check_there(*inputs: str) -> None:
    """Raises InputError for a file or folder that does not exist."""
    for name in inputs:
        if not files.exists(name):
            raise InputError(f"{name}: no such file or folder")


def class_names(file: str | None) -> tuple[str, ...] | None:
    """Reads the names in a --classes file. Raises InputError where they are missing, repeated or not UTF-8."""
    if file is None:
        return None
    check_there(file)
    try:
        data = files.read_bytes(file)
        if (foreign := foreign_kind(data)) is not None:
            raise InputError(f"--classes {file}: {foreign[0]}, expected class names, one a line. {foreign[1]}".rstrip())
        names = tuple(line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise InputError(f"--classes {file}: not UTF-8 ({error})") from error
    if not names or len(set(names)) != len(names):
        raise InputError(
            f"--classes {file}: expected different class names, one a line; found {len(names)}, {len(set(names))} of them different"
        )
    return names


def shard_names(specs: list[str]) -> list[str]:
    """Expands shard specs to names, in order. Raises InputError for a spec without shards."""
    from data_prep.shards.read import expand

    try:
        return expand(specs)
    except ShardError as error:
        raise InputError(str(error)) from error


def check_apart(out: str, inputs: str) -> None:
    """Raises InputError where OUT lies below an input folder that is read recursively: a second run would read its shards."""
    places = [str(where) if files.is_remote(str(where)) else os.path.realpath(where) for where in map(files.place, (out, inputs))]
    if f"{places[0]}/".startswith(f"{places[1].rstrip('/')}/"):
        raise InputError(f"--out {out} lies in {inputs}, which is read to any depth: its shards would become inputs. Write beside it.")
