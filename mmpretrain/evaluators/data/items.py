"""Evaluation items of class folders, CSV files, shards and CLIP_benchmark folders, listed without decoding."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mmpretrain.data.cache import ShardCache
from mmpretrain.data.captions import CaptionTemplate
from mmpretrain.data.fields import Fields, place_of
from mmpretrain.data.folders import is_image, walk
from mmpretrain.data.formats import clean_texts, is_utf8, printable, read_text
from mmpretrain.data.schema import BadSample, ShardError, image_extension, several_images
from mmpretrain.data.shard_names import expand
from mmpretrain.data.shards import ShardSet
from mmpretrain.data.source_config import SourceConfig
from mmpretrain.data.tables import MAX_FIELD, Header, distinct_integers, open_local, read_rows, separator_of, slashed, some
from mmpretrain.evaluators.base import OptionError
from mmpretrain.evaluators.data.class_names import Label

logger = logging.getLogger(__name__)
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval"}


@dataclass
class Item:
    """An image that is not read yet, with its label or captions. `size` and `stamp` identify its bytes for the feature cache."""

    key: str
    read: Callable[[], bytes]
    label: Label | None = None  # as on disk: an integer, or a name
    captions: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    size: int = 0
    stamp: int = 0  # the file's modification time in ns, plus the offset in a shard
    bare_key: str = ""  # the key by which `split` divides: that within its shard, or the file

    def __post_init__(self) -> None:
        self.bare_key = self.bare_key or self.key


Skip = Callable[[str, str], None]  # (key, reason): an item that cannot be used


def _file_item(key: str, path: Path, **known: Any) -> Item:
    status = path.stat()
    return Item(key, path.read_bytes, size=status.st_size, stamp=status.st_mtime_ns, **known)


def folder_items(root: Path, subset: str | None, skip: Skip) -> Iterator[Item]:
    """List the images of an ImageFolder, root/[subset/]CLASS/**/image: the files that `data_prep build folder` takes.

    The label is the folder's name. Hidden files are passed over; files that are not images, and images outside of class
    folders, are left out with a warning.

    Args:
        root: the folder.
        subset: a folder in it; None: the folder itself.
        skip: receives images that cannot be used.

    Raises:
        OptionError: no such subset, or the folders are subsets.
    """
    base = root
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if subset is not None:
        base = root / subset
        if not base.is_dir():
            raise OptionError(f"{root}: no subset {subset!r}; folders there are {', '.join(folders[:20]) or 'none'}")
    elif folders and {name.lower() for name in folders} <= SPLITS:
        raise OptionError(f"{root}: its folders {', '.join(folders)} are subsets, not classes: add subset={folders[0]}")
    others: list[str] = []
    outside: list[str] = []
    for name in walk(base):
        if not is_image(str(base / name)):
            others.append(name)
        elif "/" not in name:
            outside.append(name)
        else:
            key = name if subset is None else f"{subset}/{name}"
            if (base / name).is_file():
                yield _file_item(key, base / name, label=name.split("/", 1)[0])
            else:
                skip(key, "missing_file")
    for names, what in ((others, "that are not images"), (outside, "that lie in no class folder")):
        if names:
            logger.warning("%s: %d files %s are left out: %s", base, len(names), what, some(names, 3))


def _column(wanted: str | None, usual: tuple[str, ...], columns: list[str], what: str, path: Path) -> str | None:
    if wanted is not None:
        if wanted not in columns:
            raise OptionError(f"{path}: no column {wanted!r} for the {what}; columns are {some(columns)}")
        return wanted
    return next((name for name in usual if name in columns), None)


def csv_items(
    path: Path,
    subset: str | None,
    image: str | None,
    label: str | None,
    caption: str | None,
    captions_wanted: bool,
    skip: Skip,
    rows: int | None = None,
) -> Iterator[Item]:
    """List the rows of a table with a file column, relative to the table's folder, and a label or caption column.

    Args:
        path: .csv, or .tsv with tabs.
        subset: value of the column `split`; None: all rows.
        image: column of the files; None: a usual name.
        label: column of the labels; None: a usual name.
        caption: a column, or a template over columns (`"{name}: {keywords}"`); None: a usual name.
        captions_wanted: read captions instead of labels; rows of one file are then one item.
        skip: receives unusable rows.
        rows: read only this number of rows.

    Raises:
        OptionError: a column is missing, or the table is malformed.
    """
    with open_local(path) as text:
        separator = "\t" if path.suffix.lower() == ".tsv" else separator_of(text.readline(MAX_FIELD))
    with open_local(path) as text:
        table = read_rows(text, separator)
        header = Header.read(str(path), table)
        fitted = ((line, fields if isinstance(fields, str) else header.fit(fields)) for line, fields in table)
        at = header.place("split") if subset is not None and "split" in header.named else None
        listed = list(islice((row for row in fitted if at is None or isinstance(row[1], str) or row[1][at] == subset), rows))
    columns = header.named
    image = _column(image, ("file", "filepath", "filename", "path", "image"), columns, "image file (image=)", path)
    if image is None:
        raise OptionError(f"{path}: which column holds the image files? Columns are {some(columns)}: add image=COLUMN")
    if subset is not None and "split" not in columns:
        raise OptionError(f"{path}: subset={subset!r} needs a column `split`; columns are {some(columns)}")
    if captions_wanted:
        template = caption or next((c for c in ("caption", "title", "text", "name") if c in columns), None)
        if template is None:
            raise OptionError(f"{path}: which column holds the captions? Columns are {some(columns)}: add caption=COLUMN")
        texts = CaptionTemplate((), template) if template in columns else CaptionTemplate.parse(template)
        if unknown := [name for name in texts.columns if name not in columns]:
            raise OptionError(f"{path}: caption={caption!r} names no column {unknown[0]!r}; columns are {some(columns)}")
    else:
        label = _column(label, ("label", "class", "name", "title"), columns, "label (label=)", path)
        if label is None:
            raise OptionError(f"{path}: which column holds the labels? Columns are {some(columns)}: add label=COLUMN")
    for column in [image, *(texts.columns if captions_wanted else [label])]:
        header.place(column)
    grouped: dict[str, Item] = {}
    for line, fields in listed:
        if isinstance(fields, str):
            skip(f"line {line}", f"bad_row: {fields}")
            continue
        record = dict(zip(header.names, fields))
        name = record[image]
        try:
            file_path = path.parent / slashed(str(path.parent), name)
            found = bool(name) and file_path.is_file()
        except (BadSample, ValueError):  # a path of another system, or one that no file can have
            found = False
        if not found:
            skip(printable(name) or f"line {line}", "missing_file")
            continue
        if not captions_wanted:
            text = record[str(label)].strip()
            if not text or not is_utf8(text):
                skip(name, "not_utf8: its label" if text else "missing_label")
                continue
            key = name if name not in grouped else f"{name}#{line}"
            grouped[key] = _file_item(key, file_path, label=_label(text), metadata=record, bare_key=name)
            continue
        try:
            texts_of_row = clean_texts(texts.fill(record))
        except BadSample as error:
            skip(f"{name}, line {line}", str(error))
            continue
        if name not in grouped:
            grouped[name] = _file_item(name, file_path, metadata=record)
        grouped[name].captions += texts_of_row
    for name, item in grouped.items():
        if captions_wanted and not item.captions:
            skip(name, "missing_caption")
        else:
            yield item


def shard_paths(data: str, subset: str | None) -> list[str]:
    """Expand a shard spec as in a recipe (folder, glob, braces, a::b, URL); with `subset`, the folder DATA/SUBSET."""
    if subset is not None and not Path(data).is_dir():
        raise OptionError(f"{data}: subset={subset!r} needs a folder with {subset}/*.tar inside; name that subset's shards instead")
    try:
        return list(expand(data if subset is None else str(Path(data) / subset)))
    except ShardError as error:
        raise OptionError(f"data={data!r}: {error}") from error


def shard_items(
    paths: list[str],
    label: str | None,
    caption: str | None,
    skip: Skip,
    *,
    image: str | None = None,
    lines: bool = False,
    metadata: bool = False,
) -> Iterator[Item]:
    """List the samples of shards, with the limits and checks of training sources.

    Args:
        paths: of the shards.
        label: a member (`cls`) or a field of the JSON member (`json:label`); a member that is an integer is an integer
            label.
        caption: a member (`txt`) or a field of the JSON member.
        skip: receives unusable samples.
        image: the member that is the image (`png`); None: the first of the usual ones.
        lines: every line of the caption member is a caption.
        metadata: read the JSON member.

    Raises:
        OptionError: no sample has the required members.
        ShardError: a shard cannot be read.
    """
    shards = ShardSet(paths, split=None, window=SourceConfig.shuffle_window, cache=ShardCache(), verify=SourceConfig.verify)
    for name, damage in shards.damage:
        for _ in range(damage.lost):
            skip(f"{name}@{damage.offset}", damage.reason)
    for name, member in shards.left_out:
        if member.lost:
            skip(f"{Path(name).name}/{member.key}", f"{member.reason}: {member}")
    if image is None and (several := several_images(shards.extension_counts, shards.looked_at)):
        logger.warning("%s: %s. image= says which.", paths[0], several)
    usable = 0
    for shard, (name, count) in enumerate(shards):
        written = 0
        for sample in range(count):
            key, members, opened = shards.members(shard, sample)
            if sample == 0:
                written = os.stat(opened.path).st_mtime_ns
            full = f"{Path(name).name}/{key}"
            try:
                place = place_of(members, image_extension(members, image), SourceConfig.max_member_bytes)
                item = Item(full, _reader(shards, shard, sample, image), size=place.size, stamp=written + place.offset, bare_key=key)
                read = lambda member, opened=opened: shards.read(opened, member)  # noqa: E731
                fields = Fields.placed(members, read, SourceConfig.max_member_bytes)
                item.metadata = fields.json() if metadata else {}
                item.label = None if label is None else _label(fields.value(label))
                item.captions = [] if caption is None else fields.captions(caption, lines)
            except BadSample as error:
                skip(full, str(error))
                continue
            usable += 1
            yield item
    if not usable:
        wanted = " and ".join(name for name in (image or "an image", label, caption, "json" if metadata else None) if name)
        have = ", ".join(sorted(shards.extension_counts)) or "nothing"
        raise OptionError(f"{paths[0]}: 0 of {shards.looked_at} samples have {wanted}; they have {have}")


def _reader(shards: ShardSet, shard: int, sample: int, image: str | None) -> Callable[[], bytes]:
    """Return a function that reads the image later; the shard set keeps a bounded number of files open."""

    def read() -> bytes:
        _, members, opened = shards.members(shard, sample)
        return shards.read(opened, place_of(members, image_extension(members, image), SourceConfig.max_member_bytes))

    return read


def _label(value: Any) -> Label:
    if isinstance(value, str):
        value = value.strip()
        return int(value) if value.removeprefix("-").isdecimal() and len(value) < 20 and str(int(value)) == value else value
    if not isinstance(value, int):
        raise BadSample("bad_label", f"expected an integer or a name, found {value!r:.50}")
    return int(value)


def settle_labels(items: list[Item]) -> None:
    """Convert labels to numbers where all are integers as text, zero-padded ones too; 007 beside 7 leaves them texts."""
    texts = [str(item.label) for item in items]
    if any(isinstance(item.label, str) for item in items) and distinct_integers(texts):
        for item, text in zip(items, texts):
            item.label = int(text)


def benchmark_items(
    root: Path, subset: str, image: str | None, label: str | None, captions_wanted: bool, skip: Skip, brief: bool = False
) -> Iterator[Item]:
    """List the items of a CLIP_benchmark folder, root/SUBSET/{0..N-1}.tar with nshards.txt.

    Args:
        root: the folder.
        subset: its subset.
        image: the member that is the image; None: the first of the usual ones.
        label: the member of the labels; None: `cls`.
        captions_wanted: read captions in `txt`, one per line, instead of labels.
        skip: receives unusable samples.
        brief: read the first shard alone.

    Raises:
        OptionError: the folder has another layout.
    """
    counted = root / subset / "nshards.txt"
    if not counted.is_file():
        subsets = sorted(p.parent.name for p in root.glob("*/nshards.txt"))
        raise OptionError(f"{counted}: not found; subsets of this CLIP_benchmark folder are {', '.join(subsets) or 'none'}")
    count = read_text(counted).strip()
    if not count.isdigit():
        raise OptionError(f"{counted}: expected the number of shards, found {count[:60]!r}")
    paths = [root / subset / f"{n}.tar" for n in range(int(count))]
    if missing := [path for path in paths if not path.is_file()]:
        raise OptionError(f"{missing[0]}: not found, but {counted} says {len(paths)} shards")
    names = [str(path) for path in paths[: 1 if brief else None]]
    return shard_items(
        names, None if captions_wanted else label or "cls", "txt" if captions_wanted else None, skip, image=image, lines=True
    )


def lines_of(path: Path) -> list[str]:
    """Read the lines of a text file that are not blank."""
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]
