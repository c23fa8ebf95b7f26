"""The other commands of `build`: tables of bytes, Hugging Face sets, annotation formats, shards of others."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

import typer

from data_prep import files
from data_prep import options as shared
from data_prep.build import app, finish, pairs
from data_prep.records import InputError

Classes = Annotated[str | None, typer.Option("--classes", help="file of class names, one a line, in the order of their indices")]
Fields = Annotated[
    list[str], typer.Option("--caption", help="a column, or a template over columns, '{name}: {keywords}'; repeated: several captions")
]
Members = Annotated[list[str], typer.Option("--member", help="keep only members of this extension; may be repeated")]
Require = Annotated[list[str], typer.Option("--require", help="leave out samples without a member of this extension; may be repeated")]
Keys = Annotated[str, typer.Option("--keys", help="keep, or shard: put the shard's name before each key, where every shard counts from 0")]


def _class_names(file: str | None) -> tuple[str, ...] | None:
    if file is None:
        return None
    _there(file)
    try:
        names = tuple(line.strip() for line in files.read_bytes(file).decode("utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise InputError(f"--classes {file}: not UTF-8 ({error})") from error
    if not names or len(set(names)) != len(names):
        raise InputError(
            f"--classes {file}: expected different class names, one a line; found {len(names)}, {len(set(names))} of them different"
        )
    return names


def _column_options(
    image_column: Annotated[str, typer.Option(help="column of paths, of bytes, of {bytes, path} or of data: URIs")] = "image",
    base64: Annotated[bool, typer.Option("--base64", help="the image column is base64 text")] = False,
    root: Annotated[str | None, typer.Option(help="folder or URL that image paths are relative to; default: the table's")] = None,
    caption: Fields = [],  # noqa: B006
    join: Annotated[list[str], typer.Option(help="COLUMN=MARK: in captions, replace MARK in the column by ', ' (keywords='|')")] = [],  # noqa: B006
    key_column: Annotated[str | None, typer.Option(help="column whose text is added to the keys, which are row numbers")] = None,
    label_column: Annotated[str | None, typer.Option(help="column of class names or indices, for cls and classnames.txt")] = None,
    classes: Classes = None,
    extra: Annotated[list[str], typer.Option(help="column to keep in the json member; may be repeated")] = [],  # noqa: B006
) -> None:
    """The options of every table."""


def _with_columns(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose argument `columns`, a function of the default root, comes from options of its own."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD and p.name != "columns"]
    of_columns = inspect.signature(_column_options, eval_str=True).parameters

    def wrapped(**arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in of_columns}

        def columns(root: str) -> Any:
            from data_prep.readers.columns import Columns

            return Columns(
                image=given["image_column"],
                captions=tuple(given["caption"]),
                key=given["key_column"],
                label=given["label_column"],
                classes=_class_names(given["classes"]),
                extra=tuple(given["extra"]),
                join=tuple(pairs(given["join"], "--join").items()),
                base64=given["base64"],
                root=given["root"] if given["root"] is not None else root,
            )

        command(columns=columns, **arguments)

    wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own, *of_columns.values())]
    wrapped.__signature__ = inspect.Signature(parameters)  # what with_build_options reads
    return wrapped


def _folder_of(inputs: list[str]) -> str:
    """The folder of the first table, once all are there. Raises InputError."""
    _there(*inputs)
    return inputs[0].rpartition("/")[0] or "."


def _there(*inputs: str) -> None:
    for name in inputs:
        if not files.exists(name):
            raise InputError(f"{name}: no such file or folder")


@app.command(
    "jsonl", epilog="python -m data_prep build jsonl pairs.jsonl --out shards/pairs --image-column file --caption '{title}, {year}'"
)
@shared.with_build_options
@_with_columns
def build_jsonl(file: Annotated[list[str], typer.Argument(help="JSON Lines, paths or URLs")], columns: Any, **common: Any) -> None:
    """Shards from JSON Lines: one object a line, with an image's path or its bytes in base64."""
    from data_prep.readers.lines import json_lines

    with shared.input_errors():
        reader = json_lines(file, columns(_folder_of(file)))
    finish(reader, **common)


@app.command("tsv", epilog="python -m data_prep build tsv pairs.tsv --out shards/pairs --columns id,image,text --base64 --caption text")
@shared.with_build_options
@_with_columns
def build_tsv(
    file: Annotated[list[str], typer.Argument(help="tab-separated values without quoting, paths or URLs")],
    columns: Any,
    column_names: Annotated[
        str | None, typer.Option("--columns", help="names of the columns, joined by commas, where the files have no header line")
    ] = None,
    **common: Any,
) -> None:
    """Shards from tab-separated values without quoting, with paths or base64. For quoted fields use `csv --separator tab`."""
    from data_prep.readers.lines import tab_separated

    with shared.input_errors():
        reader = tab_separated(file, columns(_folder_of(file)), column_names.split(",") if column_names else None)
    finish(reader, **common)


