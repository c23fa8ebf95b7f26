"""One training view three ways: ours, torchvision's transforms on PIL images, torchvision's transforms v2 on uint8 tensors."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import v2

from mmpretrain.data.views import NORMALISATION, ImageView
from mmpretrain.objectives.base import PRESETS

MEAN, STD = NORMALISATION["openai"]
BICUBIC = transforms.InterpolationMode.BICUBIC


class Blur:
    """SimCLR's blur on PIL images, sigma uniform in [0.1, 2]."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def ours(size: int, simclr: bool) -> list[ImageView]:
    """What a batch carries: CLIP's view, or SimCLR's two."""
    return [ImageView(index=i, size=size, **PRESETS["simclr"]) for i in range(2)] if simclr else [ImageView(size=size, **PRESETS["weak"])]


def central(size: int) -> Callable[[Image.Image], torch.Tensor]:
    """The evaluation view of a PIL image: resized, the middle cut out, normalised float32 [3,H,W]."""
    steps = [transforms.Resize(size, BICUBIC), transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    return transforms.Compose(steps)


def pil(size: int, simclr: bool) -> transforms.Compose:
    """PIL image -> normalised float32 [3,H,W]."""
    end = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    if not simclr:  # open_clip's own
        return transforms.Compose([transforms.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=BICUBIC), *end])
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomApply([Blur()], 0.5),
            *end,
        ]
    )


def tensors(size: int, simclr: bool) -> v2.Compose:
    """uint8 [3,H,W] -> normalised float32 [3,H,W]."""
    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(MEAN), list(STD))]
    if not simclr:
        return v2.Compose([v2.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=BICUBIC, antialias=True), *end])
    kernel = 13 if size >= 224 else 7  # covers three sigma where the image allows it
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], 0.5),
            *end,
        ]
    )
