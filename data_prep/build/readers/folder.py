"""The reader of a folder of images at any depth, with or without class folders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from data_prep import files
from data_prep.build.readers.base import chunks, safe
from data_prep.build.readers.members import attempt, read_image
from data_prep.records import InputError, Record, Skipped
from mmpretrain.data.folders import HEAD, class_folders, holds_image, named_as_image
from mmpretrain.data.formats import printable, sniff
from mmpretrain.data.schema import BadSample


def _is_image(base: str, relative: str) -> bool:
    """Returns whether a file of the folder `base` is to be read as an image: by its name, or else by its first bytes."""
    if named_as_image(relative):
        return True
    path = files.local_path(base + relative)
    return sniff(files.head(base + relative, HEAD)) is not None if path is None else holds_image(path)


@dataclass(frozen=True)
class Folder:
    """Reader of a folder: one record per image, in the order of their paths; with `classes`, the first folder is the class.

    Files that are not images are left out and counted.
    """

    folder: str
    classes: tuple[str, ...] | None = None

    @staticmethod
    def open(folder: str, label_from_folder: bool) -> Folder:
        """Opens a folder. Raises InputError where it is missing or empty, or has no class folders to take labels from."""
        if not files.listing(folder):
            raise InputError(f"{folder}: no such folder, or nothing in it. Give the folder that holds the images.")
        if not label_from_folder:
            return Folder(folder)
        base = files.join(folder, "").rstrip("/") + "/"
        classes = class_folders(name for name in files.walk(folder) if "/" in name and _is_image(base, name))
        if not classes:
            raise InputError(f"{folder} has no class folders (--label-from-folder)")
        return Folder(folder, tuple(classes))

    def tasks(self, max_count: int) -> Iterator[tuple[str, ...]]:
        yield from chunks(files.walk(self.folder), max_count)

    def __call__(self, task: tuple[str, ...]) -> Iterator[Record | Skipped]:
        number = {name: i for i, name in enumerate(self.classes or ())}
        base = files.join(self.folder, "").rstrip("/") + "/"
        for relative in task:
            if not _is_image(base, relative):
                detail = "neither its name nor its first bytes are those of an image"
                yield Skipped(printable(relative), "not_an_image", detail, harmless=True)
                continue
            yield attempt(relative, lambda relative=relative: self._record(base, relative, number))

    def sources(self, task: tuple[str, ...]) -> Iterator[str | None]:
        base = files.join(self.folder, "").rstrip("/") + "/"
        return (base + relative for relative in task)

    def _record(self, base: str, relative: str, number: dict[str, int]) -> Record:
        """Makes the record of an image. Raises BadSample."""
        extension, data = read_image(base + relative)
        members = {extension: data}
        if number:
            if "/" not in relative:
                raise BadSample("missing_label", "it lies in no class folder")
            name = relative.split("/", 1)[0]
            if name not in number:
                raise BadSample("missing_label", f"{name} held no image when the classes were listed, so the folder is not a class")
            members["cls"] = str(number[name]).encode()
        # Names may collide once dots and spaces are replaced: the path's digest keeps keys apart.
        digest = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).hexdigest()[:10]
        stem = safe(os.path.splitext(relative)[0].replace("/", "_")) or "image"
        return Record(f"{stem}_{digest}", members)
