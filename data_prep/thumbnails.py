"""Small pictures within a page."""

from __future__ import annotations

import base64
import io
from typing import Any, Literal

import numpy as np
from PIL import Image


def thumbnail(image: np.ndarray, side: int, form: Literal["JPEG", "PNG"], **options: Any) -> str:
    """uint8 [H, W, 3] -> a data: address of the picture, its longer side at most `side` pixels; `options` are those of Pillow's writer."""
    picture = Image.fromarray(image)
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
