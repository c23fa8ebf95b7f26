"""Small pictures of items for the report."""

from __future__ import annotations

from torchvision.io import encode_png
from torchvision.transforms.v2.functional import resize

from mmpretrain.data.decode import ImageLimits, decode_image
from mmpretrain.evaluators.readers import Item


def thumbnail(item: Item, limits: ImageLimits, side: int = 96) -> bytes:
    """PNG bytes of the image, its longer side at most `side` pixels."""
    image = decode_image(item.read(), limits)
    height, width = image.shape[1:]
    scale = min(1.0, side / max(height, width))
    return bytes(encode_png(resize(image, [max(1, round(height * scale)), max(1, round(width * scale))], antialias=True)).numpy())
