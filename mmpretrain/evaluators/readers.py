"""Where evaluation items come from: class folders, CSV files, shards, CLIP_benchmark folders. Nothing is decoded here."""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmpretrain.data.index import Member, open_index
from mmpretrain.data.schema import IMAGE_EXTENSIONS, ShardError, image_extension
from mmpretrain.evaluators.base import OptionError
from mmpretrain.evaluators.classes import Label

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}


@dataclass
class Item:
    """One image, not read yet, with what is known of it. `size` and `stamp` name its bytes for the feature cache."""

    key: str
    read: Callable[[], bytes]
    label: Label | None = None  # as on disk: an integer, or a name
    captions: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    size: int = 0
    stamp: int = 0  # the file's modification time in ns, plus the offset in a shard


Skip = Callable[[str, str], None]  # (key, reason): an item that cannot be used


def _file_item(key: str, path: Path, **known: Any) -> Item:
    status = path.stat()
    return Item(key, path.read_bytes, size=status.st_size, stamp=status.st_mtime_ns, **known)


def folder_items(root: Path, split: str | None) -> Iterator[Item]:
    """torchvision's ImageFolder layout: root/[split/]CLASS/**/image. The label is the folder's name."""
    base = root
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if split is not None:
        base = root / split
        if not base.is_dir():
            raise OptionError(f"{root}: no split {split!r}; folders there are {', '.join(folders[:20]) or 'none'}")
    elif folders and {name.lower() for name in folders} <= SPLITS:
        raise OptionError(f"{root}: its folders {', '.join(folders)} are splits, not classes: add split={folders[0]}")
    for directory in sorted(p for p in base.iterdir() if p.is_dir() and not p.name.startswith(".")):
        for path in sorted(directory.rglob("*")):
            if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS and path.is_file():
                yield _file_item(path.relative_to(root).as_posix(), path, label=directory.name)


def _column(wanted: str | None, usual: tuple[str, ...], columns: list[str], what: str, path: Path) -> str | None:
    if wanted is not None:
        if wanted not in columns:
            raise OptionError(f"{path}: no column {wanted!r} for the {what}; columns are {', '.join(columns)}")
        return wanted
    return next((name for name in usual if name in columns), None)


