"""The reader of COCO annotation files: instances, captions, or both of the same images. Boxes are [x, y, width, height] in pixels."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from data_prep import files
from data_prep.build.readers.members import attempt, caption_members, inside, json_member, path_key, read_image
from data_prep.records import InputError, Record, Skipped
from mmpretrain.data.formats import foreign_kind
from mmpretrain.data.schema import BadSample
from mmpretrain.data.tables import some


@dataclass(frozen=True)
class Annotated:
    """An image with its annotations. `reason` and `detail`: why it cannot be used, where the annotations alone show it."""

    key: str
    image_id: int | str
    file: str
    size: tuple[int, int] | None
    boxes: tuple[tuple[Any, ...], ...] = ()  # (annotation id, bbox, category id, area, iscrowd)
    captions: tuple[str, ...] = ()
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Coco:
    """Reader of COCO annotations; see `coco`.

    `categories` are (id, name) in the order of their ids; a box's `category_id` is the index in that order, as in classnames.txt.
    """

    images: str
    inputs: tuple[Annotated, ...] = field(repr=False)
    categories: tuple[tuple[int, str], ...]
    captioned: bool

    @property
    def classes(self) -> list[str] | None:
        return [name for _, name in self.categories] or None

    def tasks(self, max_count: int) -> Iterator[tuple[Annotated, ...]]:
        for start in range(0, len(self.inputs), max_count):
            yield self.inputs[start : start + max_count]

    def __call__(self, task: tuple[Annotated, ...]) -> Iterator[Record | Skipped]:
        for item in task:
            yield attempt(f"image {item.image_id} ({item.file})", lambda item=item: self.record(item))

    def __getstate__(self) -> dict[str, Any]:  # a worker gets its inputs with each task
        return self.__dict__ | {"inputs": ()}

    def sources(self, task: tuple[Annotated, ...]) -> Iterator[str | None]:
        """Yields the images; the annotations are part of the task."""
        return (files.join(self.images, item.file) for item in task if not item.reason and not item.file.startswith("/"))

    def record(self, item: Annotated) -> Record:
        """Makes the record of an image. Raises BadSample."""
        if item.reason:
            raise BadSample(item.reason, item.detail)
        metadata: dict[str, Any] = {"file_name": item.file, "image_id": item.image_id}
        if item.size is not None:
            metadata |= {"width": item.size[0], "height": item.size[1]}
        members: dict[str, bytes] = {}
        if self.captioned:
            members |= caption_members(item.captions, True, metadata, f"{len(item.captions)} captions")
        if self.categories:
            metadata["boxes"] = [self._box(*box) for box in item.boxes]
        extension, data = read_image(inside(self.images, item.file))
        return Record(item.key, members | {extension: data, "json": json_member(metadata)})

    def _box(self, annotation: Any, bbox: Any, category: Any, area: Any, crowd: Any) -> dict[str, Any]:
        index = next((i for i, (known, _) in enumerate(self.categories) if known == category), None)
        if index is None:
            raise BadSample("unknown_category", f"annotation {annotation} has category_id {category!r}, which `categories` does not list")
        numbers = bbox if isinstance(bbox, list | tuple) and len(bbox) == 4 else ()
        finite = all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
        if not numbers or not finite or numbers[2] < 0 or numbers[3] < 0:
            raise BadSample("bad_box", f"annotation {annotation} has bbox {bbox!r}, expected [x, y, width, height] in pixels"[:300])
        box = {"bbox": list(numbers), "category": self.categories[index][1], "category_id": index}
        if isinstance(area, int | float) and math.isfinite(area):
            box["area"] = area
        return box | ({"iscrowd": 1} if crowd == 1 else {})


def flavour_of(value: Any) -> str | None:
    """Names another kind of annotation file, with the remedy; None for COCO's own kinds and for what is not known."""
    if isinstance(value, list):
        first = value[0] if value else None
        if not isinstance(first, dict):
            return None
        if "image_id" in first and "score" in first:
            return "a list of detections, COCO's results format. Add the `images` and `categories` of the ground truth"
        if "regions" in first:
            return "Visual Genome's region descriptions. Write them as JSON Lines, one region a line, for `build jsonl`"
        if "annotations" in first and ("data" in first or "completions" in first):
            return "an export of Label Studio. Export it there as COCO"
        return f"a list of objects with {some(first, 8)}. If each is an image with its caption, write one a line for `build jsonl`"
    if not isinstance(value, dict):
        return None
    images, notes = value.get("images"), value.get("annotations")
    image = images[0] if isinstance(images, list) and images and isinstance(images[0], dict) else {}
    note = notes[0] if isinstance(notes, list) and notes and isinstance(notes[0], dict) else {}
    if "_via_img_metadata" in value or "_via_settings" in value:
        return "a project of the VGG Image Annotator. Export it there as COCO"
    if "shapes" in value and "imagePath" in value:
        return "the annotation of one image by LabelMe. Convert the folder with labelme2coco"
    if "sentences" in image:
        return "Karpathy's split, with `sentences` in each image. Write one caption a line for `build jsonl`"
    if "segments_info" in note:
        return "COCO's panoptic annotations, which have segments in place of boxes. Use the instances file"
    if "anns" in value and "imgs" in value:
        return "an index of annotations (`imgs`, `anns`), as COCO-Text has it. Write their values as lists `images` and `annotations`"
    if "question" in note or "questions" in value:
        return "questions and answers (VQA). Write one question a line for `build jsonl`"
    if image and "file_name" not in image and "coco_url" in image:
        return "LVIS's annotations, whose images have `coco_url` in place of `file_name`. Add the last part of it as `file_name`"
    return None


