"""The reader of a folder in the layout of PASCAL VOC: JPEGImages, Annotations, ImageSets/Main, and SegmentationClass for masks.

VOC counts pixels from 1 and includes both corners, so a box is [xmin - 1, ymin - 1, xmax - xmin + 1, ymax - ymin + 1] in COCO's form.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from data_prep import files
from data_prep.build.readers.members import IMAGE_SUFFIXES, attempt, inside, json_member, path_key, read, read_image
from data_prep.records import InputError, Record, Skipped
from mmpretrain.data.formats import foreign_kind
from mmpretrain.data.schema import BadSample

MAX_XML = 16 << 20
MAX_DEPTH = 32
_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def parse_xml(data: bytes) -> Element:
    """Parses an untrusted XML document.

    Raises:
        BadSample: unsafe_xml for a DOCTYPE, and thus for any entity of its own; bad_xml.
    """
    if len(data) > MAX_XML:
        raise BadSample("unsafe_xml", f"{len(data)} bytes, at most {MAX_XML} are read")
    builder, parser, depth = TreeBuilder(), expat.ParserCreate(), 0

    def refuse(*_: object) -> None:
        raise BadSample("unsafe_xml", f"a DOCTYPE or ENTITY at line {parser.CurrentLineNumber}; annotations need none: delete it")

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise BadSample("unsafe_xml", f"elements nested more than {MAX_DEPTH} deep at line {parser.CurrentLineNumber}")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    try:
        parser.Parse(data, True)
        return builder.close()
    except BadSample:
        raise
    except (expat.ExpatError, ValueError, AssertionError, LookupError) as error:
        foreign = foreign_kind(data)
        detail = " ".join(foreign) if foreign and not data.lstrip().startswith(b"<") else str(error)[:200]
        raise BadSample("bad_xml", detail) from error


def _number(parent: Element, name: str) -> float:
    text = (parent.findtext(name) or "").strip()
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadSample("bad_box", f"{name} holds {text[:40]!r}, expected a number")
    return int(value) if value == int(value) else value


def _flag(thing: Element, name: str) -> dict[str, int]:
    return {name: 1} if (thing.findtext(name) or "").strip() == "1" else {}


def boxes(root: Element, numbers: dict[str, int] | None, zero_based: bool) -> list[dict[str, Any]]:
    """Converts the objects of an annotation to COCO's form.

    Args:
        root: the annotation.
        numbers: class name -> index; None: boxes without indices.
        zero_based: corners are edges counted from 0, not pixels counted from 1.

    Raises:
        BadSample: bad_box, unknown_category.
    """
    converted = []
    for thing in root.iter("object"):
        name = (thing.findtext("name") or "").strip()
        if numbers is not None and name not in numbers:
            raise BadSample("unknown_category", f"object {name!r} is not among the {len(numbers)} classes")
        outline = thing.find("bndbox")
        if outline is None:
            raise BadSample("bad_box", f"object {name!r} has no bndbox")
        left, top, right, bottom = (_number(outline, corner) for corner in _CORNERS)
        first = 0 if zero_based else 1
        box = [left - first, top - first, right - left + first, bottom - top + first]
        if box[2] <= 0 or box[3] <= 0:
            raise BadSample("bad_box", f"object {name!r} goes from {left}, {top} to {right}, {bottom}")
        label = {} if numbers is None else {"category_id": numbers[name]}
        converted.append({"bbox": box, "category": name} | label | _flag(thing, "difficult") | _flag(thing, "truncated"))
    return converted


def _index_png(data: bytes, name: str) -> bytes:
    """Checks that a mask is a PNG of class indices, and returns it. Raises BadSample: bad_mask."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 33:
        raise BadSample("bad_mask", f"{name} is not a PNG")
    if data[25] not in (0, 3):
        raise BadSample("bad_mask", f"{name} is a PNG in colour, expected class indices as grey or palette")
    return data


@dataclass(frozen=True)
class Item:
    """The name of an annotation, and its files relative to the folder; "" for a missing one."""

    name: str
    image: str
    annotation: str
    mask: str


