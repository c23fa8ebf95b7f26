"""JPEGs that cost what photographs cost: smooth colour fields with edges and grain, of a given size in pixels and about the same bytes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Noise at several scales, as in a photograph; 500 x 375 gives about 40 KB at quality 90."""
    drawn = np.random.default_rng(seed)
    total = np.zeros((height, width, 3), np.float32)
    for cells, strength in ((3, 60.0), (12, 30.0), (48, 12.0), (160, 5.0)):
        coarse = drawn.normal(0, strength, (max(2, cells * height // width), cells, 3)).astype(np.float32)
        planes = [Image.fromarray(coarse[..., c], "F").resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        total += np.stack([np.asarray(plane) for plane in planes], 2)
    y, x = np.mgrid[:height, :width]
    for _ in range(6):  # discs: edges
        disc = (x - drawn.integers(width)) ** 2 + (y - drawn.integers(height)) ** 2 < drawn.integers(5, height // 3) ** 2
        total[disc] += drawn.normal(0, 40, 3)
    total += drawn.normal(0, 3, (height, width, 1))
    return Image.fromarray(np.clip(total + 128, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return file.getvalue()


def write(folder: Path, width: int, height: int, count: int, shards: int = 4, different: int = 64) -> float:
    """Shards of `count` samples with an image and a caption, `different` pictures over and over; returns bytes per image."""
    from data_prep.records import Record
    from data_prep.shards.serial import write_shards

    files = [jpeg(picture(width, height, seed)) for seed in range(min(different, count))]
    records = (Record(f"{i:06d}", {"jpg": files[i % len(files)], "txt": b"a picture"}) for i in range(count))
    write_shards(records, folder, max_count=-(-count // shards))
    return sum(map(len, files)) / len(files)
