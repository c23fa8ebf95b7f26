"""The format of shards: member names and keys, image members, and the errors of this package."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

from mmpretrain.errors import MMPretrainError

IMAGE_EXTENSIONS = ("jpg", "png", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "avif", "img")
METADATA_EXTENSION = "json"
LABEL_EXTENSION = "cls"

# The keys that the writer accepts: no dot (it would begin the extension), no character that is special in file systems or shells.
SAFE_KEY = re.compile(r"[\w-]+(?:/[\w-]+)*")


class ShardError(MMPretrainError, ValueError):
    """A shard cannot be used, or contradicts its index. The message names shard, offset and remedy."""


class BadSample(ValueError):  # noqa: N818 (it is counted and replaced, rarely an error of the run)
    """A sample cannot be used. `reason` is a short stable word, `detail` the cause."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class LoaderError(MMPretrainError, RuntimeError):
    """The loader cannot make batches: one of its processes ended, or timed out. The message names the sample that was being read."""


class BadSampleBudgetError(MMPretrainError, RuntimeError):
    """More samples are bad than the source allows. The message has counts per reason and examples.

    `records` are the bad samples that no batch has listed yet, as in skipped.jsonl.
    """

    def __init__(self, message: str, records: Iterable[dict[str, Any]] = ()) -> None:
        super().__init__(message)
        self.records = list(records)

    def __reduce__(self) -> tuple[type[BadSampleBudgetError], tuple[str, list[dict[str, Any]]]]:
        return BadSampleBudgetError, (str(self), self.records)


def split_name(name: str) -> tuple[str, str] | None:
    """Split a member name into (key, extension), at the FIRST dot of the basename, as in webdataset.

    Returns None for members of no sample: directories, dot files, and names without an extension such as `__len__`.
    """
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    if dot <= slash or dot == len(name) - 1:
        return None
    return name[:dot], name[dot + 1 :].lower()


def image_extension(extensions: Container[str], wanted: str | None = None) -> str | None:
    """Return the extension of a sample's image, by name alone; its format is recognised by content later.

    Args:
        extensions: of the sample's members.
        wanted: the member that is the image; None: the first of IMAGE_EXTENSIONS that the sample has.

    Returns:
        The extension, or None where the sample lacks it.
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
