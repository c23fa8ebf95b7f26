"""Small generated images and shards."""

from __future__ import annotations

import io
import tarfile

import numpy as np
from PIL import Image


def picture(seed: int = 0, size: tuple[int, int] = (32, 24)) -> Image.Image:
    """A smooth RGB picture, width x height."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return out.getvalue()


def tar_bytes(members: list[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def pair(i: int, caption: str | bytes | None = None) -> list[tuple[str, bytes]]:
    text = f"picture {i}" if caption is None else caption
    return [(f"{i:05d}.jpg", encoded(picture(i))), (f"{i:05d}.txt", text.encode() if isinstance(text, str) else text)]