@app.command("parquet", epilog="python -m data_prep build parquet data/train-*.parquet --out shards/pairs --caption text")
@shared.with_build_options
@_with_columns
def build_parquet(file: Annotated[list[str], typer.Argument(help="parquet files, paths or URLs")], columns: Any, **common: Any) -> None:
    """Shards from parquet: a column of bytes, of {bytes, path} as the Hugging Face hub has it, of base64 or of paths."""
    from data_prep.readers.parquet import parquet_files

    with shared.input_errors():
        reader = parquet_files(file, columns(_folder_of(file)))
    finish(reader, **common)


@app.command("datasets", epilog="python -m data_prep build datasets saved/flowers --split train --out shards/flowers --label-column label")
@shared.with_build_options
@_with_columns
def build_datasets(
    name: Annotated[str, typer.Argument(help="a folder of save_to_disk, a data set of the hub, or a loader such as imagefolder")],
    columns: Any,
    config: Annotated[str | None, typer.Option("--name", help="configuration of the data set")] = None,
    split: Annotated[str | None, typer.Option(help="which split")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="read the hub as a stream, without a copy of the set on disk")] = False,
    data_dir: Annotated[str | None, typer.Option(help="passed to load_dataset")] = None,
    data_files: Annotated[list[str], typer.Option(help="passed to load_dataset; may be repeated")] = [],  # noqa: B006
    **common: Any,
) -> None:
    """Shards from a Hugging Face data set; the image column is not decoded, its bytes pass through."""
    from data_prep.readers.hub import folders, from_dataset, load

    with shared.input_errors():
        dataset = load(name, config, split, stream, data_dir, data_files or None)
        reader = from_dataset(dataset, replace(columns("."), folders=folders(name, data_dir, data_files)), name)
    finish(reader, **common)


@app.command("sidecar", epilog="python -m data_prep build sidecar photos/ --out shards/photos --caption '{title}: {txt}'")
@shared.with_build_options
def build_sidecar(
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
    classes: Classes = None,
    **common: Any,
) -> None:
    """Shards from images with a caption file beside each."""
    from data_prep.readers.sidecar import sidecar

    with shared.input_errors():
        _there(folder)
        shared.check_apart(common["out"], folder)
        reader = sidecar(folder, tuple(caption), lines, label_column, label_from_folder, _class_names(classes))
    finish(reader, **common)


@app.command("coco", epilog="python -m data_prep build coco instances_val.json captions_val.json val2017/ --out shards/coco")
@shared.with_build_options
def build_coco(
    annotations: Annotated[list[str], typer.Argument(help="instances and captions files of the same images")],
    images: Annotated[str, typer.Argument(help="folder or URL of the images")],
    **common: Any,
) -> None:
    """Shards from COCO annotations: boxes (x, y, width, height) and captions in the json member, the first caption in txt."""
    from data_prep.readers.coco import coco

    with shared.input_errors():
        _there(*annotations, images)
        reader = coco(annotations, images)
    finish(reader, **common)


@app.command("voc", epilog="python -m data_prep build voc VOCdevkit/VOC2012 --split train --out shards/voc_train")
@shared.with_build_options
def build_voc(
    folder: Annotated[str, typer.Argument(help="folder with JPEGImages, Annotations and ImageSets")],
    split: Annotated[str | None, typer.Option(help="a list of ImageSets/Main or Segmentation; default: all annotations")] = None,
    zero_based: Annotated[
        bool, typer.Option("--zero-based", help="corners are edges counted from 0; VOC counts pixels from 1 and includes both")
    ] = False,
    classes: Classes = None,
    **common: Any,
) -> None:
    """Shards from PASCAL VOC annotations: boxes in COCO's form in the json member, masks in mask.png."""
    from data_prep.readers.voc import voc

    with shared.input_errors():
        _there(folder)
        reader = voc(folder, split, zero_based, _class_names(classes))
    finish(reader, **common)


@app.command("img2dataset", epilog="python -m data_prep build img2dataset downloads/ --out shards/web --require txt --skip-bad")
@shared.with_build_options
def build_img2dataset(
    folder: Annotated[str, typer.Argument(help="output folder of img2dataset, format webdataset")],
    members: Members = [],  # noqa: B006
    require: Require = [],  # noqa: B006
    keys: Keys = "keep",
    **common: Any,
) -> None:
    """Shards from what img2dataset downloaded; its tars are held against the counts in its _stats.json."""
    from data_prep.readers.img2dataset import img2dataset

    with shared.input_errors():
        _there(folder)
        reader = img2dataset(folder, tuple(members), tuple(require), keys)
    finish(reader, **common)


@app.command("shards", epilog="python -m data_prep build shards 'theirs/{00000..00099}.tar' --out shards/ours --skip-bad")
@shared.with_build_options
def build_shards(
    spec: Annotated[list[str], typer.Argument(help="shards: paths, globs, brace ranges, folders, URLs")],
    members: Members = [],  # noqa: B006
    require: Require = [],  # noqa: B006
    keys: Keys = "keep",
    **common: Any,
) -> None:
    """Shards of --max-count samples from other WebDataset shards; damaged samples are left out and listed (--skip-bad)."""
    from data_prep.readers.shards import shards

    with shared.input_errors():
        reader = shards(shared.shard_names(spec), tuple(members), tuple(require), keys)
    finish(reader, **common)
