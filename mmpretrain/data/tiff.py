"""TIFF of more than 8 bits a sample, of signed integers and of floats -> 8 bits.

Pillow and libtiff decompress (`_bytes`); what the bytes mean is read here, since Pillow takes 12 bits for 16, keeps the high byte of
16-bit colours, forgets to invert MinIsWhite, and mixes up byte orders and planes.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmpretrain.data import tiff_tags
from mmpretrain.data.levels import eight_bit, eight_bit_of_range
from mmpretrain.data.schema import BadSample

UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # tag SampleFormat
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK, YCBCR = 0, 1, 2, 5, 6  # tag PhotometricInterpretation
COLOURS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, CMYK: 4}  # samples of a pixel, without extra ones
# Compressions of plain bytes, which know nothing of samples; and those of them to which a predictor applies
BYTEWISE = {1: "none", 5: "LZW", 8: "deflate", 32773: "PackBits", 32946: "deflate", 34925: "LZMA", 50000: "Zstandard"}
PREDICTED = (5, 8, 32946, 34925, 50000)
NO_PREDICTOR, HORIZONTAL, FLOATING_POINT = 1, 2, 3
FLOATS, INTEGERS = (16, 32, 64), (8, 16, 32)  # bits; unsigned integers may also have 9 to 15
PREMULTIPLIED, UNRELATED = 1, 0  # tag ExtraSamples: colours are multiplied by alpha; not alpha
PIXEL_TAGS = frozenset(
    [256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 338, 339, 347, 529, 530, 531, 532]
)  # what a decoder of pixels needs
_SAMPLES = 64  # more than any image has; a tag may claim 2**32


@dataclass(frozen=True)
class Layout:
    """How the pixels of a TIFF are stored."""

    width: int
    height: int
    bits: tuple[int, ...]  # of each sample of a pixel
    sample_format: int
    photometric: int
    extra: tuple[int, ...]
    planar: bool
    compression: int
    predictor: int
    fill_order: int
    tile: tuple[int, int] | None  # width, height
    rows: int  # of a strip

    def __str__(self) -> str:
        kind = {UNSIGNED: "unsigned", SIGNED: "signed", FLOAT: "float"}.get(self.sample_format, f"sample format {self.sample_format}")
        bits = ", ".join(map(str, sorted(set(self.bits))))
        codec = BYTEWISE.get(self.compression, self.compression)
        return f"{len(self.bits)} samples of {bits} bits ({kind}), photometric {self.photometric}, compression {codec}"

    @property
    def deep(self) -> bool:
        """Whether values have to be scaled to 8 bits."""
        return max(self.bits) > 8 or self.sample_format in (SIGNED, FLOAT)


class Tags:
    """The first directory of a TIFF."""

    def __init__(self, data: bytes) -> None:
        head = tiff_tags.header(data)
        if head is None:
            raise BadSample("undecodable_image", "tiff: its header cannot be read")
        self.head, self._data = head, data
        self.tags: dict[int, tiff_tags.Tag] = {}
        for tag in tiff_tags.tags(data):
            self.tags.setdefault(tag.number, tag)

    def integers(self, number: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        tag = self.tags.get(number)
        return (tiff_tags.integers(self._data, tag, self.head.order) if tag else ()) or default

    def integer(self, number: int, default: int = 0) -> int:
        return self.integers(number, (default,))[0]

    def content(self, number: int) -> bytes:
        """The bytes of a tag's values; b"" without it."""
        tag = self.tags.get(number)
        return self._data[tag.start : tag.end] if tag else b""

    def layout(self) -> Layout:
        """Raises BadSample where no decoder could know what the pixels are."""
        width, height = self.integer(tiff_tags.WIDTH), self.integer(tiff_tags.HEIGHT)
        if width < 1 or height < 1:
            raise BadSample("undecodable_image", f"tiff: its first directory states a size of {width} x {height}")
        bits = self.integers(tiff_tags.BITS, (1,))
        samples = self.integer(tiff_tags.SAMPLES, len(bits))
        if not 1 <= samples <= _SAMPLES or min(bits) < 1:
            raise BadSample("undecodable_image", f"tiff: {samples} samples of {min(bits)} bits")
        bits = (bits * samples if len(bits) == 1 else bits)[:samples]
        formats = set(self.integers(tiff_tags.SAMPLE_FORMAT, (UNSIGNED,))[:samples])
        tile = max(1, self.integer(tiff_tags.TILE_WIDTH)), max(1, self.integer(tiff_tags.TILE_HEIGHT))
        return Layout(
            width,
            height,
            bits,
            formats.pop() if len(formats) == 1 else 0,
            self.integer(tiff_tags.PHOTOMETRIC, WHITE_IS_ZERO),
            self.integers(tiff_tags.EXTRA_SAMPLES),
            self.integer(tiff_tags.PLANAR, 1) == 2 and samples > 1,
            self.integer(tiff_tags.COMPRESSION, 1),
            self.integer(tiff_tags.PREDICTOR, NO_PREDICTOR),
            self.integer(tiff_tags.FILL_ORDER, 1),
            tile if tiff_tags.TILE_OFFSETS in self.tags else None,
            max(1, min(self.integer(tiff_tags.ROWS_PER_STRIP, height), height)),
        )

    def upright(self) -> bytes:
        """The file without an orientation, in EXIF as in XMP: Pillow turns TIFFs by itself, and has done so by different rules.

        BigTIFF, which Pillow reads in one byte order only, becomes TIFF. Raises BadSample where that cannot hold it.
        """
        order, big, _ = self.head
        if big:
            return _described(self._data, order, {tag.number: self._field(tag) for tag in self.tags.values() if tag.number in PIXEL_TAGS})
        patched = None
        for tag in tiff_tags.tags(self._data):
            if tag.number in (tiff_tags.ORIENTATION, tiff_tags.XMP):
                patched = patched or bytearray(self._data)
                short = tag.number == tiff_tags.ORIENTATION  # 1; else one byte of no meaning
                kind, value = (3, struct.pack(order + "H", 1)) if short else (7, b"\0")
                patched[tag.entry : tag.entry + 12] = struct.pack(order + "HHI", tag.number, kind, 1) + value.ljust(4, b"\0")
        return self._data if patched is None else bytes(patched)

    def _field(self, tag: tiff_tags.Tag) -> Field:
        """The tag as TIFF holds it, without integers of 64 bits."""
        if tag.kind in (16, 17):
            return _field(self.head.order, tiff_tags.integers(self._data, tag, self.head.order))
        return tag.kind, tag.count, self._data[tag.start : tag.end]


