"""The commands `build KIND`: shards from one kind of input each, with the same options for the output."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import typer

from data_prep import cli, files
from data_prep.build.readers.base import Reader
from data_prep.shards.build import build
from data_prep.shards.task import part_folder
from mmpretrain.data.formats import printable

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Build shards from what you have. Image bytes pass through untouched unless asked.",
)


def finish(
    reader: Reader,
    out: cli.Out,
    *,
    max_count: cli.MaxCount = 10_000,
    max_bytes: cli.MaxBytes = 1 << 30,
    resize: cli.Resize = None,
    reencode: cli.Reencode = None,
    quality: cli.Quality = 95,
    holdout: cli.Holdout = None,
    holdout_by: cli.HoldoutBy = "image",
    licence: cli.Licence = None,
    skip_bad: cli.SkipBad = False,
    engine: cli.Engine = "local",
    processes: cli.Processes = None,
    json_output: cli.JsonOutput = False,
) -> dict[str, Any]:
    """Builds shards from what the reader reads, and prints a summary.

    Errors are printed as one line, with an exit status. The options are those of every `build KIND`.

    Returns:
        The manifest.
    """
    produce, split = reader, None
    if reencode is not None and reencode not in ("jpeg", "webp", "png"):
        raise typer.BadParameter(f"--reencode {reencode!r}: expected jpeg, webp or png")
    if holdout_by not in ("key", "image"):
        raise typer.BadParameter(f"--holdout-by {holdout_by!r}: expected key or image")
    image = getattr(reader, "image_member", None)
    if resize is not None or reencode is not None:
        from data_prep.build.images import Images

        produce = Images(reader, resize, reencode, quality, image)
    if holdout is not None:
        from data_prep.build.images import Holdout

        split = Holdout(holdout, holdout_by, image_member=image)
    options = repr(produce)
    if re.search(r" at 0x[0-9a-f]+>", options):
        raise TypeError(f"{type(reader).__name__} has no repr that is the same in the next run: {options}")
    with cli.one_line(status=1):  # from here on every error is one of the data or of OUT
        manifest = build(
            out,
            produce,
            reader.tasks(max_count),
            plan={"reader": options, "max_count": max_count},
            max_bytes=max_bytes,
            engine=engine,
            processes=processes,
            command=cli.command_line(),
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
    """Makes a command `build NAME` of a function that opens the reader of its inputs.

    The options of `finish` are added to its own.

    Args:
        name: of the command.
        epilog: an example, shown below the options.
    """
    common = [p for p in inspect.signature(finish, eval_str=True).parameters.values() if p.name != "reader"]

    def register(command: Callable[..., Reader]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())

        def wrapped(**arguments: Any) -> None:
            with cli.input_errors():
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
    for part, part_manifest in manifest.get("parts", {"": manifest}).items():
        members = ", ".join(f"{n} {name}" for name, n in part_manifest["members"].items())
        where = part_folder(out, part)
        typer.echo(f"{part_manifest['num_samples']} samples ({members}) in {len(part_manifest['shards'])} shards in {where}")
    if manifest["skipped"]:
        listed = files.join(out, "skipped.jsonl")
        with files.open_text(listed) as lines:
            first = json.loads(next(lines))["input"]
        reasons = ", ".join(f"{n} {reason}" for reason, n in manifest.get("reasons", {}).items())
        typer.echo(f"{manifest['skipped']} inputs left out{f' ({reasons})' if reasons else ''}, first {printable(first)}: see {listed}")


@kind("folder", "python -m data_prep build folder photos/ --out shards/photos --label-from-folder")
def build_folder(
    out: str,
    folder: Annotated[str, typer.Argument(help="folder or URL of images, at any depth")],
    label_from_folder: Annotated[
        bool, typer.Option("--label-from-folder", help="the first folder is the class: cls and classnames.txt")
    ] = False,
) -> Reader:
    """Build shards from a folder of images, with or without classes."""
    from data_prep.build.readers.folder import Folder

    cli.check_apart(out, folder)
    return Folder.open(folder, label_from_folder)


Fields = Annotated[
    list[str], typer.Option("--caption", help="a column, or a template over columns, '{name}: {keywords}'; repeated: several captions")
]


def pairs(items: list[str], option: str) -> dict[str, str]:
    """Parses COLUMN=VALUE options to a dict; `option` names them in the error."""
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
    classes: cli.Classes = None,
    extra: Annotated[list[str], typer.Option(help="column to keep in the json member; may be repeated")] = [],  # noqa: B006
) -> None:
    """Declares the options of every table."""


def _with_columns(command: Callable[..., Reader]) -> Callable[..., Reader]:
    """Adds the options of every table to a command; it receives them as `columns`, a function of the input files."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "columns"]
    of_columns = inspect.signature(_column_options, eval_str=True).parameters

    def wrapped(**arguments: Any) -> Reader:
        given = {name: arguments.pop(name) for name in of_columns}

        def columns(inputs: list[str]) -> Any:
            from data_prep.build.readers.columns import Columns

            cli.check_there(*inputs)
            return Columns(
                image=given["image_column"],
                captions=tuple(given["caption"]),
                key=given["key_column"],
                label=given["label_column"],
                classes=cli.class_names(given["classes"]),
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
    """Returns the folder of the first table; the current one without a table, such as for a set of the hub."""
    return (inputs[0].rpartition("/")[0] if inputs else "") or "."


@kind("csv", "python -m data_prep build csv pairs.csv --out shards/pairs --image-column file --caption '{name}: {keywords}'")
@_with_columns
def build_csv(
    file: Annotated[str, typer.Argument(help="the table, a path or URL, with a header line; UTF-8, or UTF-16 with a byte order mark")],
    columns: Any,
    where: Annotated[list[str], typer.Option(help="COLUMN=VALUE: keep only rows that hold it")] = [],  # noqa: B006
    exclude_regex: Annotated[list[str], typer.Option(help="COLUMN=PATTERN: drop rows that match")] = [],  # noqa: B006
    separator: Annotated[
        str | None, typer.Option(help="field separator; tab for tabs. Default: what the header line shows: a comma, a tab, ; or |")
    ] = None,
) -> Reader:
    """Build shards from a table with image paths and captions."""
    from data_prep.build.readers.csv_table import Table

    kept, dropped = pairs(where, "--where"), pairs(exclude_regex, "--exclude-regex")
    return Table.open(file, columns([file]), kept, dropped, separator)


@kind("jsonl", "python -m data_prep build jsonl pairs.jsonl --out shards/pairs --image-column file --caption '{title}, {year}'")
@_with_columns
def build_jsonl(file: Annotated[list[str], typer.Argument(help="JSON Lines, paths or URLs")], columns: Any) -> Reader:
    """Build shards from JSON Lines: one object per line, with an image's path or its bytes in base64."""
    from data_prep.build.readers.json_lines import json_lines

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
    """Build shards from tab-separated values without quoting, with paths or base64. For quoted fields use `csv --separator tab`."""
    from data_prep.build.readers.json_lines import tab_separated

    return tab_separated(file, columns(file), column_names.split(",") if column_names else None)


@kind("parquet", "python -m data_prep build parquet data/train-*.parquet --out shards/pairs --caption text")
@_with_columns
def build_parquet(file: Annotated[list[str], typer.Argument(help="parquet files, paths or URLs")], columns: Any) -> Reader:
    """Build shards from parquet: a column of bytes, of {bytes, path} as on the Hugging Face hub, of base64 or of paths."""
    from data_prep.build.readers.parquet import parquet_files

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
    """Build shards from a Hugging Face data set; the image column is not decoded, its bytes pass through."""
    from data_prep.build.readers.hf_datasets import folders, from_dataset, load

    for read in (data_dir, name if files.exists(name) else None):
        if read is not None:
            cli.check_apart(out, read)
    dataset = load(name, config, split, stream, data_dir, data_files or None)
    return from_dataset(dataset, replace(columns([]), folders=folders(name, data_dir, data_files)), name)


Members = Annotated[list[str], typer.Option("--member", help="keep only members of this extension; may be repeated")]
Require = Annotated[list[str], typer.Option("--require", help="leave out samples without a member of this extension; may be repeated")]
Keys = Annotated[str, typer.Option("--keys", help="keep, or shard: put the shard's name before each key, where every shard counts from 0")]


@kind("sidecar", "python -m data_prep build sidecar photos/ --out shards/photos --caption '{title}: {txt}'")
def build_sidecar(
    out: str,
    folder: Annotated[str, typer.Argument(help="folder or URL of images, at any depth, with a .txt or .json beside each")],
    caption: Annotated[
        list[str],
        typer.Option(
            help="a field of the .json, or a template over its fields, where {txt} is the .txt; repeated: several captions. "
            "Default: the .txt, else the field caption"
        ),
    ] = [],  # noqa: B006
    lines: Annotated[bool, typer.Option("--lines", help="every line of a .txt is a caption")] = False,
    label_column: Annotated[str | None, typer.Option(help="field of class names or indices, for cls and classnames.txt")] = None,
    label_from_folder: Annotated[bool, typer.Option("--label-from-folder", help="the first folder is the class")] = False,
    classes: cli.Classes = None,
) -> Reader:
    """Build shards from images with a caption file beside each."""
    from data_prep.build.readers.sidecar import sidecar

    cli.check_there(folder)
    cli.check_apart(out, folder)
    return sidecar(folder, tuple(caption), lines, label_column, label_from_folder, cli.class_names(classes))


@kind("coco", "python -m data_prep build coco instances_val.json captions_val.json val2017/ --out shards/coco")
def build_coco(
    annotations: Annotated[list[str], typer.Argument(help="instances and captions files of the same images")],
    images: Annotated[str, typer.Argument(help="folder or URL of the images")],
) -> Reader:
    """Build shards from COCO annotations: boxes (x, y, width, height) and captions in the json member, the first caption in txt."""
    from data_prep.build.readers.coco import coco

    cli.check_there(*annotations, images)
    return coco(annotations, images)


@kind("voc", "python -m data_prep build voc VOCdevkit/VOC2012 --split train --out shards/voc_train")
def build_voc(
    folder: Annotated[str, typer.Argument(help="folder with JPEGImages, Annotations and ImageSets")],
    split: Annotated[str | None, typer.Option(help="a list of ImageSets/Main or Segmentation; default: all annotations")] = None,
    zero_based: Annotated[
        bool, typer.Option("--zero-based", help="corners are edges counted from 0; VOC counts pixels from 1 and includes both")
    ] = False,
    classes: cli.Classes = None,
) -> Reader:
    """Build shards from PASCAL VOC annotations: boxes in COCO's form in the json member, masks in mask.png."""
    from data_prep.build.readers.voc import voc

    cli.check_there(folder)
    return voc(folder, split, zero_based, cli.class_names(classes))


@kind("img2dataset", "python -m data_prep build img2dataset downloads/ --out shards/web --require txt --skip-bad")
def build_img2dataset(
    folder: Annotated[str, typer.Argument(help="output folder of img2dataset, format webdataset")],
    members: Members = [],  # noqa: B006
    require: Require = [],  # noqa: B006
    keys: Keys = "keep",
    image_member: cli.ImageMember = None,
) -> Reader:
    """Build shards from the output of img2dataset; its tars are checked against the counts in its _stats.json."""
    from data_prep.build.readers.img2dataset import img2dataset

    cli.check_there(folder)
    return img2dataset(folder, tuple(members), tuple(require), keys, image_member)


@kind("shards", "python -m data_prep build shards 'theirs/{00000..00099}.tar' --out shards/ours --skip-bad")
def build_shards(
    spec: Annotated[list[str], typer.Argument(help="shards: paths, globs, brace ranges, folders, URLs")],
    members: Members = [],  # noqa: B006
    require: Require = [],  # noqa: B006
    keys: Keys = "keep",
    image_member: cli.ImageMember = None,
) -> Reader:
    """Build shards of --max-count samples from other WebDataset shards; damaged samples are left out and listed (--skip-bad)."""
    from data_prep.build.readers.webdataset import shards

    return shards(cli.shard_names(spec), tuple(members), tuple(require), keys, image_member)
