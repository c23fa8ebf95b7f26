"""Image decoding (stage 4 of the data pipeline), to uint8 RGB, with formats recognised by content. Unusable images are BadSamples."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from mmpretrain.data import raster
from mmpretrain.data.formats import decoder_message, foreign_kind, sniff
from mmpretrain.data.orientation import jpeg_header, orientation
from mmpretrain.data.raster import PILLOW_FORMATS
from mmpretrain.data.schema import BadSample

# Orientation -> transposed?, and the axes flipped after that
TURNS = {2: (False, 2), 3: (False, 1, 2), 4: (False, 1), 5: (True,), 6: (True, 2), 7: (True, 1, 2), 8: (True, 1)}


Background = tuple[int, ...] | str  # RGB 0..255, or "drop"


@dataclass(frozen=True)
class ImageLimits:
    """Limits of images. Sizes are checked in the header, before any pixel is decoded."""

    max_pixels: int = 64_000_000  # width times height
    min_side: int = 8  # pixels
    max_aspect: float = 20.0  # longer side over shorter side
    background: tuple[int, ...] | str = (255, 255, 255)  # below transparency, RGB 0..255; "drop": the colour that alpha hides

    def check(self, width: int, height: int) -> None:
        """Raise BadSample for an image that is too large, too small or too elongated."""
        if width * height > self.max_pixels:
            raise BadSample("too_many_pixels", f"{width} x {height}, the limit is {self.max_pixels} pixels (max_pixels)")
        if min(width, height) < self.min_side:
            raise BadSample("too_small", f"{width} x {height}, the shorter side must be {self.min_side} pixels (min_side)")
        if max(width, height) > self.max_aspect * min(width, height):
            raise BadSample("too_elongated", f"{width} x {height}, sides may differ {self.max_aspect:g} times (max_aspect)")


def upright(image: Tensor, turn: int) -> Tensor:
    """Turn an image, uint8 [3, H, W], upright from its orientation `turn`, 1 to 8."""
    transposed, *axes = TURNS.get(turn, (False,))
    return (image.transpose(1, 2) if transposed else image).flip(axes) if transposed or axes else image


def _jpeg(data: bytes, limits: ImageLimits) -> Tensor | None:
    """Decode a plain 8-bit JPEG with libjpeg-turbo; return None for others and for damaged ones, which Pillow decodes or refuses."""
    header = jpeg_header(data)
    if header is None:
        return None
    limits.check(header.width, header.height)
    raster.check_scans(header, data)
    if header.components not in (1, 3) or header.bits != 8:
        return None
    try:
        image = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
    except ValueError:
        return None
    return upright(image, orientation(header.exif, header.xmp)) if header.exif or header.xmp else image


def decode_image(data: bytes, limits: ImageLimits = ImageLimits(), background: Callable[[], Background] | None = None) -> Tensor:
    """Decode an image file to uint8 [3, H, W] RGB, upright by its orientation (EXIF, else XMP), over `limits.background`.

    Args:
        data: the file.
        limits: of its size.
        background: called for an image that does have transparent pixels; returns the background instead of that of `limits`.

    Raises:
        BadSample: unknown_format, undecodable_image (truncated too), too_many_pixels, too_many_scans, too_small,
            too_elongated.
    """
    kind = sniff(data)
    if kind is None:
        noun, _ = foreign_kind(data) or ("", "")
        what = f"{noun}, which begins" if noun else "begins"
        raise BadSample("unknown_format", f"{what} with {bytes(data[:12])!r}; decoded are {', '.join(PILLOW_FORMATS)}")
    try:
        if kind == "png" and len(data) >= 24:
            limits.check(*struct.unpack(">II", data[16:24]))
        if kind == "jpeg" and (image := _jpeg(data, limits)) is not None:
            return image
        decoded = raster.decode(data, kind, limits.check)
        flat = decoded.image
        if raster.is_transparent(flat):
            flat = raster.flatten(flat, limits.background if background is None else background())
        return upright(
            torch.from_numpy(np.array(flat if flat.mode == "RGB" else flat.convert("RGB"))).permute(2, 0, 1), decoded.orientation
        )
    except BadSample:
        raise
    except (Exception, MemoryError) as error:  # `simplejpeg` and large images
        raise BadSample("undecodable_image", f"{kind}: {decoder_message(error)}") from error
