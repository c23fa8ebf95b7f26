"""Image folders: which files lie in one, which are images, and which folders are classes. The same for data_prep and evaluators."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from mmpretrain.data.schema import IMAGE_EXTENSIONS


def is_image(name: str) -> bool:
    """Whether a file is taken for an image by its name; whether it is one, its content says."""
    return PurePosixPath(name).suffix.lower().lstrip(".") in IMAGE_EXTENSIONS


def walk(folder: str | Path) -> Iterator[str]:
    """Yields the names of all files below a folder, relative to it with /, sorted by their parts; without hidden ones.

    Memory holds the names of one folder at a time. Symbolic links are followed, except to a parent folder.
    """
    yield from _walk(str(folder), "", {os.path.realpath(folder)})


def _walk(folder: str, before: str, above: set[str]) -> Iterator[str]:
    with os.scandir(folder) as entries:
        names, folders = [], set()
        for entry in entries:
            if not entry.name.startswith("."):
                names.append(entry.name)
                if entry.is_dir():
                    folders.add(entry.name)
    for name in sorted(names):
        if name not in folders:
            yield before + name
        elif (real := os.path.realpath(os.path.join(folder, name))) not in above:
            yield from _walk(os.path.join(folder, name), f"{before}{name}/", above | {real})


def class_folders(names: Iterable[str]) -> list[str]:
    """The classes of files below a folder: the first folders of their names, in the order of their indices (by code point)."""
    return sorted({name.split("/", 1)[0] for name in names if "/" in name})
