"""`build csv` and `build folder`: a table or a folder tree -> shards. Image bytes pass through untouched."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Annotated, Any

import typer

from data_prep.writer import Record, write_shards
from mmpretrain.data.decode import sniff

app = typer.Typer(no_args_is_help=True, help="Build shards from a CSV table or a folder of images.")

EXTENSION = {"jpeg": "jpg", "png": "png", "webp": "webp", "gif": "gif", "bmp": "bmp", "tiff": "tiff", "ppm": "ppm"}


class Skips:
    """Inputs left out: counted, and listed in OUT/skipped.jsonl. Without `allow` the first missing image is an error."""

    def __init__(self, allow: bool) -> None:
        self.allow = allow
        self.records: list[dict[str, Any]] = []

    def add(self, where: str, reason: str, detail: str) -> None:
        if not self.allow:
            raise typer.BadParameter(f"{where}: {reason}: {detail}. Correct it, or pass --skip-bad to leave such inputs out and list them.")
        self.records.append({"input": where, "reason": reason, "detail": detail})

    def save(self, out: Path) -> None:
        if self.records:
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in self.records)
            (out / "skipped.jsonl").write_text(lines, encoding="utf-8")


def _image(path: Path, where: str, skips: Skips) -> tuple[str, bytes] | None:
    """(extension by content, bytes); None where skipped."""
    try:
        data = path.read_bytes()
    except OSError as error:
        skips.add(where, "missing_image", f"{path}: {error.strerror}")
        return None
    kind = sniff(data)
    if kind is None:
        skips.add(where, "unknown_format", f"{path} is no image that is read; it begins with {data[:12]!r}")
        return None
    return EXTENSION[kind], data


def _safe(text: str) -> str:
    return re.sub(r"[^\w-]+", "_", text).strip("_")[:80]


def _pairs(items: list[str], option: str) -> dict[str, str]:
    for item in items:
        if "=" not in item:
            raise typer.BadParameter(f"{option} {item!r}: expected COLUMN=VALUE")
    return dict(item.split("=", 1) for item in items)


def _read_table(file: Path, separator: str) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    csv.field_size_limit(1 << 24)
    handle = file.open(encoding="utf-8-sig", newline="")
    reader = csv.DictReader(handle, delimiter="\t" if separator in ("\\t", "tab") else separator)
    columns = list(reader.fieldnames or [])

    def rows() -> Iterator[tuple[int, dict[str, str]]]:
        with handle:
            for row in reader:
                if None in row or None in row.values():
                    raise typer.BadParameter(f"{file}, line {reader.line_num}: expected {len(columns)} fields ({', '.join(columns)})")
                yield reader.line_num, row

    return columns, rows()


def _need(columns: list[str], wanted: list[str], file: Path, option: str) -> None:
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise typer.BadParameter(f"{file} has no column {', '.join(map(repr, missing))} ({option}); it has {', '.join(columns)}")


def _fields(template: str, columns: list[str]) -> list[str]:
    """The columns that a caption template names."""
    fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    if "" in fields or any(not name.isidentifier() and name not in columns for name in fields):
        raise typer.BadParameter(f"--caption {template!r}: name columns in braces, e.g. '{{name}}: {{keywords}}'")
    return fields


def _fill(template: str, fields: list[str], row: dict[str, str], join: dict[str, str]) -> str:
    """The template filled from a row; "" where all its columns are empty."""
    values = {c: re.sub(r"\s+", " ", row[c].replace(join[c], ", ") if c in join else row[c]).strip() for c in fields}
    text = template.format_map(values).strip()
    # An empty joined column leaves no dangling "name: ".
    text = text if all(values.values()) else text.rstrip(":;,-").strip()
    return text if any(values.values()) or not fields else ""


def _chosen(
    rows: Iterator[tuple[int, dict[str, str]]], where: dict[str, str], exclude: dict[str, str]
) -> Iterator[tuple[int, int, dict[str, str]]]:
    """(number in the table, line, row) of the rows that --where and --exclude-regex leave."""
    excluded = {column: re.compile(pattern) for column, pattern in exclude.items()}
    for number, (line, row) in enumerate(rows):
        if all(row[c] == v for c, v in where.items()) and not any(p.search(row[c]) for c, p in excluded.items()):
            yield number, line, row


def csv_records(
    file: Path,
    image_column: str,
    captions: list[str],
    key_column: str | None,
    label_column: str | None,
    classes: dict[str, int] | None,
    extra: list[str],
    join: dict[str, str],
    where: dict[str, str],
    exclude: dict[str, str],
    separator: str,
    skips: Skips,
) -> Iterator[Record]:
    """One record a row, in the table's order. Keys are row numbers, followed by `key_column` where given.

    Of several caption templates the first makes `txt`, all together `captions` in the json.
    """
    columns, rows = _read_table(file, separator)
    templates = [(caption, _fields(caption, columns)) for caption in captions]
    _need(columns, [image_column], file, "--image-column")
    _need(columns, [field for _, fields in templates for field in fields], file, "--caption")
    _need(columns, [c for c in (key_column, label_column) if c], file, "--key-column, --label-column")
    _need(columns, [*extra, *join, *where, *exclude], file, "--extra, --join, --where, --exclude-regex")
    for number, line, row in _chosen(rows, where, exclude):
        at = f"{file.name}, line {line}"
        image = _image(file.parent / row[image_column], at, skips)
        if image is None:
            continue
        members = {image[0]: image[1]}
        texts = [text for template, fields in templates if (text := _fill(template, fields, row, join))]
        if templates and not texts:
            skips.add(at, "empty_caption", f"columns {', '.join(field for _, fields in templates for field in fields)} are empty")
            continue
        if texts:
            members["txt"] = texts[0].encode()
        if label_column is not None:
            assert classes is not None
            members["cls"] = str(classes[row[label_column]]).encode()
        metadata: dict[str, object] = {c: row[c] for c in extra}
        if len(templates) > 1:
            metadata["captions"] = list(dict.fromkeys(texts))
        if metadata:
            members["json"] = json.dumps(metadata, ensure_ascii=False, sort_keys=True).encode()
        suffix = f"_{_safe(row[key_column])}" if key_column and _safe(row[key_column]) else ""
        yield Record(f"{number:08d}{suffix}", members)


def folder_records(folder: Path, classes: list[str], skips: Skips) -> Iterator[Record]:
    """One record an image, sorted by path; with `classes`, the first folder of the path is its class."""
    number = {name: i for i, name in enumerate(classes)}
    for path in sorted(
        p for p in folder.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    ):
        relative = path.relative_to(folder)
        image = _image(path, str(relative), skips)
        if image is None:
            continue
        members = {image[0]: image[1]}
        if classes:
            if len(relative.parts) < 2:
                skips.add(str(relative), "no_class", "it lies in no class folder")
                continue
            members["cls"] = str(number[relative.parts[0]]).encode()
        # Names may collide once dots and spaces are replaced: the path's digest keeps keys apart.
        digest = hashlib.sha256(relative.as_posix().encode("utf-8", "surrogateescape")).hexdigest()[:10]
        stem = _safe("_".join(relative.with_suffix("").parts)) or "image"
        yield Record(f"{stem}_{digest}", members)


def _finish(records: Iterator[Record], out: Path, skips: Skips, max_count: int, licence: str | None, classes: list[str] | None) -> None:
    command = " ".join(["python -m data_prep", *sys.argv[1:]])
    try:
        manifest = write_shards(records, out, max_count=max_count, command=command, licence=licence)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if classes:
        (out / "classnames.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    skips.save(out)
    members = ", ".join(f"{n} {name}" for name, n in manifest["members"].items())
    typer.echo(f"{manifest['num_samples']} samples ({members}) in {len(manifest['shards'])} shards in {out}")
    if skips.records:
        typer.echo(f"{len(skips.records)} inputs left out: see {out / 'skipped.jsonl'}")


@app.command("csv", epilog="python -m data_prep build csv pairs.csv --out shards/pairs --image-column file --caption '{name}: {keywords}'")
def build_csv(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="the table; UTF-8, with a header line")],
    out: Annotated[Path, typer.Option(help="the folder to write shards to; new, or holding an unfinished build of the same inputs")],
    image_column: Annotated[str, typer.Option(help="column of image paths, relative to the table")] = "filepath",
    caption: Annotated[
        list[str],
        typer.Option(help="template over columns, e.g. '{name}: {keywords}'; repeated: several captions, all in the json's captions"),
    ] = [],  # noqa: B006
    key_column: Annotated[str | None, typer.Option(help="column whose text is added to the keys")] = None,
    label_column: Annotated[str | None, typer.Option(help="column of class names, written as indices to cls and to classnames.txt")] = None,
    extra: Annotated[list[str], typer.Option(help="column to keep in the json member; may be repeated")] = [],  # noqa: B006
    join: Annotated[list[str], typer.Option(help="COLUMN=MARK: in captions, replace MARK in the column by ', ' (keywords='|')")] = [],  # noqa: B006
    where: Annotated[list[str], typer.Option(help="COLUMN=VALUE: keep only rows that hold it")] = [],  # noqa: B006
    exclude_regex: Annotated[list[str], typer.Option(help="COLUMN=PATTERN: drop rows that match")] = [],  # noqa: B006
    separator: Annotated[str, typer.Option(help="field separator; tab for tabs")] = ",",
    max_count: Annotated[int, typer.Option(min=1, help="samples per shard")] = 10_000,
    licence: Annotated[str | None, typer.Option(help="licence of the data, noted in manifest.json")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave out missing images and empty captions, and list them")] = False,
) -> None:
    """Shards from a table with image paths and captions."""
    skips = Skips(skip_bad)
    rows_kept = _pairs(where, "--where"), _pairs(exclude_regex, "--exclude-regex")
    names = None
    if label_column is not None:
        columns, rows = _read_table(file, separator)
        _need(columns, [label_column, *rows_kept[0], *rows_kept[1]], file, "--label-column, --where, --exclude-regex")
        names = sorted({row[label_column] for _, _, row in _chosen(rows, *rows_kept)})
    classes = None if names is None else {name: i for i, name in enumerate(names)}
    filled = _pairs(join, "--join")
    records = csv_records(file, image_column, caption, key_column, label_column, classes, extra, filled, *rows_kept, separator, skips)
    _finish(records, out, skips, max_count, licence, names)


@app.command("folder", epilog="python -m data_prep build folder photos/ --out shards/photos --label-from-folder")
def build_folder(
    folder: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="images, at any depth")],
    out: Annotated[Path, typer.Option(help="the folder to write shards to; new, or holding an unfinished build of the same inputs")],
    label_from_folder: Annotated[
        bool, typer.Option("--label-from-folder", help="the first folder is the class: cls and classnames.txt")
    ] = False,
    max_count: Annotated[int, typer.Option(min=1, help="samples per shard")] = 10_000,
    licence: Annotated[str | None, typer.Option(help="licence of the data, noted in manifest.json")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="leave out files that are no image, and list them")] = False,
) -> None:
    """Shards from a folder of images, with classes or without."""
    skips = Skips(skip_bad)
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")) if label_from_folder else []
    if label_from_folder and not classes:
        raise typer.BadParameter(f"{folder} has no class folders (--label-from-folder)")
    _finish(folder_records(folder, classes, skips), out, skips, max_count, licence, classes or None)
