"""Small pictures within a page."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from mmpretrain.data.thumbnails import thumbnail_url


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_thumbnail_keeps_its_shape_and_is_never_enlarged(form: str) -> None:
    for height, width, shown in ((100, 400, (64, 16)), (20, 10, (10, 20))):
        head, _, data = thumbnail_url(np.full((height, width, 3), 90, np.uint8), 64, form).partition(";base64,")  # type: ignore[arg-type]
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        assert (head, picture.format, picture.size) == (f"data:image/{form.lower()}", form, shown)