def _drop_outlines(value: dict[str, Any]) -> dict[str, Any]:
    value.pop("segmentation", None)  # most of the file, and not used
    return value


def _load(file: str) -> tuple[dict[str, list[dict[str, Any]]], list[Annotated]]:
    """Reads the lists of an annotation file, without outlines.

    Returns:
        (the lists, entries of `images` and `annotations` that lack what they need).

    Raises:
        InputError: the file is not one of COCO: a category, or all entries of a list, lack what they need.
    """
    data = files.read_bytes(file)
    try:
        value = json.loads(data, object_hook=_drop_outlines)
    except (ValueError, RecursionError) as error:
        noun, remedy = foreign_kind(data) or ("", "")
        what = f"{noun}, expected COCO annotations in JSON. {remedy}".rstrip() if noun else f"not readable as JSON ({error})"
        raise InputError(f"{file}: {what}") from error
    if flavour := flavour_of(value):
        raise InputError(f"{file}: {flavour}; expected COCO's instances or captions, with `images` and `annotations`.")
    lists = {name: value.get(name, []) for name in ("images", "annotations", "categories")} if isinstance(value, dict) else {}
    wanted = {"images": ("id", "file_name"), "annotations": ("image_id",), "categories": ("id", "name")}
    if not lists or "images" not in value or "annotations" not in value:
        keys = ", ".join(value) if isinstance(value, dict) else f"a {type(value).__name__}"
        raise InputError(f"{file}: expected COCO annotations with `images` and `annotations`, found {keys[:200]}")
    bad: list[Annotated] = []
    for name, items in lists.items():
        listed = items if isinstance(items, list) else [items]
        good = []
        for i, item in enumerate(listed):
            lacking = [field for field in wanted[name] if not isinstance(item, dict) or field not in item]
            if not lacking and isinstance(item[wanted[name][0]], int | str):
                good.append(item)
                continue
            detail = f"{file}: {name}[{i}] has no {', '.join(lacking) or wanted[name][0] + ' that is a number or text'}"
            if name == "categories" or (i == len(listed) - 1 and not good):
                raise InputError(detail)
            bad.append(Annotated("", f"{name}[{i}]", "-", None, reason="bad_entry", detail=detail))
        lists[name] = good
    return lists, bad