Field = tuple[int, int, bytes]  # kind, count, values


def _field(order: str, values: tuple[int, ...]) -> Field:
    """Raises BadSample for values of more than 32 bits."""
    if values and not 0 <= min(values) <= max(values) < 1 << 32:
        raise BadSample("undecodable_image", f"tiff: a value of {max(values)} in its first directory, where a file of 4 GB ends")
    return 4, len(values), struct.pack(f"{order}{len(values)}I", *values)


def decode_deep(data: bytes, tags: Tags, layout: Layout) -> Image.Image:
    """A deep image as L, RGB or RGBA, not turned. Raises BadSample for a layout that is not supported."""
    colours, bits = COLOURS.get(layout.photometric, 0), layout.bits[0]
    unsigned = layout.sample_format == UNSIGNED
    supported = (
        bits in FLOATS if layout.sample_format == FLOAT else bits in INTEGERS or (unsigned and 8 < bits < 16)
    ) and layout.sample_format in (UNSIGNED, SIGNED, FLOAT)
    extra = layout.extra
    if layout.photometric == RGB and len(layout.bits) == 4 and not extra:
        extra = (2,)  # as Pillow reads 8 bits: writers that forget the tag mean alpha
    alpha = bool(extra) and extra[0] != UNRELATED
    if (
        not supported
        or not colours
        or len(set(layout.bits)) > 1
        or len(layout.bits) != colours + len(extra)
        or layout.compression not in BYTEWISE
        or layout.predictor not in (NO_PREDICTOR, HORIZONTAL, FLOATING_POINT)
        or (layout.compression in PREDICTED and not _predictable(layout))
        or layout.fill_order not in (1, 2)
        or (alpha and layout.photometric == CMYK)
        or (alpha and bits > 16 and layout.sample_format != FLOAT)
        or (alpha and layout.sample_format == SIGNED)
    ):
        raise BadSample("undecodable_image", f"tiff: {layout}, which is not decoded; convert it to 8 bits")
    values = _samples(data, tags, layout)[:, :, : colours + alpha]  # [H, W, C]
    colour, opacity = values[:, :, :colours], values[:, :, colours:]
    if alpha and extra[0] == PREMULTIPLIED:
        colour = _divided(colour, opacity, layout)
    if unsigned and bits <= 16:
        pixels = eight_bit(colour, (1 << bits) - 1)
    else:
        pixels = eight_bit_of_range(colour)
    if layout.photometric == WHITE_IS_ZERO:
        pixels = 255 - pixels
    if layout.photometric == CMYK:
        return Image.fromarray(np.ascontiguousarray(pixels), "CMYK").convert("RGB")
    if not alpha:
        return Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if colours == 1 else pixels))
    if unsigned:
        opacity = eight_bit(opacity, (1 << bits) - 1)
    else:
        opacity = np.rint(np.clip(np.nan_to_num(opacity.astype(np.float32)), 0, 1) * 255).astype(np.uint8)
    return Image.fromarray(np.concatenate([np.broadcast_to(pixels, (*pixels.shape[:2], 3)), opacity], axis=2))


