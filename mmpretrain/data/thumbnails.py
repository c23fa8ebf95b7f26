"""Small pictures for reports and pages."""

from __future__ import annotations

import base64
import io
from typing import Any, Literal

import numpy as np
from PIL import Image


def thumbnail(image: np.ndarray, side: int, form: Literal["JPEG", "PNG"], **options: Any) -> bytes:
    """Encodes an image whose longer side is at most `side` pixels; a smaller one keeps its size.

    Args:
        image: uint8 [H, W, 3].
        side: in pixels.
        form: the image format.
        options: passed to Pillow's encoder.
    """
    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def thumbnail_url(image: np.ndarray, side: int, form: Literal["JPEG", "PNG"], **options: Any) -> str:
    """The same as a data: URL, for a page that needs no other file."""
    data = base64.b64encode(thumbnail(image, side, form, **options)).decode()
    return f"data:image/{form.lower()};base64,{data}"
