"""The reader of a folder of images with a .txt or a .json of the same name beside each.

Captions come from the .txt or from fields of the .json; the .txt is the field `txt`, so templates may use both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from data_prep import files
from data_prep.build.readers.json_lines import parse_json
from data_prep.build.readers.members import (
    IMAGE_SUFFIXES,
    attempt,
    caption_members,
    class_names,
    json_member,
    label_member,
    path_key,
    read,
    read_image,
)
from data_prep.records import InputError, Record, Skipped
from mmpretrain.data.captions import CaptionTemplate, lookup
from mmpretrain.data.folders import class_folders
from mmpretrain.data.formats import foreign_kind
from mmpretrain.data.schema import BadSample


@dataclass(frozen=True)
class Beside:
    """An image (None: it is missing) and its sidecar files, relative to the folder."""

    key: str
    image: str | None
    txt: str | None
    json: str | None


def _stem(name: str) -> str:
    """Returns the name that an image and its sidecars share: `a` of a.jpg, a.txt and a.jpg.txt."""
    path = PurePosixPath(name)
    stem = path.with_suffix("")
    named_after_file = path.suffix.lower() in (".txt", ".json") and stem.suffix.lower() in IMAGE_SUFFIXES
    return str(stem.with_suffix("") if named_after_file else stem)


@dataclass(frozen=True)
class Sidecar:
    """Reader of images with sidecar files; see `sidecar`."""

    folder: str
    captions: tuple[str, ...] = ()  # fields of the .json, or templates over them; by default the .txt, else the field `caption`
    lines: bool = False  # each line of a .txt is a caption
    label: str | None = None  # a field of the .json
    label_from_folder: bool = False
    names: tuple[str, ...] | None = None

    @property
    def classes(self) -> list[str] | None:
        return None if self.names is None else list(self.names)

    def inputs(self) -> Iterator[Beside]:
        """Yields images with their sidecars by common name; several images of one name share its sidecars."""
        names_by_stem = sorted((_stem(name), name) for name in files.walk(self.folder))
        for _, group in itertools.groupby(names_by_stem, key=lambda pair: pair[0]):
            names = [(PurePosixPath(name).suffix.lower(), name) for _, name in group]
            images = [name for suffix, name in names if suffix in IMAGE_SUFFIXES]
            txt = next((name for suffix, name in names if suffix == ".txt"), None)
            json = next((name for suffix, name in names if suffix == ".json"), None)
            for image in images:
                yield Beside(path_key(image, shared=len(images) > 1), image, txt, json)
            if not images and (txt or json):
                yield Beside("", None, txt, json)

    def tasks(self, max_count: int) -> Iterator[tuple[Beside, ...]]:
        inputs = self.inputs()
        while batch := tuple(itertools.islice(inputs, max_count)):
            yield batch

    def __call__(self, task: tuple[Beside, ...]) -> Iterator[Record | Skipped]:
        for item in task:
            yield attempt(item.image or item.txt or item.json or "", lambda item=item: self.record(item))

    def sources(self, task: tuple[Beside, ...]) -> Iterator[str | None]:
        return (files.join(self.folder, name) for item in task for name in (item.image, item.txt, item.json) if name)

    def fields(self, item: Beside) -> dict[str, Any]:
        """Reads the fields of the .json. Raises BadSample: missing_sidecar, bad_json."""
        if item.json is None:
            return {}
        return parse_json(read(files.join(self.folder, item.json), "missing_sidecar"))

    def record(self, item: Beside) -> Record:
        """Makes the record of an image. Raises BadSample."""
        if item.image is None:
            raise BadSample("missing_image", "no image of this name lies beside it")
        metadata = self.fields(item)
        row = dict(metadata)
        if item.txt is not None:
            text = read(files.join(self.folder, item.txt), "missing_sidecar")
            if (foreign := foreign_kind(text)) is not None and foreign[1] and not text.lstrip().startswith(b"<"):
                raise BadSample("not_utf8", f"{item.txt}: {foreign[0]}, expected a caption. {foreign[1]}")
            try:
                row["txt"] = text.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise BadSample("not_utf8", f"{item.txt}: {error}") from error
            if self.lines:
                row["txt"] = row["txt"].splitlines()
        templates = [CaptionTemplate.parse(caption) for caption in self.captions or (("txt",) if item.txt else ("caption",))]
        columns = [column for template in templates for column in template.columns]
        if not any(lookup(row, column) is not None for column in columns):
            raise BadSample("missing_caption", self._lacking(item, columns, row))
        texts = [text for template in templates for text in template.fill(row, {})]
        several = len(templates) > 1 or any(t.plain and isinstance(lookup(row, t.plain), list) for t in templates)
        members = caption_members(texts, several, metadata, f"of {', '.join(columns)}")
        members |= self._label(item, row)
        if metadata:
            members["json"] = json_member(metadata)
        extension, data = read_image(files.join(self.folder, item.image))
        return Record(item.key, members | {extension: data})

    def _lacking(self, item: Beside, columns: list[str], row: dict[str, Any]) -> str:
        beside = [name for name in (item.txt, item.json) if name]
        if not beside:
            return "neither a .txt nor a .json of its name lies beside it"
        return f"{' and '.join(beside)}: no {', '.join(columns)}, but {', '.join(row) or 'nothing'}"[:300]

    def _label(self, item: Beside, row: dict[str, Any]) -> dict[str, bytes]:
        numbers = None if self.names is None else {name: i for i, name in enumerate(self.names)}
        if self.label_from_folder:
            parts = (item.image or "").split("/")
            return {"cls": label_member(parts[0] if len(parts) > 1 else None, numbers, "lies in no class folder")}
        return {} if self.label is None else {"cls": label_member(lookup(row, self.label), numbers, f"field {self.label}")}


def sidecar(
    folder: str,
    captions: tuple[str, ...] = (),
    lines: bool = False,
    label: str | None = None,
    label_from_folder: bool = False,
    classes: tuple[str, ...] | None = None,
) -> Sidecar:
    """Opens a reader of images with sidecar files.

    Args:
        folder: folder or URL.
        captions: fields of the .json, or templates over them; empty: the .txt, else the field `caption`.
        lines: every line of a .txt is a caption.
        label: a field of class names or indices.
        label_from_folder: the first folder of a path is its class.
        classes: the class names in order; None: gathered from the labels.

    Raises:
        InputError: the folder holds neither images nor sidecars, or has no class folders.
        ValueError: a caption is not a template.
    """
    for caption in captions:
        CaptionTemplate.parse(caption)
    reader = Sidecar(folder, captions, lines, label, label_from_folder, classes)
    first = next(reader.inputs(), None)
    if first is None:
        raise InputError(f"{folder} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))}) and no .txt or .json at any depth.")
    if classes is None and label_from_folder:
        classes = tuple(class_folders(item.image for item in reader.inputs() if item.image))
        if not classes:
            raise InputError(f"{folder} has no class folders (--label-from-folder)")
    elif classes is None and label is not None:
        classes = class_names(_labels(reader, label), f"field {label}")
    return Sidecar(folder, captions, lines, label, label_from_folder, classes)


def _labels(reader: Sidecar, label: str) -> Iterator[Any]:
    for item in reader.inputs():
        try:
            yield lookup(reader.fields(item), label)
        except BadSample:
            continue