def _predictable(layout: Layout) -> bool:
    bits = layout.bits[0]
    if layout.predictor == HORIZONTAL:
        return bits in (8, 16, 32, 64)
    return layout.predictor == NO_PREDICTOR or (layout.sample_format == FLOAT and bits in FLOATS)


def _divided(colour: np.ndarray, opacity: np.ndarray, layout: Layout) -> np.ndarray:
    """Colours that were multiplied by alpha, as they were before; those of no opacity stay."""
    most = 1.0 if layout.sample_format == FLOAT else float((1 << layout.bits[0]) - 1)
    scale = most / np.where(opacity > 0, opacity, most).astype(np.float64)
    divided = np.clip(colour * scale, 0, most)
    return divided if layout.sample_format == FLOAT else np.rint(divided).astype(colour.dtype)


def _samples(data: bytes, tags: Tags, layout: Layout) -> np.ndarray:
    """The stored values, [H, W, samples]."""
    samples = len(layout.bits)
    if not layout.planar:
        return _plane(data, tags, layout, samples, 0)
    return np.concatenate([_plane(data, tags, layout, 1, plane) for plane in range(samples)], axis=2)


def _plane(data: bytes, tags: Tags, layout: Layout, samples: int, plane: int) -> np.ndarray:
    """The values of all samples, or of one that is stored apart, [H, W, samples]."""
    bits, order = layout.bits[0], tags.head.order
    width = layout.width  # of what is stored: whole tiles
    if layout.tile:
        width = -(-layout.width // layout.tile[0]) * layout.tile[0]
    rows = _bytes(data, tags, layout, samples, plane, width)  # [H, bytes]
    block = layout.tile[0] if layout.tile else width  # columns that a predictor runs over
    predictor = layout.predictor if layout.compression in PREDICTED else NO_PREDICTOR
    if bits not in (8, 16, 32, 64):
        values = _unpacked(rows, width * samples, bits)
    elif predictor == FLOATING_POINT:
        values = _floats(rows, block * samples, samples, bits // 8)
    else:
        values = rows.view(f"{order}{'f' if layout.sample_format == FLOAT else 'u'}{bits // 8}")
        if predictor == HORIZONTAL:
            whole = rows.view(f"{order}u{bits // 8}").astype(f"u{bits // 8}").reshape(len(rows), width // block, block, samples)
            values = np.cumsum(whole, axis=2, dtype=whole.dtype)
            values = values.view(f"f{bits // 8}") if layout.sample_format == FLOAT else values
    if layout.sample_format == SIGNED:
        values = values.astype(f"u{bits // 8}", copy=False).view(f"i{bits // 8}")
    return values.reshape(len(rows), width, samples)[:, : layout.width]


def _unpacked(rows: np.ndarray, count: int, bits: int) -> np.ndarray:
    """Values of 9 to 15 bits, the highest bit first, [H, count]."""
    values = np.empty((len(rows), count), np.uint16)
    if bits == 12:
        pairs = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 3))).reshape(len(rows), -1, 3).astype(np.uint16)
        even, odd = pairs[..., 0] << 4 | pairs[..., 1] >> 4, (pairs[..., 1] & 15) << 8 | pairs[..., 2]
        values[:, 0::2], values[:, 1::2] = even[:, : (count + 1) // 2], odd[:, : count // 2]
        return values
    first = np.arange(count) * bits  # each value lies within three bytes
    padded = np.pad(rows, ((0, 0), (0, 2)))
    byte, shift = first // 8, (24 - bits - first % 8).astype(np.uint32)
    for row, packed in zip(values, padded):
        three = packed[byte].astype(np.uint32) << 16 | packed[byte + 1].astype(np.uint32) << 8 | packed[byte + 2]
        row[:] = three >> shift & (1 << bits) - 1
    return values


def _floats(rows: np.ndarray, count: int, samples: int, size: int) -> np.ndarray:
    """Undoes the floating point predictor (TIFF Technical Note 3): bytes of a row by significance, each the difference to the last."""
    blocks = rows.reshape(len(rows), -1, count * size // samples, samples)
    summed = np.cumsum(blocks, axis=2, dtype=np.uint8).reshape(len(rows), -1, size, count)
    return np.ascontiguousarray(summed.swapaxes(2, 3)).view(f">f{size}").reshape(len(rows), -1)


def _bytes(data: bytes, tags: Tags, layout: Layout, samples: int, plane: int, width: int) -> np.ndarray:
    """The decompressed bytes, uint8 [H, bytes of a row], of all planes or of one.

    Another directory behind the file describes the same strips or tiles as pixels of plain bytes: three or four together where they come
    out even, since Pillow's limits count pixels.
    """
    bits = layout.bits[0]
    row, block = -(-width * samples * bits // 8), -(-(layout.tile[0] if layout.tile else width) * samples * bits // 8)
    group = next(n for n in (4, 3, 1) if row % n == 0 and block % n == 0 and not (n == 4 and layout.fill_order == 2))
    if layout.tile:
        offsets, sizes = tiff_tags.TILE_OFFSETS, tiff_tags.TILE_BYTES
        pieces = (width // layout.tile[0]) * -(-layout.height // layout.tile[1])
    else:
        offsets, sizes = tiff_tags.STRIP_OFFSETS, tiff_tags.STRIP_BYTES
        pieces = -(-layout.height // layout.rows)
    piece = slice(plane * pieces, (plane + 1) * pieces)
    where, lengths = tags.integers(offsets)[piece], tags.integers(sizes)[piece]
    if len(where) != pieces:
        raise BadSample("undecodable_image", f"tiff: truncated, {len(where)} of {pieces} strips or tiles")
    fields = {
        tiff_tags.WIDTH: (row // group,),
        tiff_tags.HEIGHT: (layout.height,),
        tiff_tags.BITS: (8,) * group,
        tiff_tags.COMPRESSION: (layout.compression,),
        tiff_tags.PHOTOMETRIC: ({1: BLACK_IS_ZERO, 3: RGB, 4: CMYK}[group],),
        tiff_tags.FILL_ORDER: (layout.fill_order,),
        offsets: where,
        tiff_tags.SAMPLES: (group,),
        tiff_tags.PLANAR: (1,),
    }
    if len(lengths) == pieces:
        fields[sizes] = lengths
    if layout.tile:
        fields |= {tiff_tags.TILE_WIDTH: (block // group,), tiff_tags.TILE_HEIGHT: (layout.tile[1],)}
    else:
        fields[tiff_tags.ROWS_PER_STRIP] = (layout.rows,)
    described = _described(data, tags.head.order, {number: _field(tags.head.order, values) for number, values in fields.items()})
    with Image.open(io.BytesIO(described), formats=["TIFF"]) as opened:
        opened.load()
        return np.ascontiguousarray(np.asarray(opened)).reshape(layout.height, row)


def _described(data: bytes, order: str, fields: dict[int, Field]) -> bytes:
    """The file as TIFF with another first directory, behind its end."""
    start = len(data) + len(data) % 2
    if start >= 1 << 31:
        raise BadSample("undecodable_image", f"tiff: {len(data)} bytes, expected at most 2 GB")
    values = start + 2 + 12 * len(fields) + 4  # what does not fit into the entries
    directory, more = struct.pack(order + "H", len(fields)), b""
    for number, (kind, count, content) in sorted(fields.items()):
        inline = content.ljust(4, b"\0")
        if len(content) > 4:
            inline = struct.pack(order + "I", values + len(more))
            more += content + bytes(len(content) % 2)
        directory += struct.pack(order + "HHI", number, kind, count) + inline
    opening = data[:2] + struct.pack(order + "HI", 42, start)
    return opening + data[8:] + bytes(start - len(data)) + directory + bytes(4) + more


def refuse_uninterpreted(tags: Tags, layout: Layout) -> None:
    """Raises BadSample for images of 8 bits that Pillow decodes to wrong pixels without an error."""
    uncompressed = layout.compression == 1 and len(layout.bits) == 3
    if layout.photometric == YCBCR and uncompressed and tags.integers(tiff_tags.YCBCR_SUBSAMPLING, (2, 2)) != (1, 1):
        raise BadSample("undecodable_image", f"tiff: {layout} with subsampled colours, which is not decoded; convert it to RGB")
