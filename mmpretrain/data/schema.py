"""What a shard holds: how member names become samples, which members are images, and the errors of this package."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from mmpretrain.errors import MMPretrainError

IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "avif", "img")
METADATA_EXTENSION = "json"
LABEL_EXTENSION = "cls"

# A key as the writer accepts it: no dot (it would start the extension), nothing a file system or a shell reads specially.
SAFE_KEY = re.compile(r"[\w-]+(?:/[\w-]+)*")


class ShardError(MMPretrainError, ValueError):
    """A shard that cannot be used at all, or that contradicts its index. The message names shard, offset and remedy."""


class BadSample(ValueError):  # noqa: N818 (it is counted and replaced, seldom an error of the run)
    """One sample that cannot be used. `reason` is a short stable word; the message says what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class LoaderError(MMPretrainError, RuntimeError):
    """The loader can make no more batches: a process of its ended, or nothing came in time. The message says what was being read."""


class BadSampleBudgetError(MMPretrainError, RuntimeError):
    """More samples are bad than the source allows. The message gives counts per reason and examples.

    `records` are the bad samples that nobody has listed before, as in skipped.jsonl.
    """

    def __init__(self, message: str, records: Iterable[dict[str, Any]] = ()) -> None:
        super().__init__(message)
        self.records = list(records)

    def __reduce__(self) -> tuple[type[BadSampleBudgetError], tuple[str, list[dict[str, Any]]]]:
        return BadSampleBudgetError, (str(self), self.records)


def split_name(name: str) -> tuple[str, str] | None:
    """Member name -> (key, extension): the extension begins after the FIRST dot of the basename, as in webdataset.

    None for what belongs to no sample: directories, dot files, names without an extension or an empty one, `__len__`-like metadata.
    """
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    if dot <= slash or dot == len(name) - 1:
        return None
    return name[:dot], name[dot + 1 :].lower()


def image_extension(extensions: Container[str], wanted: str | None = None) -> str | None:
    """Which of a sample's members is its image: `wanted`, or else the first of IMAGE_EXTENSIONS that it has; None where it has none.

    Only the name is judged here, the format is sniffed from the content.
    """
    if wanted is not None:
        return wanted if wanted in extensions else None
    return next((extension for extension in IMAGE_EXTENSIONS if extension in extensions), None)


def several_images(counts: Mapping[str, int], samples: int) -> str | None:
    """A warning where samples have more than one image; None where each has one at most.

    Args:
        counts: extension -> samples that have it.
        samples: all of them.
    """
    images = [extension for extension in IMAGE_EXTENSIONS if counts.get(extension)]
    if sum(counts[extension] for extension in images) <= samples:
        return None
    return f"samples have several images ({', '.join(images)}), of which {images[0]} is read"
