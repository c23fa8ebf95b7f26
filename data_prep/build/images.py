"""Changes to images that `build` makes on request: resizing, re-encoding, and a holdout that keeps duplicates together."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from PIL import Image

from data_prep.build.readers.members import json_member
from data_prep.records import Record, Skipped
from mmpretrain.data import raster
from mmpretrain.data.formats import decoder_message, sniff
from mmpretrain.data.holdout import is_held_out
from mmpretrain.data.schema import METADATA_EXTENSION, BadSample, image_extension

ENCODERS = {"jpeg": "jpg", "webp": "webp", "png": "png"}  # what --reencode takes -> extension
_KEPT = {"jpeg": "jpg", "webp": "webp", "avif": "webp"}  # a format -> the extension of what it is written as without --reencode
MAX_PIXELS = 200_000_000  # width times height; checked from the header, before decoding
BACKGROUND = (255, 255, 255)  # below transparency, where the new format has none; training's default


class Encoded(NamedTuple):
    """An image file; the sizes are those that are shown, orientation applied."""

    extension: str
    data: bytes
    before: Size
    after: Size


def encode(data: bytes, resize: int | None, form: str | None, quality: int) -> Encoded | None:
    """Resizes and re-encodes an image file; returns None where there is nothing to do.

    The new file is upright, since it has no EXIF.

    Args:
        data: the file.
        resize: limit of the shorter side in pixels; None: keep the size.
        form: a key of ENCODERS; None: keep the format, but write PNG for other lossless ones, and WebP for AVIF, which is slow to write.
        quality: of JPEG and WebP, 0 to 100.

    Raises:
        BadSample, ValueError: the format is unknown, the image cannot be decoded, or it has more than MAX_PIXELS.
    """
    kind = sniff(data)
    if kind is None:
        raise ValueError(f"it begins with {data[:12]!r}")
    width, height, _, _, orientation = raster.read_header(data, kind)
    _check(width, height)
    shrink = resize is not None and min(width, height) > resize
    if not shrink and form is None:
        return None
    extension = ENCODERS[form] if form else _KEPT.get(kind, "png")
    scale = resize / min(width, height) if shrink and resize else 1.0
    size = max(1, round(width * scale)), max(1, round(height * scale))
    stored = raster.shown(size, orientation)  # before the turn
    enough = 2 * stored[0], 2 * stored[1]  # JPEG decodes large ones at a half, a quarter or an eighth
    decoded = raster.decode(data, kind, _check, draft=enough if shrink else None)
    image = decoded.image if extension != "jpg" else raster.flatten(decoded.image, BACKGROUND)
    if shrink:
        image = image.resize(stored, Image.Resampling.LANCZOS, reducing_gap=3.0)
    image = raster.upright(image, orientation)
    out = io.BytesIO()
    space = b"GRAY" if image.mode == "L" else b"RGB "
    profile = decoded.profile if decoded.profile and decoded.profile[16:20] == space else None  # CMYK's does not describe RGB
    if extension == "jpg":
        image.save(out, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2, icc_profile=profile)
    elif extension == "webp":
        image.save(out, "WEBP", quality=quality, method=4, icc_profile=profile)
    else:
        image.save(out, "PNG", icc_profile=profile)
    return Encoded(extension, out.getvalue(), (width, height), image.size)


def _check(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, the limit is {MAX_PIXELS}")


@dataclass(frozen=True)
class Images:
    """A reader whose images, with their boxes and masks, are resized or re-encoded; samples that cannot be decoded are skipped."""

    produce: Callable[[Any], Iterator[Record | Skipped]]
    resize: int | None
    form: str | None
    quality: int
    image_member: str | None = field(default=None, repr=False)  # which member is the image; the repr of the reader has it

    def __call__(self, task: Any) -> Iterator[Record | Skipped]:
        for item in self.produce(task):
            extension = image_extension(item.members, self.image_member) if isinstance(item, Record) else None
            yield item if isinstance(item, Skipped) or extension is None else self._changed(item, extension)

    def sources(self, task: Any) -> Iterator[str | None]:
        return self.produce.sources(task) if hasattr(self.produce, "sources") else iter(())

    def _changed(self, record: Record, extension: str) -> Record | Skipped:
        members = {name: data for name, data in record.members.items() if name != extension}
        try:
            encoded = encode(record.members[extension], self.resize, self.form, self.quality)
            if encoded is None:
                return record
            name = extension.rpartition(".")[0]
            name = f"{name}.{encoded.extension}" if name else encoded.extension
            if name in members:
                raise BadSample("bad_member", f"{extension}, encoded as {encoded.extension}, would replace the member {name}")
            changed = scaled(members, encoded.before, encoded.after) if encoded.before != encoded.after else {}
        except BadSample as error:
            return Skipped(record.where or record.key, error.reason, error.detail)
        except (Exception, MemoryError) as error:  # decoders raise errors of any kind for hostile bytes
            return Skipped(record.where or record.key, "undecodable_image", f"{extension}: {decoder_message(error)}")
        return replace(record, members=members | changed | {name: encoded.data})


@dataclass(frozen=True)
class Holdout:
    """Assigns a `fraction` of the records to "holdout" and the others to "train".

    The hash is that of the key, as in the `split` of a source, or that of the pixels as training decodes them, so that
    duplicates stay on one side even if their files differ. An image that cannot be decoded is hashed by its bytes, a
    record
    without an image by its key.
    """

    fraction: float
    by: str  # key | image
    parts: tuple[str, ...] = ("train", "holdout")
    image_member: str | None = field(default=None, repr=False)  # which member is the image; the repr of the reader has it

    def __call__(self, record: Record) -> str:
        extension = image_extension(record.members, self.image_member) if self.by == "image" else None
        content = record.key.encode() if extension is None else _pixels(record.members[extension])
        return self.parts[is_held_out(content, self.fraction)]


def _pixels(data: bytes) -> bytes:
    from mmpretrain.data.decode import ImageLimits, decode_image
    from mmpretrain.data.schema import BadSample

    try:
        pixels = decode_image(data, ImageLimits(max_pixels=MAX_PIXELS, min_side=1, max_aspect=float("inf")))
    except BadSample:
        return data
    return str(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes()


MASK = "mask.png"  # class indices, as `build voc` writes them
MAX_MASK = 200_000_000  # pixels

Size = tuple[int, int]  # width, height


def scaled(members: Mapping[str, bytes], before: Size, after: Size) -> dict[str, bytes]:
    """Returns the members that change when the image of their sample is resized. Raises BadSample: bad_box, bad_mask."""
    changed = {}
    if METADATA_EXTENSION in members and (metadata := _metadata(members[METADATA_EXTENSION], before, after)) is not None:
        changed[METADATA_EXTENSION] = json_member(metadata)
    if MASK in members:
        changed[MASK] = _mask(members[MASK], before, after)
    return changed


def _metadata(data: bytes, before: Size, after: Size) -> dict[str, Any] | None:
    """Scales `boxes` in the form of docs/data.md, and the image's own `width` and `height`; returns None without any."""
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError):
        return None  # `validate` reports it
    if not isinstance(metadata, dict):
        return None
    changed: dict[str, Any] = {}
    if (metadata.get("width"), metadata.get("height")) == before:
        changed |= {"width": after[0], "height": after[1]}
    if isinstance(boxes := metadata.get("boxes"), list):
        changed["boxes"] = [_box(box, after[0] / before[0], after[1] / before[1]) for box in boxes]
    return metadata | changed if changed else None


