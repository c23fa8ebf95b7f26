"""What is said of an image's pixels, brought to the size that `--resize` gave it: its boxes, its mask, its width and height."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from typing import Any

from PIL import Image

from data_prep.readers.parts import json_member
from mmpretrain.data.schema import METADATA_EXTENSION, BadSample

MASK = "mask.png"  # class indices, as `build voc` writes them
MAX_MASK = 200_000_000  # pixels

Size = tuple[int, int]  # width, height


def scaled(members: Mapping[str, bytes], before: Size, after: Size) -> dict[str, bytes]:
    """Those members of an image's sample that change with its size. Raises BadSample: bad_box, bad_mask."""
    changed = {}
    if METADATA_EXTENSION in members and (metadata := _metadata(members[METADATA_EXTENSION], before, after)) is not None:
        changed[METADATA_EXTENSION] = json_member(metadata)
    if MASK in members:
        changed[MASK] = _mask(members[MASK], before, after)
    return changed


def _metadata(data: bytes, before: Size, after: Size) -> dict[str, Any] | None:
    """None where it says nothing of pixels: `boxes` in the form that docs/data.md states, and the image's own `width` and `height`, do."""
    try:
        metadata = json.loads(data)
    except (ValueError, RecursionError):
        return None  # `validate` tells
    if not isinstance(metadata, dict):
        return None
    found: dict[str, Any] = {}
    if (metadata.get("width"), metadata.get("height")) == before:
        found |= {"width": after[0], "height": after[1]}
    if isinstance(boxes := metadata.get("boxes"), list):
        found["boxes"] = [_box(box, after[0] / before[0], after[1] / before[1]) for box in boxes]
    return metadata | found if found else None


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
    """By nearest neighbour: class indices have no mean."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as mask:
            if mask.size != before or mask.width * mask.height > MAX_MASK:
                raise BadSample("bad_mask", f"{MASK} has {mask.width} x {mask.height} pixels, the image {before[0]} x {before[1]}")
            resized, out = mask.resize(after, Image.Resampling.NEAREST), io.BytesIO()
    except BadSample:
        raise
    except (Exception, MemoryError) as error:  # decoders raise all sorts over hostile bytes
        raise BadSample("bad_mask", f"{MASK}: {' '.join(str(error).split())[:200]}") from error
    resized.save(out, "PNG")
    return out.getvalue()