def csv_items(
    path: Path, split: str | None, image: str | None, label: str | None, caption: str | None, captions_wanted: bool, skip: Skip
) -> Iterator[Item]:
    """A table (.csv, or .tsv with tabs) with a file column, relative to the table's folder, and a label or caption column.

    `caption` is a column, or a template over columns (`"{name}: {keywords}"`). Where captions are wanted, rows of one file are one item.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        start = file.readline()
        file.seek(0)
        rows = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" or "\t" in start else ",", strict=True)
        columns = list(rows.fieldnames or [])
        records = list(rows)
    image = _column(image, ("file", "filepath", "filename", "path", "image"), columns, "image file (image=)", path)
    if image is None:
        raise OptionError(f"{path}: which column holds the image files? Columns are {', '.join(columns)}: add image=COLUMN")
    if split is not None:
        if "split" not in columns:
            raise OptionError(f"{path}: split={split!r} needs a column `split`; columns are {', '.join(columns)}")
        records = [record for record in records if record["split"] == split]
    if captions_wanted:
        template = caption or next((c for c in ("caption", "title", "text", "name") if c in columns), None)
        if template is None:
            raise OptionError(f"{path}: which column holds the captions? Columns are {', '.join(columns)}: add caption=COLUMN")
        template = f"{{{template}}}" if template in columns else template
        if unknown := [name for name in re.findall(r"\{([^{}]+)\}", template) if name not in columns] or (
            [] if "{" in template else [template]
        ):
            raise OptionError(f"{path}: caption={caption!r} names no column {unknown[0]!r}; columns are {', '.join(columns)}")
    else:
        label = _column(label, ("label", "class", "name", "title"), columns, "label (label=)", path)
        if label is None:
            raise OptionError(f"{path}: which column holds the labels? Columns are {', '.join(columns)}: add label=COLUMN")
    grouped: dict[str, Item] = {}
    for number, record in enumerate(records):
        name = record[image] or ""
        file_path = path.parent / name
        if not name or not file_path.is_file():
            skip(name or f"row {number + 2}", "missing_file")
            continue
        if not captions_wanted:
            if not (record[label] or "").strip():
                skip(name, "missing_label")
                continue
            key = name if name not in grouped else f"{name}#{number + 2}"
            grouped[key] = _file_item(key, file_path, label=_label(record[label]), metadata=record)
            continue
        text = re.sub(r"\{([^{}]+)\}", lambda match, record=record: record[match[1]] or "", template).strip()
        if name not in grouped:
            grouped[name] = _file_item(name, file_path, metadata=record)
        if text:
            grouped[name].captions.append(text)
    for name, item in grouped.items():
        if captions_wanted and not item.captions:
            skip(name, "missing_caption")
        else:
            yield item


def shard_paths(data: str, split: str | None) -> list[Path]:
    """`shards/{00000..00003}.tar`, `shards/*.tar`, a::b, or a folder of tars (DIR/split/*.tar where that exists), in a stated order."""
    from webdataset.shardlists import expand_urls

    paths: list[Path] = []
    for part in expand_urls(data):
        root = Path(part)
        if root.is_dir():
            inner = root / split if split is not None else root
            found = sorted(inner.glob("*.tar"), key=_natural)
            if not found:
                raise OptionError(f"{inner}: no .tar files there" + (f" (split={split})" if split else ""))
            paths += found
        elif split is not None:
            raise OptionError(f"{data}: split={split!r} needs a folder with {split}/*.tar inside; name that split's shards instead")
        else:
            paths += [root] if root.is_file() else sorted(map(Path, glob.glob(part)), key=_natural)
    if not paths:
        raise OptionError(f"data={data!r}: no such shards")
    return paths


def _natural(path: Path) -> tuple:
    """0, 1, 2, 10: CLIP_benchmark's shard numbers are not padded."""
    return tuple(int(t) if t.isdigit() else t for t in re.split(r"(\d+)", path.name))


def shard_items(paths: list[Path], label: str | None, caption: str | None, lines: bool, skip: Skip) -> Iterator[Item]:
    """Samples of shards. `label` and `caption` are a member (`cls`, `txt`) or a field of the JSON member (`json:label`).

    A member text that is an integer is an integer label. `lines`: every line of the caption member is a caption.
    Raises OptionError where no sample has what was asked for.
    """
    have: dict[str, int] = {}
    found = total = 0
    for path in paths:
        index = open_index(path)
        written = path.stat().st_mtime_ns
        for name, count in index.counts().items():
            have[name] = have.get(name, 0) + count
        for damage in index.damage:
            for _ in range(damage.lost):
                skip(f"{path}@{damage.offset}", damage.reason)
        for sample, key in enumerate(index.keys):
            members = index.members(sample)
            full = f"{path.name}/{key}"
            total += 1
            picture = image_extension(list(members))
            if picture is None:
                skip(full, "missing_field: image")
                continue
            place = members[picture]
            item = Item(full, _reader(path, place), size=place.size, stamp=written + place.offset)
            try:
                if "json" in members:
                    item.metadata = json.loads(_reader(path, members["json"])())
                item.label = None if label is None else _label(_value(path, members, item.metadata, label))
                item.captions = [] if caption is None else _captions(_value(path, members, item.metadata, caption), lines)
            except (KeyError, ValueError, TypeError) as error:
                skip(full, f"missing_field: {error}" if isinstance(error, KeyError) else f"bad_field: {error}")
                continue
            found += 1
            yield item
    if not found:
        wanted = " and ".join(name for name in ("an image", label, caption) if name)
        raise OptionError(f"{paths[0]}: 0 of {total} samples have {wanted}; they have {', '.join(sorted(have)) or 'nothing'}")


def _reader(path: Path, member: Member) -> Callable[[], bytes]:
    def read() -> bytes:
        with path.open("rb") as file:
            file.seek(member.offset)
            payload = file.read(member.size)
        if len(payload) != member.size:
            raise ShardError(f"{path}: {len(payload)} of {member.size} bytes at offset {member.offset}; the shard changed under its index")
        return payload

    return read


def _value(path: Path, members: dict[str, Member], metadata: dict[str, Any], name: str) -> Any:
    if name.startswith("json:"):
        return metadata[name.removeprefix("json:")]
    return _reader(path, members[name])().decode("utf-8")


def _label(value: Any) -> Label:
    if isinstance(value, str):
        value = value.strip()
        return int(value) if re.fullmatch(r"-?\d+", value) else value
    if not isinstance(value, int):
        raise ValueError(f"a label is an integer or a name, found {value!r:.50}")
    return int(value)


def _captions(value: Any, lines: bool) -> list[str]:
    texts = value if isinstance(value, list) else value.split("\n") if lines else [value]
    texts = [str(text).strip() for text in texts]
    if not any(texts):
        raise ValueError("empty caption")
    return [text for text in texts if text]


def benchmark_items(root: Path, split: str, label: str | None, captions_wanted: bool, skip: Skip) -> Iterator[Item]:
    """A CLIP_benchmark folder: root/split/{0..N-1}.tar with nshards.txt; integer `cls`, or captions in `txt`, one a line."""
    counted = root / split / "nshards.txt"
    if not counted.is_file():
        splits = sorted(p.parent.name for p in root.glob("*/nshards.txt"))
        raise OptionError(f"{counted}: not found; splits of this CLIP_benchmark folder are {', '.join(splits) or 'none'}")
    paths = [root / split / f"{n}.tar" for n in range(int(counted.read_text()))]
    if missing := [path for path in paths if not path.is_file()]:
        raise OptionError(f"{missing[0]}: not found, but {counted} says {len(paths)} shards")
    return shard_items(paths, None if captions_wanted else label or "cls", "txt" if captions_wanted else None, True, skip)


def lines_of(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