@dataclass(frozen=True)
class Voc:
    """Reader of a VOC folder; see `voc`."""

    folder: str
    names: tuple[str, ...]  # the annotations to read
    category: tuple[str, ...]
    zero_based: bool = False

    @property
    def classes(self) -> list[str] | None:
        return list(self.category) or None

    def items(self) -> Iterator[Item]:
        """Yields the annotations to read, with their files."""
        files_of = {part: _by_stem(self.folder, part) for part in ("JPEGImages", "Annotations", "SegmentationClass")}
        for name in self.names:
            images = [file for file in files_of["JPEGImages"].get(name, []) if PurePosixPath(file).suffix.lower() in IMAGE_SUFFIXES]
            mask = next((file for file in files_of["SegmentationClass"].get(name, []) if file.lower().endswith(".png")), "")
            note = next((file for file in files_of["Annotations"].get(name, []) if file.lower().endswith(".xml")), "")
            yield Item(name, images[0] if images else "", note, mask)

    def tasks(self, max_count: int) -> Iterator[tuple[Item, ...]]:
        items = list(self.items())
        for start in range(0, len(items), max_count):
            yield tuple(items[start : start + max_count])

    def __call__(self, task: tuple[Item, ...]) -> Iterator[Record | Skipped]:
        for item in task:
            yield attempt(item.annotation or item.name, lambda item=item: self.record(item))

    def sources(self, task: tuple[Item, ...]) -> Iterator[str | None]:
        return (files.join(self.folder, name) for item in task for name in (item.image, item.annotation, item.mask) if name)

    def record(self, item: Item) -> Record:
        """Makes the record of an annotation. Raises BadSample."""
        metadata: dict[str, Any] = {}
        members: dict[str, bytes] = {}
        file = item.image
        if item.annotation:
            root = parse_xml(read(files.join(self.folder, item.annotation), "missing_annotation"))
            if root.tag != "annotation":
                flavour = "CVAT's XML for images: export it as PASCAL VOC. " if root.tag == "annotations" else ""
                raise BadSample("bad_xml", f"{flavour}Its root is <{root.tag}>, expected <annotation>"[:200])
            metadata["boxes"] = boxes(root, {name: i for i, name in enumerate(self.category)}, self.zero_based)
            size = root.find("size")
            if size is not None:
                metadata |= {side: _number(size, side) for side in ("width", "height")}
            named = (root.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2]
            file = file or f"JPEGImages/{named or item.name}"
        elif not item.mask:
            raise BadSample("missing_annotation", f"neither Annotations/{item.name}.xml nor SegmentationClass/{item.name}.png is there")
        extension, data = read_image(inside(self.folder, file or f"JPEGImages/{item.name}.jpg"))
        if item.mask:
            members["mask.png"] = _index_png(read(files.join(self.folder, item.mask), "missing_mask"), item.mask)
        if metadata:
            members["json"] = json_member(metadata)
        return Record(path_key(item.name + ".xml"), members | {extension: data})


def _by_stem(folder: str, part: str) -> dict[str, list[str]]:
    by_stem: dict[str, list[str]] = {}
    for path in files.listing(files.join(folder, part)):
        name = path.rpartition("/")[2]
        by_stem.setdefault(name.rpartition(".")[0] or name, []).append(f"{part}/{name}")
    return by_stem


def _split(folder: str, split: str) -> list[str]:
    """Reads the names in a list of ImageSets; in the list of a class (name and 1, 0 or -1), those marked 1. Raises InputError."""
    lists = {path: path.rpartition("/")[2].removesuffix(".txt") for part in ("Main", "Segmentation") for path in _lists(folder, part)}
    chosen = next((path for path, name in lists.items() if name == split), None)
    if chosen is None:
        raise InputError(f"{folder} has no split {split!r}; ImageSets lists {', '.join(sorted(set(lists.values()))) or 'none'}")
    lines = [line.split() for line in files.read_bytes(chosen).decode("utf-8", "replace").splitlines()]
    return [words[0] for words in lines if words and (len(words) == 1 or words[1] == "1")]


def _lists(folder: str, part: str) -> list[str]:
    return [path for path in files.listing(files.join(folder, f"ImageSets/{part}")) if path.endswith(".txt")]


def voc(folder: str, split: str | None = None, zero_based: bool = False, classes: tuple[str, ...] | None = None) -> Voc:
    """Opens a reader of a VOC folder.

    Args:
        folder: folder or URL.
        split: a list of ImageSets; None: all annotations.
        zero_based: corners are edges counted from 0, not pixels counted from 1.
        classes: the class names in order; None: those of all annotations, whatever the split.

    Raises:
        InputError: the folder has another layout or no such split.
    """
    annotations = _by_stem(folder, "Annotations")
    if not annotations and not files.listing(files.join(folder, "SegmentationClass")):
        there = ", ".join(path.rpartition("/")[2] for path in files.listing(folder)[:8])
        raise InputError(f"{folder}: expected Annotations with XML files (and JPEGImages), found {there or 'nothing'}")
    names = sorted({*annotations, *_by_stem(folder, "SegmentationClass")}) if split is None else _split(folder, split)
    repeated = sorted(name for name, times in Counter(names).items() if times > 1)
    if repeated:
        raise InputError(f"{folder}: split {split} lists {', '.join(repeated[:3])} more than once")
    return Voc(folder, tuple(names), classes if classes is not None else _categories(folder, annotations), zero_based)


def _categories(folder: str, annotations: dict[str, list[str]]) -> tuple[str, ...]:
    names: set[str] = set()
    for file in sorted(file for group in annotations.values() for file in group if file.lower().endswith(".xml")):
        try:
            root = parse_xml(read(files.join(folder, file)))
        except BadSample:
            continue
        names |= {(thing.findtext("name") or "").strip() for thing in root.iter("object")}
    return tuple(sorted(names - {""}))
