"""Files of a folder, and which of them are images: one walk for `data_prep build` and for evaluators. Imports no torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import PurePosixPath

from mmpretrain.data.formats import sniff
from mmpretrain.data.schema import IMAGE_EXTENSIONS

# Names of images, of formats that are not read as well: such a file is one that was meant, and that is missed.
IMAGE_NAMES = (frozenset(IMAGE_EXTENSIONS) - {"img"}) | {
    "apng", "arw", "bigtiff", "cr2", "dib", "dng", "heic", "heif", "hif", "ico", "j2k", "jfif", "jif", "jp2", "jpe", "jxl",
    "nef", "pam", "pcx", "pnm", "psd", "svg", "tga",
}  # fmt: skip
HEAD = 32  # bytes that show an image's format


def walk(folder: str) -> Iterator[str]:
    """The names of all files below a local folder, relative to it with /, sorted by their parts; without hidden ones.

    Memory holds the names of one folder at a time. Symbolic links are followed, except to a folder that holds them; a link that leads
    nowhere is a name, for the reader to report.
    """
    yield from _walk(folder, "", {os.path.realpath(folder)})


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
    """Whether a file's name is that of an image, in a format that is read or in another."""
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
