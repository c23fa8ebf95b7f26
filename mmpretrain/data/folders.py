"""Image folders: which files lie in one, which are images, and which folders are classes. The same for data_prep and evaluators."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from mmpretrain.data.formats import sniff
from mmpretrain.data.schema import IMAGE_EXTENSIONS

# Names of images, of formats that are not read as well: such a file is one that was meant, and that is missed.
IMAGE_NAMES = (frozenset(IMAGE_EXTENSIONS) - {"img"}) | {
    "apng", "arw", "bigtiff", "cr2", "dib", "dng", "heic", "heif", "hif", "ico", "j2k", "jfif", "jif", "jp2", "jpe", "jxl",
    "nef", "pam", "pcx", "pnm", "psd", "svg", "tga",
}  # fmt: skip
HEAD = 32  # bytes that show an image's format


def walk(folder: str | Path) -> Iterator[str]:
    """Yields the names of all files below a local folder, relative to it with /, sorted by their parts; without hidden ones.

    Memory holds the names of one folder at a time. Symbolic links are followed, except to a folder that holds them; a link that leads
    nowhere is a name, for the reader to report.
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


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image, in a format that is read or in another; whether it is one, its content says."""
    return PurePosixPath(name).suffix.lower().removeprefix(".") in IMAGE_NAMES


def holds_image(path: str) -> bool:
    """Whether a local file begins as an image that is read, whatever its name."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never answer
            return False
        with open(path, "rb") as file:
            return sniff(file.read(HEAD)) is not None
    except OSError:
        return False


def class_folders(names: Iterable[str]) -> list[str]:
    """The classes of files below a folder: the first folders of their names, in the order of their indices (by code point)."""
    return sorted({name.split("/", 1)[0] for name in names if "/" in name})
