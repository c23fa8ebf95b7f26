"""The interface of objectives: encoded views in, loss out. A further objective takes one file and one line in `__init__`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from mmpretrain.config.build import Range, nearest
from mmpretrain.data.views import ImageView, TextView
from mmpretrain.types import Encode, Encoded


@dataclass
class ObjectiveConfig:
    """Options of every objective."""

    kind: str = ""  # which objective; default: the key's own name
    weight: Annotated[float, Range(0)] = 1.0  # factor on its loss
    source: str = ""  # the source whose rows it sees
    start: Annotated[float, Range(0, below=1)] = 0.0  # fraction of the run before which it costs nothing: no view, no forward
    stop: Annotated[float, Range(above=0, high=1)] = 1.0  # and after which it costs nothing


@dataclass(frozen=True)
class Augment:
    """Augmentation of an image view: the name of a preset, and changes to it."""

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
        """Raise ValueError for numbers out of range."""
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"augment.scale is {list(self.scale)}: expected shares of the picture, 0 < low <= high <= 1")
        limits = {"hue": 0.5, "brightness": math.inf, "contrast": math.inf, "saturation": math.inf}
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not 0 <= value <= limits.get(name, 1):
                raise ValueError(f"augment.{name} is {value}: expected 0 to {limits.get(name, 1)}")


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
class Network:
    """The properties of a frozen network that objectives may use."""

    image_size: int  # pixels per side of its own views
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    patch_size: int | None = None
    image_width: int = 0
    text_width: int = 0
    embed_dim: int = 0


@dataclass(frozen=True)
class Context:
    """The properties of the run that an objective is built with."""

    image_size: int  # pixels per side of this source's views
    mean: tuple[float, float, float]  # this source's normalisation
    std: tuple[float, float, float]
    patch_size: int | None = None  # of the image tower; None without patches
    image_width: int = 0  # D of the image tower
    text_width: int = 0  # D of the text tower
    embed_dim: int = 0  # E
    tokenizer: str = "clip"
    context_length: int = 77
    vocab_size: int = 0
    trim_text: bool = True  # captions may be cut to the longest of the batch without changing the result
    classes: tuple[str, ...] = ()  # of the source's label, if it has one
    steps: int = 0  # updates of the whole run: papers give warm-ups in steps
    networks: Mapping[str, Network] = field(default_factory=dict)  # the frozen towers of the recipe, by name

    def network(self, name: str, objective: str) -> Network:
        """Return the frozen network of that name. Raises ValueError with the nearest name; `objective` is for the message."""
        if name not in self.networks:
            raise ValueError(
                f"objective {objective!r} wants network {name!r}, which the recipe's `networks` lacks{nearest(name, self.networks)}"
            )
        return self.networks[name]

    def image_view(self, augment: Augment, index: int = 0, size: int | None = None, network: str | None = None) -> ImageView:
        """Describe a training view of a picture.

        Args:
            augment: its augmentation.
            index: number of the view among several with equal options.
            size: pixels per side; default: the source's.
            network: a frozen network of the recipe, whose size and normalisation the view gets.

        Raises:
            ValueError: an unknown preset or network, or a number out of range.
        """
        mean, std = self.mean, self.std
        if network is not None:
            frozen = self.network(network, "image_view")
            size, mean, std = size or frozen.image_size, frozen.mean, frozen.std
        size = size or self.image_size
        if augment.preset not in PRESETS:
            raise ValueError(f"augment preset {augment.preset!r} is unknown; known: {', '.join(PRESETS)}")
        augment.check()
        if self.patch_size and size < self.patch_size:
            raise ValueError(f"images of {size} pixels are smaller than the tower's patches of {self.patch_size}")
        changes = {k: v for k, v in vars(augment).items() if k != "preset" and v is not None}
        options = PRESETS[augment.preset] | changes
        if {"brightness", "contrast", "saturation", "hue"} & set(changes):
            options.setdefault("jitter_prob", 1.0)  # a given strength takes effect
        return ImageView(index=index, size=size, mean=mean, std=std, **options)

    def text_view(self) -> TextView:
        """Describe the view of a caption."""
        return TextView(tokenizer=self.tokenizer, context_length=self.context_length, trim=self.trim_text)


class Objective(nn.Module):
    """A training objective: encoded views in, loss out.

    `needs` names the encodes; its keys are the argument names of `forward`. `forward` returns "loss" and scalars to
    log. The mean over ranks of the loss must be the loss over the global batch, except where `per_row` is set.
    `forward` may update its own buffers (a centre, a queue): they are restored where the step is skipped, and after
    cost probes, dry runs and pictures.
    """

    Config: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig
    per_row: ClassVar[bool] = False  # the loss is a mean over independent terms: it may run chunk by chunk, weighted by `count`
    wants_label: ClassVar[bool] = False  # its source must give `rows.labels["label"]`
    averaged: ClassVar[tuple[str, ...]] = ()  # submodules whose EMA copies are self.teacher[name], updated with the towers' momentum
    exported: ClassVar[tuple[str, ...]] = ()  # parameters that belong to the model's file, such as logit_scale
    needs: dict[str, Encode | tuple[Encode, ...]]
    teacher: nn.ModuleDict  # the EMA copies of `averaged`

    def forward(self, **encoded: Any) -> dict[str, Tensor]:
        """Compute the loss, and scalars to log, from the outputs of the encodes in `needs`."""
        raise NotImplementedError

    def count(self, **encoded: Any) -> Tensor:
        """Count the terms that a per-row loss averages. It is called before encoding, so it may read rows and views only."""
        first = next(iter(encoded.values()))
        rows = (first if isinstance(first, Encoded) else first[0]).rows
        assert rows is not None  # only a tower called directly returns outputs without rows
        return torch.tensor(float(len(rows.seeds)))

    def frozen(self, progress: float) -> Iterable[nn.Parameter]:
        """Return the parameters that take no step at `progress` in [0, 1]: SwAV's prototypes, DINO's last layer."""
        return ()

    def before_step(self, progress: float) -> None:
        """Prepare for a step; progress in [0, 1]."""

    def after_step(self, progress: float) -> None:
        """Act after an update, such as on queues or prototypes; progress in [0, 1]."""

    def pictures(self, **encoded: Encoded) -> dict[str, list[Tensor]]:
        """Return pictures of this objective's predictions: name -> rows of normalised images [n, 3, H, W]."""
        return {}


def source_encodes(needs: dict[str, Encode | tuple[Encode, ...]]) -> list[Encode]:
    """Return all encodes of `needs`, in order."""
    return [e for value in needs.values() for e in (value if isinstance(value, tuple) else (value,))]


def require(value: int | None, what: str, objective: str) -> int:
    """Return a property of the towers that an objective needs. Raises ValueError where the model lacks it."""
    if not value:
        raise ValueError(f"objective {objective!r} needs {what}, which this model does not have")
    return value
