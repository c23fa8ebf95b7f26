"""What `dedup` remembers of a sample: 57 bytes, from one decoding of its image.

The exact digest is of the decoded pixels, so an image and its lossless re-encoding are equal. The perceptual hash is the 64-bit DCT hash of
the luminance; nine mean colours tell apart what differs in colour alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import Image

from data_prep.filter_keep import damage_lines
from data_prep.samples import Shard, captions, image_member, pixels
from mmpretrain.data.decode import ImageLimits
from mmpretrain.data.schema import IMAGE_EXTENSIONS, BadSample
from mmpretrain.data.shard_names import is_remote

SIGNATURE = np.dtype(
    [
        ("digest", "<u8", 2),  # of width, height and RGB values
        ("hash", "<u8"),
        ("colour", "u1", 27),  # mean RGB of 3 x 3 cells
        ("area", "<u4"),  # pixels
        ("caption", "<u2"),  # characters of the longest caption
    ]
)
GRID = 3
THUMBNAIL = 32  # side of the small image that candidates are compared by
FLAT = 2.0  # standard deviation of a thumbnail below which the hash would be of noise
LIMITS = ImageLimits(min_side=1, max_aspect=float("inf"))  # training's limits are no business of a comparison
SPAN = 500  # samples of a task


@dataclass(frozen=True)
class Span:
    """Some samples of a shard; `stop` None: all of them."""

    name: str
    start: int = 0
    stop: int | None = None


def spans(names: list[str]) -> Iterator[Span]:
    """A remote shard is one task, so that it is fetched once; a local one is divided, so that few shards keep all cores busy."""
    for name in names:
        if is_remote(name):
            yield Span(name)
            continue
        with Shard(name) as shard:
            for start in range(0, max(len(shard), 1), SPAN):
                yield Span(name, start, min(start + SPAN, len(shard)))


def decoded(shard: Shard, sample: int) -> np.ndarray:
    """uint8 [H,W,3]. Raises BadSample."""
    extension = image_member(shard.index.members(sample))
    if extension is None:
        raise BadSample("missing_image", f"it has {', '.join(sorted(shard.index.members(sample)))}; an image is one of {IMAGE_EXTENSIONS}")
    return pixels(shard.read(sample, {extension}).members[extension], LIMITS).permute(1, 2, 0).numpy()


def small(image: np.ndarray) -> np.ndarray:
    """uint8 [H,W,3] -> [32,32,3], filtered so that a resized copy gives nearly the same."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS))


def signature(image: np.ndarray, caption: int = 0) -> np.ndarray:
    """uint8 [H,W,3] -> a SIGNATURE scalar."""
    found = np.zeros((), SIGNATURE)
    height, width = image.shape[:2]
    image = np.ascontiguousarray(image)
    digest = hashlib.blake2b(f"{width} {height} ".encode(), digest_size=16)
    digest.update(image)
    found["digest"] = np.frombuffer(digest.digest(), "<u8")
    thumbnail = small(image)  # the hash shrinks to this side itself; from the thumbnail it costs one pass over the image less
    picture = Image.fromarray(thumbnail)
    if thumbnail.std((0, 1)).max() >= FLAT:
        found["hash"] = np.packbits(imagehash.phash(picture).hash.ravel()).view("<u8")[0]
    found["colour"] = np.asarray(picture.resize((GRID, GRID), Image.Resampling.BOX)).ravel()
    found["area"], found["caption"] = min(width * height, 2**32 - 1), min(caption, 2**16 - 1)
    return found


@dataclass(frozen=True)
class Sign:
    """The stage: a span of samples -> SIGNATURE [n]; (sample, reason, detail) of those without a usable image; the shard's damage."""

    caption: str = "txt"

    def __call__(self, span: Span) -> tuple[np.ndarray, list[tuple[int, str, str]], list[str]]:
        with Shard(span.name) as shard:
            stop = len(shard) if span.stop is None else span.stop
            found, bad = np.zeros(stop - span.start, SIGNATURE), []
            for sample in range(span.start, stop):
                try:
                    found[sample - span.start] = signature(decoded(shard, sample), self._length(shard, sample))
                except BadSample as error:
                    bad.append((sample, error.reason, error.detail))
            damage = [] if span.start else damage_lines(shard)
            return found, bad, damage

    def _length(self, shard: Shard, sample: int) -> int:
        try:
            return max(map(len, captions(shard.read(sample, {self.caption.partition(":")[0]}), self.caption)))
        except BadSample:  # a sample without a caption may be kept for its image
            return 0


@dataclass(frozen=True)
class Wanted:
    """Some samples of a shard, to be looked at again."""

    name: str
    samples: tuple[int, ...]


def thumbnails(wanted: Wanted) -> np.ndarray:
    """The stage: uint8 [n,32,32,3]."""
    with Shard(wanted.name) as shard:
        return np.stack([small(decoded(shard, sample)) for sample in wanted.samples])
