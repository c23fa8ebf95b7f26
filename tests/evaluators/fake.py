"""A model that knows colours: its feature is the mean colour of an image or of the colour words of a text."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from mmpretrain.types import Encoded, Preprocess

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "purple": (255, 0, 255),
    "cyan": (0, 255, 255),
}


class ColourModel:
    fingerprint = "colours"
    preprocess = Preprocess(8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def __init__(self) -> None:
        self.calls = 0

    def images(self, pixels: Tensor) -> Encoded:
        self.calls += 1
        mean = pixels.mean((2, 3))
        return Encoded(features=mean, pooled=mean)

    def texts(self, texts: list[str]) -> Tensor:
        known = [[torch.tensor(rgb) / 255 for name, rgb in COLOURS.items() if name in text.split()] for text in texts]
        return torch.stack([torch.stack(found).mean(0) if found else torch.full((3,), 0.1) for found in known])

    def copy(self, random: bool = False) -> nn.Module:
        raise TypeError("nothing to train")


def picture(colour: str | tuple[int, int, int], kind: str = "png", size: tuple[int, int] = (12, 10)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour] if isinstance(colour, str) else colour).save(out, kind.upper())
    return out.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def shard(path: Path, samples: list[tuple[str, dict[str, bytes]]]) -> Path:
    """A foreign tar in WebDataset format, without an index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def colour_folder(root: Path, colours: list[str], per_class: int = 2, names: dict[str, str] | None = None) -> Path:
    for colour in colours:
        for i in range(per_class):
            write(root / (names or {}).get(colour, colour) / f"{i}.png", picture(colour))
    return root
