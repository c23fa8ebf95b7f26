"""Image folders: the files in one, which of them are images, and which folders are classes. Shared by data_prep and evaluators.

Imports no torch.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from mmpretrain.data.formats import sniff
from mmpretrain.data.schema import IMAGE_EXTENSIONS

# Names of images, also of formats that cannot be decoded: such a file was meant as an image, and is reported as a bad one.
IMAGE_NAMES = (frozenset(IMAGE_EXTENSIONS) - {"img"}) | {
    "apng", "arw", "bigtiff", "cr2", "dib", "dng", "heic", "heif", "hif", "ico", "j2k", "jfif", "jif", "jp2", "jpe", "jxl",
    "nef", "pam", "pcx", "pnm", "psd", "svg", "tga",
}  # fmt: skip
HEAD = 32  # bytes that show an image's format


def walk(folder: str | Path) -> Iterator[str]:
    """Yield the names of all files below a local folder, relative to it with /, sorted by their parts; without hidden ones.

    Memory holds the names of one folder at a time. Symbolic links are followed, except to a parent folder; a dangling
    link is a name, for the reader to report.
    """
    yield from _walk(str(folder), "", {os.path.realpath(folder)})


def _walk(folder: str, before: str, above: set[str]) -> Iterator[str]:
    names, folders = [], set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            names.append(entry.name)
            try:
                if entry.is_dir():
                    folders.add(entry.name)
            except OSError:  # a link to itself
                pass
    for name in sorted(names):
        if name not in folders:
            yield before + name
        elif (real := os.path.realpath(os.path.join(folder, name))) not in above:
            yield from _walk(os.path.join(folder, name), f"{before}{name}/", above | {real})


def named_as_image(name: str) -> bool:
    """Return whether a file's name is that of an image, in a format that is decoded or in another."""
    return PurePosixPath(name).suffix.lower().removeprefix(".") in IMAGE_NAMES


def holds_image(path: str) -> bool:
    """Return whether a local file begins as an image that is decoded, whatever its name."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe could block for ever
            return False
        with open(path, "rb") as file:
            return sniff(file.read(HEAD)) is not None
    except OSError:
        return False


def is_image(path: str) -> bool:
    """Return whether a local file is read as an image: by its name, or else by its first bytes."""
    return named_as_image(path) or holds_image(path)


def class_folders(names: Iterable[str]) -> list[str]:
    """Return the classes of files below a folder: the first folders of their names, in the order of their indices (by code point)."""
    return sorted({name.split("/", 1)[0] for name in names if "/" in name})
