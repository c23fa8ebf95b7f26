"""Image file -> 8 bits a sample, with what is needed to show it: one rule for training, evaluators and `data_prep`. Imports no torch."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError, features

from mmpretrain.data import pnm, tiff, tiff_tags
from mmpretrain.data.codec_messages import collected
from mmpretrain.data.formats import decoder_message
from mmpretrain.data.levels import eight_bit
from mmpretrain.data.orientation import QUARTER_TURNS, JpegHeader, exif_orientation, jpeg_header, stored_orientation
from mmpretrain.data.schema import BadSample

PILLOW_FORMATS = {
    "jpeg": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tiff": "TIFF",
    "ppm": "PPM",
    "avif": "AVIF",
}
TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_SCANS = 100  # of a progressive JPEG; a writer makes about ten, and each costs a pass over the image
_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
_LOW_BYTES = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}  # Pillow's names for the two halves of big-endian samples


class Header(NamedTuple):
    """What a file states before its pixels."""

    width: int  # as shown: turned by the orientation
    height: int
    mode: str  # Pillow's, or a description
    animated: bool
    orientation: int = 1


class Raster(NamedTuple):
    """A decoded image."""

    image: Image.Image  # L, RGB or RGBA, as stored
    orientation: int  # 1 to 8, not applied yet
    size: tuple[int, int]  # width, height of the file, as stored; `image` is smaller after a draft
    profile: bytes | None  # ICC


def shown(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(width, height) after the turn."""
    return (size[1], size[0]) if orientation in QUARTER_TURNS else size


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned by its orientation."""
    return image.transpose(TRANSPOSES[orientation]) if orientation in TRANSPOSES else image


def is_transparent(image: Image.Image) -> bool:
    """Tell whether any pixel lets the background through."""
    return image.mode == "RGBA" and bool(np.asarray(image.getchannel("A")).min() < 255)


def flatten(image: Image.Image, background: tuple[int, ...] | str) -> Image.Image:
    """Composite RGBA over an RGB background, each value rounded to the nearest; L and RGB stay as they are.

    "drop" in place of a background keeps the colours that alpha hides, as `convert("RGB")` does.
    """
    if image.mode != "RGBA":
        return image
    if isinstance(background, str):
        return image.convert("RGB")
    under = Image.new("RGB", image.size, (background[0], background[1], background[2]))
    under.paste(image, mask=image.getchannel("A"))
    return under


def check_scans(header: JpegHeader, data: bytes) -> None:
    """Raises BadSample for a progressive JPEG that would take minutes to decode: too_many_scans."""
    if header.progressive and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise BadSample("too_many_scans", f"a progressive JPEG of {scans} scans, the limit is {MAX_SCANS}")


@cache
def _has_avif() -> bool:
    return "avif" in features.modules and bool(features.check("avif"))


def _source(data: bytes, kind: str) -> bytes:
    """The bytes for Pillow, which is kept from turning the image and from failing over EXIF. Raises BadSample: unknown_format."""
    if kind == "tiff":
        return tiff.Tags(data).upright()
    if kind == "avif":
        if not _has_avif():
            raise BadSample("unknown_format", "AVIF, which the installed Pillow cannot decode; install pillow>=11.3 with AVIF support")
        return _without_exif(data)
    return data


def _without_exif(data: bytes) -> bytes:
    """An AVIF file whose EXIF item is of a kind that no reader knows.

    The container's own rotation and mirror count (ISO/IEC 23008-12, 6.5.10 and 6.5.12), and Pillow fails over a damaged block.
    """
    offset = 0
    while offset + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, offset)
        if name == b"meta":
            end = offset + length if length else len(data)
            return data[:offset] + data[offset:end].replace(b"Exif", b"none") + data[end:]
        if length < 8:
            break
        offset += length
    return data


def _opened(data: bytes, kind: str) -> ImageFile.ImageFile:
    """Raises BadSample where Pillow does not know the header."""
    try:
        return Image.open(io.BytesIO(data), formats=[PILLOW_FORMATS[kind]])
    except UnidentifiedImageError as error:  # its message would name an object in memory
        layout = f", or its pixels are of a kind that is not decoded ({tiff.Tags(data).layout()})" if kind == "tiff" else ""
        raise BadSample("undecodable_image", f"{kind}: its header cannot be read{layout}") from error


def _orientation(data: bytes, kind: str, opened: Image.Image) -> int:
    if kind == "avif":  # as Pillow reports the container's rotation and mirror
        return exif_orientation(opened.info.get("exif", b"")) or 1
    return stored_orientation(data, kind)


def read_header(data: bytes, kind: str) -> Header:
    """Size and mode without decoding pixels. Raises BadSample: undecodable_image, too_many_pixels, unknown_format."""
    try:
        with collected(tiff=kind == "tiff"):
            if kind == "tiff" and (layout := tiff.Tags(data).layout()).deep:
                turn = stored_orientation(data, kind)
                mode = f"{len(layout.bits)} x {layout.bits[0]} bits"
                return Header(*shown((layout.width, layout.height), turn), mode, False, turn)
            with _opened(_source(data, kind), kind) as opened:
                turn = _orientation(data, kind, opened)
                return Header(*shown(opened.size, turn), opened.mode, bool(getattr(opened, "is_animated", False)), turn)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("too_many_pixels", str(error)) from error
    except (Exception, MemoryError) as error:  # decoders raise various errors for hostile bytes
        raise BadSample("undecodable_image", f"{kind}: {decoder_message(error)}") from error


def decode(data: bytes, kind: str, check: Callable[[int, int], None], draft: tuple[int, int] | None = None) -> Raster:
    """Decode an image file, the first frame of an animation.

    Args:
        data: the file.
        kind: its format, as `formats.sniff` names it.
        check: called with width and height before pixels are decoded; what it raises passes.
        draft: (width, height) that suffice: JPEG decodes at a half, a quarter or an eighth if that is no smaller. None for all pixels.

    Raises:
        BadSample: undecodable_image, too_many_pixels (Pillow's limit), too_many_scans, unknown_format (AVIF without a decoder).
    """
    messages: list[str] = []
    try:
        with collected(tiff=kind == "tiff") as messages:
            return _decoded(data, kind, check, draft)
    except BadSample:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit comes before ours
        raise BadSample("too_many_pixels", str(error)) from error
    except (Exception, MemoryError) as error:  # decoders raise various errors for hostile bytes
        details = [f"{kind}: {decoder_message(error)}", *(" ".join(message.split())[:200] for message in messages[:2])]
        raise BadSample("undecodable_image", "; ".join(details)) from error


def _decoded(data: bytes, kind: str, check: Callable[[int, int], None], draft: tuple[int, int] | None) -> Raster:
    if kind == "tiff":
        tags = tiff.Tags(data)
        layout = tags.layout()
        check(layout.width, layout.height)
        if layout.deep:
            image = tiff.decode_deep(data, tags, layout)
            return Raster(image, stored_orientation(data, kind), image.size, tags.content(tiff_tags.ICC_PROFILE) or None)
        tiff.refuse_uninterpreted(tags, layout)
    if kind == "jpeg" and (jpeg := jpeg_header(data)) is not None:
        check(jpeg.width, jpeg.height)
        check_scans(jpeg, data)
    if kind == "ppm":
        head = pnm.header(data)
        check(head.width, head.height)
        if (image := pnm.decode(data, head)) is not None:
            return Raster(image, 1, image.size, None)
    with _opened(_source(data, kind), kind) as opened:
        size = opened.size
        check(*size)
        if draft is not None:
            opened.draft(None, draft)
        orientation, profile = _orientation(data, kind, opened), opened.info.get("icc_profile")
        if kind == "tiff":
            profile = tiff.Tags(data).content(tiff_tags.ICC_PROFILE) or None
        if kind == "png" and data[24] == 16:
            return Raster(_png_of_16_bits(data, opened), stored_orientation(data, kind), size, profile)
        opened.load()
        if kind == "png" and data[24] in (2, 4) and isinstance(opened.info.get("transparency"), int) and opened.mode == "L":
            opened.info["transparency"] *= 255 // ((1 << data[24]) - 1)  # stated before grey was scaled to 8 bits
        if kind == "tiff" and opened.mode == "P":
            _repair_palette(data, opened)
        return Raster(_eight_bit_mode(opened), orientation, size, profile)


def _eight_bit_mode(image: Image.Image) -> Image.Image:
    """An image of 8 bits a sample or fewer as L, RGB or RGBA."""
    if image.mode in _ALPHA or "transparency" in image.info:
        return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise BadSample("undecodable_image", f"{image.format}: samples of more than 8 bits (Pillow's mode {image.mode}) are not decoded")
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _png_of_16_bits(data: bytes, opened: ImageFile.ImageFile) -> Image.Image:
    """Pillow keeps the high bytes of colours alone: decoded twice, for either half, they are exact, and a transparent colour is too."""
    transparent = opened.info.get("transparency")
    (tile,) = opened.tile
    if tile.args == "I;16B":
        opened.load()
        values = np.asarray(opened, np.uint16)[:, :, None]
    elif tile.args == "LA;16B":  # four bytes a pixel, which RGBA holds as they come
        opened._mode = "RGBA"
        opened.tile = [tile._replace(args="RGBA")]
        opened.load()
        values = np.asarray(opened).view(">u2")
    else:
        opened.load()
        with _opened(data, "png") as again:
            again.tile = [tile._replace(args=_LOW_BYTES[str(tile.args)])]
            again.load()
            values = np.asarray(opened).astype(np.uint16) << 8 | np.asarray(again)
    pixels = eight_bit(values, 65535)
    channels = pixels.shape[2]
    if channels % 2 and transparent is not None:
        clear = (values == np.array(transparent)).all(axis=2, keepdims=True)
        pixels = np.concatenate([pixels, np.where(clear, np.uint8(0), np.uint8(255))], axis=2)
    if pixels.shape[2] == 2:
        pixels = pixels[:, :, [0, 0, 0, 1]]
    return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))


def _repair_palette(data: bytes, image: Image.Image) -> None:
    """Some writers state palettes of TIFF in 8 bits, where 16 are due: Pillow makes them black."""
    entries = tiff.Tags(data).integers(tiff_tags.COLOUR_MAP)
    if entries and len(entries) % 3 == 0 and len(entries) <= 768 and max(entries) < 256:
        image.putpalette(np.array(entries, np.uint8).reshape(3, -1).T.tobytes())


def header_size(head: bytes, kind: str) -> tuple[int, int] | None:
    """(width, height) as stored from the first bytes of a JPEG or PNG; None where they do not hold them."""
    if kind == "jpeg" and (header := jpeg_header(head)) is not None:
        return header.width, header.height
    if kind == "png" and len(head) >= 24:
        return struct.unpack_from(">II", head, 16)
    return None
