"""Netpbm images (PBM, PGM, PPM) of any maximum value, binary and in plain text -> 8 bits.

Pillow decodes those other than binary ones of 8 bits in Python loops, 2.5 seconds for a megapixel, and scales grey of 16 bits twice.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
from PIL import Image

from mmpretrain.data.levels import eight_bit
from mmpretrain.data.schema import BadSample

_COMMENT = re.compile(rb"#[^\r\n]*(?:[\r\n]|\Z)")
_TOKEN = re.compile(rb"(?:[ \t\n\v\f\r]|#[^\r\n]*(?:[\r\n]|\Z))*([0-9]{1,10})(?![0-9])")
_SPACE = b" \t\n\v\f\r"


class Header(NamedTuple):
    form: int  # 1 to 6: the digit of the magic number
    width: int
    height: int
    highest: int  # the value of white; 1 in PBM
    start: int  # offset of the pixels


def header(data: bytes) -> Header:
    """Raises BadSample."""
    form, offset, numbers = data[1] - ord("0"), 2, []
    for name in ("width", "height") if form in (1, 4) else ("width", "height", "maximum value"):
        token = _TOKEN.match(data, offset)
        if token is None:
            raise BadSample("undecodable_image", f"ppm: its header has no {name}")
        offset = token.end()
        numbers.append(int(token[1]))
    width, height, highest = (*numbers, 1)[:3]
    if not 0 < highest < 65536:
        raise BadSample("undecodable_image", f"ppm: a maximum value of {highest}, expected 1 to 65535")
    if form > 3 and data[offset : offset + 1] not in [bytes([space]) for space in _SPACE]:
        raise BadSample("undecodable_image", "ppm: its header does not end with white space")
    return Header(form, width, height, highest, offset + (form > 3))


def decode(data: bytes, head: Header) -> Image.Image | None:
    """The image as 1, L or RGB; None for binary ones of 8 bits, which Pillow decodes. Raises BadSample."""
    if head.form == 4 or (head.form > 4 and head.highest == 255):
        return None
    count = head.width * head.height * (3 if head.form in (3, 6) else 1)
    if head.form > 4:
        size = 1 if head.highest < 256 else 2
        if len(data) < head.start + count * size:
            raise BadSample("undecodable_image", f"ppm: truncated, {len(data) - head.start} of {count * size} bytes of pixels")
        values = np.frombuffer(data, f">u{size}", count, head.start)
    else:
        values = _plain(data[head.start :], count, head)
    if head.form == 1:
        pixels = (1 - values) * np.uint8(255)  # 1 is black
    else:
        pixels = eight_bit(values, head.highest)
    return Image.fromarray(pixels.reshape((head.height, head.width, 3) if head.form in (3, 6) else (head.height, head.width)))


def _plain(text: bytes, count: int, head: Header) -> np.ndarray:
    """The first `count` numbers of a text; of PBM the first digits, which no white space need part."""
    if b"#" in text:
        text = _COMMENT.sub(b"", text)
    odd = text.translate(None, _SPACE + (b"01" if head.form == 1 else b"0123456789"))
    if odd:
        raise BadSample("undecodable_image", f"ppm: {odd[:1]!r} among its pixels")
    if head.form == 1:
        values = np.frombuffer(text.translate(None, _SPACE), np.uint8) - ord("0")
    elif re.search(rb"[0-9]{11}", text):
        raise BadSample("undecodable_image", "ppm: a number of more than 10 digits among its pixels")
    else:
        values = np.fromstring(text.decode("ascii"), np.int64, sep=" ") if text.strip() else np.zeros(0, np.int64)
    if len(values) < count:
        raise BadSample("undecodable_image", f"ppm: truncated, {len(values)} of {count} values of pixels")
    values = values[:count]
    if count and values.max() > head.highest:
        raise BadSample("undecodable_image", f"ppm: a value of {values.max()}, its maximum is {head.highest}")
    return values
