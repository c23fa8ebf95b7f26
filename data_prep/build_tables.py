"""`build` from tables: CSV, JSON Lines, tab-separated values, parquet, Hugging Face sets. What becomes of a row is the same for all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import typer

from data_prep import files
from data_prep import options as shared
from data_prep.build import kind
from data_prep.readers.base import Reader

Fields = Annotated[
    list[str], typer.Option("--caption", help="a column, or a template over columns, '{name}: {keywords}'; repeated: several captions")
]


def pairs(items: list[str], option: str) -> dict[str, str]:
    """COLUMN=VALUE options as a dict."""
    for item in items:
        if "=" not in item:
            raise typer.BadParameter(f"{option} {item!r}: expected COLUMN=VALUE")
    return dict(item.split("=", 1) for item in items)


def _column_options(
    image_column: Annotated[str, typer.Option(help="column of paths, of bytes, of {bytes, path} or of data: URIs")] = "image",
    base64: Annotated[bool, typer.Option("--base64", help="the image column is base64 text")] = False,
    root: Annotated[str | None, typer.Option(help="folder or URL that image paths are relative to; default: the table's")] = None,
    caption: Fields = [],  # noqa: B006
    join: Annotated[list[str], typer.Option(help="COLUMN=MARK: in captions, replace MARK in the column by ', ' (keywords='|')")] = [],  # noqa: B006
    key_column: Annotated[str | None, typer.Option(help="column whose text is added to the keys, which are row numbers")] = None,
    label_column: Annotated[str | None, typer.Option(help="column of class names or indices, for cls and classnames.txt")] = None,
    classes: shared.Classes = None,
    extra: Annotated[list[str], typer.Option(help="column to keep in the json member; may be repeated")] = [],  # noqa: B006
) -> None:
    """The options of every table."""


def _with_columns(command: Callable[..., Reader]) -> Callable[..., Reader]:
    """A command whose argument `columns`, a function of the input files, comes from options of its own."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "columns"]
    of_columns = inspect.signature(_column_options, eval_str=True).parameters

    def wrapped(**arguments: Any) -> Reader:
        given = {name: arguments.pop(name) for name in of_columns}

        def columns(inputs: list[str]) -> Any:
            from data_prep.readers.columns import Columns

            shared.check_there(*inputs)
            return Columns(
                image=given["image_column"],
                captions=tuple(given["caption"]),
                key=given["key_column"],
                label=given["label_column"],
                classes=shared.class_names(given["classes"]),
                extra=tuple(given["extra"]),
                join=tuple(pairs(given["join"], "--join").items()),
                base64=given["base64"],
                root=given["root"] if given["root"] is not None else _folder_of(inputs),
            )

        return command(columns=columns, **arguments)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *of_columns.values())]
    wrapped.__signature__ = inspect.Signature(parameters)  # what `kind` reads
    return wrapped


def _folder_of(inputs: list[str]) -> str:
    """Of the first table; what has none, such as a set of the hub, is read from here."""
    return (inputs[0].rpartition("/")[0] if inputs else "") or "."


@kind("csv", "python -m data_prep build csv pairs.csv --out shards/pairs --image-column file --caption '{name}: {keywords}'")
@_with_columns
def build_csv(
    file: Annotated[str, typer.Argument(help="the table, a path or URL; UTF-8, with a header line")],
    columns: Any,
    where: Annotated[list[str], typer.Option(help="COLUMN=VALUE: keep only rows that hold it")] = [],  # noqa: B006
    exclude_regex: Annotated[list[str], typer.Option(help="COLUMN=PATTERN: drop rows that match")] = [],  # noqa: B006
    separator: Annotated[str, typer.Option(help="field separator; tab for tabs")] = ",",
) -> Reader:
    """Shards from a table with image paths and captions."""
    from data_prep.readers.table import Table

    kept, dropped = pairs(where, "--where"), pairs(exclude_regex, "--exclude-regex")
    return Table.open(file, columns([file]), kept, dropped, separator)


@kind("jsonl", "python -m data_prep build jsonl pairs.jsonl --out shards/pairs --image-column file --caption '{title}, {year}'")
@_with_columns
def build_jsonl(file: Annotated[list[str], typer.Argument(help="JSON Lines, paths or URLs")], columns: Any) -> Reader:
    """Shards from JSON Lines: one object a line, with an image's path or its bytes in base64."""
    from data_prep.readers.lines import json_lines

    return json_lines(file, columns(file))


@kind("tsv", "python -m data_prep build tsv pairs.tsv --out shards/pairs --columns id,image,text --base64 --caption text")
@_with_columns
def build_tsv(
    file: Annotated[list[str], typer.Argument(help="tab-separated values without quoting, paths or URLs")],
    columns: Any,
    column_names: Annotated[
        str | None, typer.Option("--columns", help="names of the columns, joined by commas, where the files have no header line")
    ] = None,
) -> Reader:
    """Shards from tab-separated values without quoting, with paths or base64. For quoted fields use `csv --separator tab`."""
    from data_prep.readers.lines import tab_separated

    return tab_separated(file, columns(file), column_names.split(",") if column_names else None)


@kind("parquet", "python -m data_prep build parquet data/train-*.parquet --out shards/pairs --caption text")
@_with_columns
def build_parquet(file: Annotated[list[str], typer.Argument(help="parquet files, paths or URLs")], columns: Any) -> Reader:
    """Shards from parquet: a column of bytes, of {bytes, path} as the Hugging Face hub has it, of base64 or of paths."""
    from data_prep.readers.parquet import parquet_files

    return parquet_files(file, columns(file))


@kind("datasets", "python -m data_prep build datasets saved/flowers --split train --out shards/flowers --label-column label")
@_with_columns
def build_datasets(
    out: str,
    name: Annotated[str, typer.Argument(help="a folder of save_to_disk, a data set of the hub, or a loader such as imagefolder")],
    columns: Any,
    config: Annotated[str | None, typer.Option("--name", help="configuration of the data set")] = None,
    split: Annotated[str | None, typer.Option(help="which split")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="read the hub as a stream, without a copy of the set on disk")] = False,
    data_dir: Annotated[str | None, typer.Option(help="passed to load_dataset")] = None,
    data_files: Annotated[list[str], typer.Option(help="passed to load_dataset; may be repeated")] = [],  # noqa: B006
) -> Reader:
    """Shards from a Hugging Face data set; the image column is not decoded, its bytes pass through."""
    from data_prep.readers.hub import folders, from_dataset, load

    for read in (data_dir, name if files.exists(name) else None):
        if read is not None:
            shared.check_apart(out, read)
    dataset = load(name, config, split, stream, data_dir, data_files or None)
    return from_dataset(dataset, replace(columns([]), folders=folders(name, data_dir, data_files)), name)