def _orphan(annotation: dict[str, Any], file: str) -> Annotated:
    detail = f"annotation {annotation.get('id')} of {file} names image {annotation['image_id']!r}, which `images` does not list"
    return Annotated("", annotation["image_id"], "-", None, reason="unknown_image", detail=detail)


def coco(annotations: list[str], images: str) -> Coco:
    """Opens a reader of images with their COCO annotations, whose files are read whole.

    Images without boxes are kept; where there are captions, an image without one is skipped.

    Args:
        annotations: the files, of the same images.
        images: folder or URL of the images.

    Raises:
        InputError: a file has another format, or the files contradict each other.
        OSError: a file cannot be read.
    """
    listed: dict[Any, dict[str, Any]] = {}
    repeated: list[Annotated] = []
    boxes: dict[Any, list[tuple[Any, ...]]] = {}
    captions: dict[Any, list[str]] = {}
    categories: dict[int, str] = {}
    orphans: list[Annotated] = []
    captioned = False
    for file in annotations:
        content, bad = _load(file)
        repeated += bad
        here: set[Any] = set()
        for image in content["images"]:
            if image["id"] in here:
                again = f"image id {image['id']!r} comes twice in {file}"
                repeated.append(Annotated("", image["id"], str(image["file_name"]), None, reason="duplicate_id", detail=again))
            elif image["id"] in listed and listed[image["id"]]["file_name"] != image["file_name"]:
                other = listed[image["id"]]["file_name"]
                raise InputError(
                    f"{file}: image {image['id']} is {image['file_name']}, but {other} in another file: not one set of images."
                )
            else:
                listed.setdefault(image["id"], image)
            here.add(image["id"])
        for category in content["categories"]:
            if categories.setdefault(category["id"], str(category["name"])) != str(category["name"]):
                raise InputError(f"{file}: category {category['id']} is {category['name']!r}, elsewhere {categories[category['id']]!r}")
        for note in content["annotations"]:
            if note["image_id"] not in here:
                orphans.append(_orphan(note, file))
            elif "caption" in note:
                captions.setdefault(note["image_id"], []).append(str(note["caption"] or ""))
            else:
                fields = ("id", "bbox", "category_id", "area", "iscrowd")
                boxes.setdefault(note["image_id"], []).append(tuple(note.get(field) for field in fields))
        captioned = captioned or any("caption" in note for note in content["annotations"])
    ordered = tuple(sorted(categories.items(), key=lambda category: (isinstance(category[0], str), category[0])))
    if len({name for _, name in ordered}) != len(ordered):
        raise InputError(f"{', '.join(annotations)}: two categories have the same name")
    inputs = (_input(image, boxes.get(image["id"], []), captions.get(image["id"], [])) for image in listed.values())
    return Coco(images, tuple(itertools.chain(_unique(inputs), repeated, orphans)), ordered, captioned)


def _input(image: dict[str, Any], boxes: list[tuple[Any, ...]], captions: list[str]) -> Annotated:
    width, height = image.get("width"), image.get("height")
    known = (width, height) if isinstance(width, int) and isinstance(height, int) else None
    file = str(image["file_name"])
    return Annotated(path_key(file), image["id"], file, known, tuple(boxes), tuple(captions))


def _unique(inputs: Iterator[Annotated]) -> Iterator[Annotated]:
    """Skips image files listed under a second id, and makes the keys of a.jpg and a.png different."""
    keys: set[str] = set()
    names: set[str] = set()
    for item in inputs:
        if item.file in names:
            yield Annotated("", item.image_id, item.file, None, reason="duplicate_key", detail="its file is listed under another id too")
            continue
        names.add(item.file)
        key = path_key(item.file, shared=item.key in keys)
        keys.add(key)
        yield replace(item, key=key)
