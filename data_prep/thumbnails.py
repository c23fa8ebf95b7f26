"""Thumbnails embedded in HTML pages."""

from __future__ import annotations

import base64
import io
from typing import Any, Literal

import numpy as np
from PIL import Image


def thumbnail(image: np.ndarray, side: int, form: Literal["JPEG", "PNG"], **options: Any) -> str:
    """Encodes an image as the data: URL of a thumbnail.

    Args:
        image: uint8 [H, W, 3].
        side: maximum of the longer side, in pixels.
        form: the image format.
        options: passed to Pillow's encoder.
    """
    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
