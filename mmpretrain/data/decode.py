"""4. Bytes -> uint8 RGB image. Formats are sniffed from the content; whatever cannot be used is a BadSample."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmpretrain.data.formats import decoder_message, foreign_kind, sniff
from mmpretrain.data.schema import BadSample

EXIF = b"Exif\0\0"
INTEGERS = {3: "H", 4: "I", 8: "h", 9: "i"}  # EXIF's kinds of numbers
MAX_SCANS = 100  # of a progressive JPEG; a writer makes about ten, and each costs a pass over the image
# EXIF orientation -> transposed?, and the axes flipped after that
TURNS = {2: (False, 2), 3: (False, 1, 2), 4: (False, 1), 5: (True,), 6: (True, 2), 7: (True, 1, 2), 8: (True, 1)}
PILLOW_FORMATS = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tiff": "TIFF", "ppm": "PPM"}


@dataclass(frozen=True)
class ImageLimits:
    """What an image may be. Sizes are judged from the header, before any pixel is decoded."""

    max_pixels: int = 64_000_000  # width times height
    min_side: int = 8  # pixels
    max_aspect: float = 20.0  # longer side over shorter side
    background: tuple[int, ...] = (255, 255, 255)  # what shows through transparency, RGB 0..255

    def check(self, width: int, height: int) -> None:
        """Raises BadSample for an image too large, too small or too elongated."""
        if width * height > self.max_pixels:
            raise BadSample("too_many_pixels", f"{width} x {height}, the limit is {self.max_pixels} pixels (max_pixels)")
        if min(width, height) < self.min_side:
            raise BadSample("too_small", f"{width} x {height}, the shorter side must be {self.min_side} pixels (min_side)")
        if max(width, height) > self.max_aspect * min(width, height):
            raise BadSample("too_elongated", f"{width} x {height}, sides may differ {self.max_aspect:g} times (max_aspect)")


class JpegHeader(NamedTuple):
    """What a JPEG says of itself before its pixels."""

    width: int
    height: int
    components: int
    bits: int
    progressive: bool
    exif: bytes


def jpeg_header(data: bytes) -> JpegHeader | None:
    """None where there is no frame header."""
    at, exif = 2, b""
    while at + 9 < len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 5)
            return JpegHeader(width, height, data[at + 9], data[at + 4], marker == 0xC2, exif)
        elif marker == 0xDA:
            return None
        else:
            length = int.from_bytes(data[at + 2 : at + 4], "big")
            if marker == 0xE1 and not exif and length > 16 and data[at + 4 : at + 10] == EXIF:
                exif = data[at + 4 : at + 2 + length]
            at += 2 + length
    return None


def orientation(exif: bytes) -> int:
    """What the first directory of an EXIF block says, 1 to 8 as a rule; 1, upright, where it says nothing that can be read.

    Read is a block before the frame header; an orientation in XMP alone is not.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[6:10])
    if order is None:
        return 1
    try:
        directory = 6 + struct.unpack_from(order + "I", exif, 10)[0]
        for entry in range(struct.unpack_from(order + "H", exif, directory)[0]):
            tag, kind, count, value = struct.unpack_from(order + "HHI4s", exif, directory + 2 + 12 * entry)
            if tag == 0x0112 and kind in INTEGERS and count == 1:
                return struct.unpack_from(order + INTEGERS[kind], value)[0]
    except struct.error:
        pass
    return 1


def upright(image: Tensor, turn: int) -> Tensor:
    """uint8 [3,H,W] turned as its EXIF orientation says."""
    transposed, *axes = TURNS.get(turn, (False,))
    return (image.transpose(1, 2) if transposed else image).flip(axes) if transposed or axes else image


def composite(rgba: Tensor, background: tuple[int, ...]) -> Tensor:
    """uint8 [4,H,W] -> uint8 [3,H,W]: colour over the background, by alpha."""
    alpha = rgba[3:].to(torch.int32)
    under = torch.tensor(background, dtype=torch.int32)[:, None, None]
    return ((rgba[:3].to(torch.int32) * alpha + under * (255 - alpha) + 127) // 255).to(torch.uint8)


def _jpeg(data: bytes, limits: ImageLimits) -> Tensor | None:
    """libjpeg-turbo for plain 8-bit JPEG; None leaves the rest to Pillow, which also judges what is not as it should be."""
    header = jpeg_header(data)
    if header is None:
        return None
    limits.check(header.width, header.height)
    if header.progressive and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise BadSample("too_many_scans", f"a progressive JPEG of {scans} scans, the limit is {MAX_SCANS}")
    if header.components not in (1, 3) or header.bits != 8:
        return None
    try:
        image = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
    except ValueError:
        return None
    return upright(image, orientation(header.exif)) if header.exif else image


def _eight_bit(values: np.ndarray) -> np.ndarray:
    """Integers or floats of another range -> uint8, by the range the values show.

    Floats in 0..1 are fractions; anything within 0..65535 is 16 bit; else the image's own minimum and maximum become 0 and 255.
    """
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 1:
        scaled = values * 255
    elif low >= 0 and high <= 255:
        scaled = values
    elif low >= 0 and high <= 65535:
        scaled = values / 257
    else:
        scaled = (values - low) / max(high - low, 1e-12) * 255
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _pillow(data: bytes, kind: str, limits: ImageLimits) -> Tensor:
    with Image.open(io.BytesIO(data), formats=[PILLOW_FORMATS[kind]]) as opened:
        limits.check(*opened.size)
        opened.load()  # the first frame of an animation
        try:
            image = ImageOps.exif_transpose(opened)
        except Exception:  # an EXIF block of whatever bytes
            image = opened
    if image.mode.startswith("I;16"):
        image = Image.fromarray(np.rint(np.asarray(image, np.float64) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_eight_bit(np.asarray(image)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = torch.from_numpy(np.array(image.convert("RGBA"))).permute(2, 0, 1)
        return composite(rgba, limits.background)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def decode_image(data: bytes, limits: ImageLimits = ImageLimits()) -> Tensor:
    """Image file -> uint8 [3,H,W] RGB, upright (EXIF orientation applied), transparency over `limits.background`.

    Raises BadSample: unknown_format, undecodable_image (truncated too), too_many_pixels, too_many_scans, too_small, too_elongated.
    """
    kind = sniff(data)
    if kind is None:
        noun, _ = foreign_kind(data) or ("", "")
        what = f"{noun}, which begins" if noun else "begins"
        raise BadSample("unknown_format", f"{what} with {bytes(data[:12])!r}; decoded are {', '.join(PILLOW_FORMATS)}")
    try:
        if kind == "png" and len(data) >= 24:
            limits.check(*struct.unpack(">II", data[16:24]))
        image = _jpeg(data, limits) if kind == "jpeg" else None
        return _pillow(data, kind, limits) if image is None else image
    except BadSample:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit comes before ours
        raise BadSample("too_many_pixels", str(error)) from error
    except (Exception, MemoryError) as error:  # decoders raise all sorts over hostile bytes
        raise BadSample("undecodable_image", f"{kind}: {decoder_message(error)}") from error
