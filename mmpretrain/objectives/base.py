"""What an objective is: encoded views in, loss out. One file and one line in `__init__` add one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmpretrain.data.views import ImageView, TextView
from mmpretrain.types import Encode, Encoded


@dataclass
class ObjectiveConfig:
    kind: str = ""  # which objective; default: the key's own name
    weight: float = 1.0  # factor on its loss
    source: str = ""  # the source whose rows it sees


@dataclass(frozen=True)
class Augment:
    """How far an image view may depart from the picture. A preset's name, or a preset's name and changes to it."""

    preset: str = "weak"  # weak: crops of 90-100%; crop: crops of 67-100% and flips (SimMIM); simclr: strong (SimCLR v1)
    scale: tuple[float, float] | None = None  # area of the crop as a fraction of the picture
    flip: float | None = None  # probability of a horizontal flip
    jitter_prob: float | None = None  # probability of colour jitter; default: the preset's, or 1 where only strengths are given
    brightness: float | None = None  # largest relative change
    contrast: float | None = None  # largest relative change
    saturation: float | None = None  # largest relative change
    hue: float | None = None  # largest turn, in turns
    grayscale: float | None = None  # probability
    blur: float | None = None  # probability of Gaussian blur
    solarize: float | None = None  # probability

    def check(self) -> None:
        """Raise ValueError for numbers that cannot be meant."""
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"augment.scale is {list(self.scale)}: expected shares of the picture, 0 < low <= high <= 1")
        most = {"hue": 0.5, "brightness": math.inf, "contrast": math.inf, "saturation": math.inf}
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not 0 <= value <= most.get(name, 1):
                raise ValueError(f"augment.{name} is {value}: expected 0 to {most.get(name, 1)}")


# weak: open_clip's default. crop: Xie et al. 2022, section 4.1. simclr: Chen et al. 2020, appendix A, strength 0.5.
PRESETS: dict[str, dict[str, Any]] = {
    "weak": {"scale": (0.9, 1.0)},
    "crop": {"scale": (0.67, 1.0), "flip": 0.5},
    "simclr": {
        "scale": (0.08, 1.0),
        "flip": 0.5,
        "jitter_prob": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.1,
        "grayscale": 0.2,
        "blur": 0.5,
    },
}


@dataclass(frozen=True)
class Context:
    """What an objective may know of the run when it is built."""

    image_size: int  # pixels a side of this source's views
    mean: tuple[float, float, float]  # this source's normalisation
    std: tuple[float, float, float]
    patch_size: int | None = None  # of the image tower; None where it has no patches
    image_width: int = 0  # D of the image tower
    text_width: int = 0  # D of the text tower
    embed_dim: int = 0  # E
    tokenizer: str = "clip"
    context_length: int = 77
    vocab_size: int = 0
    trim_text: bool = True  # whether captions may be cut to the longest of the batch without changing the result
    classes: tuple[str, ...] = ()  # of the source's label, when it has one

    def image_view(self, augment: Augment, index: int = 0) -> ImageView:
        if augment.preset not in PRESETS:
            raise ValueError(f"augment preset {augment.preset!r} is unknown; known: {', '.join(PRESETS)}")
        augment.check()
        if self.patch_size and self.image_size < self.patch_size:
            raise ValueError(f"images of {self.image_size} pixels are smaller than the tower's patches of {self.patch_size}")
        changes = {k: v for k, v in vars(augment).items() if k != "preset" and v is not None}
        options = PRESETS[augment.preset] | changes
        if {"brightness", "contrast", "saturation", "hue"} & set(changes):
            options.setdefault("jitter_prob", 1.0)  # a strength that was asked for takes effect
        return ImageView(index=index, size=self.image_size, mean=self.mean, std=self.std, **options)

    def text_view(self) -> TextView:
        return TextView(tokenizer=self.tokenizer, context_length=self.context_length, trim=self.trim_text)


class Objective(nn.Module):
    """Encoded views in, loss out.

    `needs` names the encodes; its keys are the argument names of `forward`. `forward` returns "loss" and scalars to log.
    The mean over ranks of the loss must be the loss over the global batch, except where `per_row` is set.
    """

    Config: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig
    per_row: ClassVar[bool] = False  # the loss is a mean over independent terms: it may run chunk by chunk, weighted by `count`
    wants_label: ClassVar[bool] = False  # its source must give `rows.labels["label"]`
    needs: dict[str, Encode | tuple[Encode, ...]]
    mask_token: nn.Parameter | None  # put where this objective's encodes hide a token

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("mask_token", None)

    def forward(self, **encoded: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def count(self, **encoded: Any) -> Tensor:
        """How many terms a per-row loss averages here: known before encoding, so only rows, views and masks may be read."""
        first = next(iter(encoded.values()))
        first = first if isinstance(first, Encoded) else first[0]
        return torch.tensor(float(len(first.rows.seeds)))

    def before_step(self, progress: float) -> None:
        """Called before each update; progress in [0, 1]."""

    def after_step(self, progress: float) -> None:
        """Called after each update: queues, prototypes, EMA heads."""

    def pictures(self, **encoded: Encoded) -> dict[str, list[Tensor]]:
        """What this objective can show of itself: name -> rows of normalised images [n,3,H,W]."""
        return {}


def source_encodes(needs: dict[str, Encode | tuple[Encode, ...]]) -> list[Encode]:
    """All encodes of `needs`, in order."""
    return [e for value in needs.values() for e in (value if isinstance(value, tuple) else (value,))]


def require(value: int | None, what: str, objective: str) -> int:
    """A tower property that an objective cannot work without."""
    if not value:
        raise ValueError(f"objective {objective!r} needs {what}, which this model does not have")
    return value


def mask_embedding(width: int) -> nn.Parameter:
    """A learned stand-in for hidden tokens."""
    return nn.Parameter(torch.randn(width) * 0.02)