def _box(box: Any, x: float, y: float) -> dict[str, Any]:
    numbers = box.get("bbox") if isinstance(box, dict) else None
    if not isinstance(numbers, list) or len(numbers) != 4 or not all(_finite(number) for number in numbers):
        raise BadSample(
            "bad_box",
            f"{str(box)[:100]} among the json's `boxes` cannot be resized with the image: expected an object with "
            "`bbox`: [x, y, width, height] in pixels. Build without --resize, or keep the boxes under another name",
        )
    resized = {"bbox": [round(number * factor, 3) for number, factor in zip(numbers, (x, y, x, y))]}
    return box | resized | ({"area": round(box["area"] * x * y, 3)} if _finite(box.get("area")) else {})


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mask(data: bytes, before: Size, after: Size) -> bytes:
    """Resizes a mask by nearest neighbour: class indices have no mean."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as mask:
            if mask.size != before or mask.width * mask.height > MAX_MASK:
                raise BadSample("bad_mask", f"{MASK} has {mask.width} x {mask.height} pixels, the image {before[0]} x {before[1]}")
            resized, out = mask.resize(after, Image.Resampling.NEAREST), io.BytesIO()
    except BadSample:
        raise
    except (Exception, MemoryError) as error:  # decoders raise errors of any kind for hostile bytes
        raise BadSample("bad_mask", f"{MASK}: {decoder_message(error)}") from error
    resized.save(out, "PNG")
    return out.getvalue()
