"""View specs (stage 5 of the data pipeline): random draws and geometry of views. Photometric operations are in augment.py.

Random numbers depend on the rows' seeds and the spec's `repr` alone, so a row gets the same view in any batch, on any
rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpretrain import rng
from mmpretrain.data import augment
from mmpretrain.data.text import get_tokenizer, trim
from mmpretrain.types import Params, Sample, View, ViewSpec

NORMALISATION = {
    "openai": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 [3, H, W] to [3, height, width], bicubic and antialiased."""
    if tuple(image.shape[-2:]) == (height, width):
        return image
    # Channels-last, as decoded, is resized faster. The batch axis is added in that layout, or torch would not recognise it.
    pixels = image.permute(1, 2, 0)[None].contiguous().permute(0, 3, 1, 2)
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True)[0]


def _image(sample: Sample) -> Tensor:
    assert sample.image is not None  # a source decodes the image of every sample where it has an image view
    return sample.image


def _captions(sample: Sample) -> list[str]:
    assert sample.captions is not None  # a source reads the captions of every sample where it has a text view
    return sample.captions


def crop_boxes(samples: Sequence[Sample], seeds: Tensor, name: object, scale: tuple, ratio: tuple) -> Tensor:
    """Draw random-resized-crop boxes as torchvision's RandomResizedCrop does, for all rows at once.

    The first of ten draws of area and log aspect ratio that fits is used, else the central crop nearest to the given
    ratios.

    Args:
        samples: B decoded samples.
        seeds: int64 [B].
        name: of the random stream.
        scale: range of the area, as a fraction of the image's.
        ratio: range of width over height.

    Returns:
        int64 [B, 4] of top, left, height, width.

    Source: Szegedy et al. 2015.
    """
    sides = torch.tensor([_image(sample).shape[-2:] for sample in samples], dtype=torch.float64)  # [B,2] height, width
    u = rng.uniform(seeds, ("crop", name), 22).double()  # [B,22]
    height, width = sides[:, :1], sides[:, 1:]
    area = height * width * (scale[0] + u[:, :10] * (scale[1] - scale[0]))
    log_ratio = math.log(ratio[0]) + u[:, 10:20] * (math.log(ratio[1]) - math.log(ratio[0]))
    aspect = log_ratio.exp()
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()  # [B,10]
    fits = (w > 0) & (h > 0) & (w <= width) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    w, h = w.gather(1, first)[:, 0], h.gather(1, first)[:, 0]
    height, width = height[:, 0], width[:, 0]
    top = ((height - h + 1) * u[:, 20]).floor()
    left = ((width - w + 1) * u[:, 21]).floor()
    shape = width / height
    w_c = torch.where(shape > ratio[1], (height * ratio[1]).round(), width)
    h_c = torch.where(shape < ratio[0], (width / ratio[0]).round(), height)
    central = torch.stack([((height - h_c) / 2).floor(), ((width - w_c) / 2).floor(), h_c, w_c], 1)
    drawn = torch.stack([top, left, h, w], 1)
    return torch.where(fits.any(1, keepdim=True), drawn, central).long()


class _Tuples:
    """Converts lists from a recipe to tuples, so that specs are hashable and equal specs are one view."""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            if isinstance(value, list):
                object.__setattr__(self, item.name, tuple(value))


@dataclass(frozen=True)
class ImageView(_Tuples, ViewSpec):
    """A training view: random resized crop, flip, colour jitter, greyscale, blur, solarize, normalisation.

    For brightness, contrast and saturation f, the factor is uniform in [max(0, 1-f), 1+f]; hue is a turn uniform in
    [-hue, hue], at most 0.5. `jitter_prob` is the probability of the colour jitter, whose four operations are in
    random order. flip, grayscale, blur and solarize are probabilities. The sigma of the blur is uniform in [0.1, 2]
    pixels (SimCLR, appendix A).
    """

    modality: ClassVar[Literal["image"]] = "image"
    size: int = 224
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (0.75, 1.3333)
    flip: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_prob: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0
    mean: tuple[float, float, float] = NORMALISATION["openai"][0]
    std: tuple[float, float, float] = NORMALISATION["openai"][1]

    def draw(self, samples: Sequence[Sample], seeds: Tensor) -> Params:
        name = self.stream
        params = {"box": crop_boxes(samples, seeds, name, self.scale, self.ratio)}
        chance = rng.uniform(seeds, ("chance", name), 5)  # [B,5]
        if self.flip:
            params["flip"] = chance[:, 0] < self.flip
        strengths = (self.brightness, self.contrast, self.saturation)
        if self.jitter_prob and (any(strengths) or self.hue):
            u = rng.uniform(seeds, ("jitter", name), 4)
            low = torch.tensor([max(0.0, 1 - s) for s in strengths])
            high = torch.tensor([1 + s for s in strengths])
            applied = chance[:, 1] < self.jitter_prob
            params["factors"] = torch.where(applied[:, None], low + u[:, :3] * (high - low), 1.0)
            params["turns"] = torch.where(applied, (2 * u[:, 3] - 1) * self.hue, 0.0)
            params["order"] = rng.uniform(seeds, ("order", name), 4).argsort(1)
        if self.grayscale:
            params["grey"] = chance[:, 2] < self.grayscale
        if self.blur:
            low, high = augment.SIGMA
            sigma = low + (high - low) * rng.uniform(seeds, ("sigma", name))
            params["sigma"] = torch.where(chance[:, 3] < self.blur, sigma, 0.0)
        if self.solarize:
            params["solarize"] = chance[:, 4] < self.solarize
        return params

    def geometry(self, source: Tensor, params: Params) -> Tensor:
        top, left, height, width = params["box"].tolist()
        cut = resize(source[:, top : top + height, left : left + width], self.size, self.size)
        return cut.flip(-1) if params.get("flip") else cut

    def render(self, pixels: Tensor, params: Params) -> View:
        return View(augment.photometric(pixels, params, self.mean, self.std))


@dataclass(frozen=True)
class CenterView(_Tuples, ViewSpec):
    """The evaluation view: resizing of the shorter side ("shortest") or of both ("squash"), centre crop, normalisation."""

    modality: ClassVar[Literal["image"]] = "image"
    size: int = 224
    mean: tuple[float, float, float] = NORMALISATION["openai"][0]
    std: tuple[float, float, float] = NORMALISATION["openai"][1]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resize_mode not in ("shortest", "squash"):
            raise ValueError(f"resize_mode {self.resize_mode!r}: expected shortest or squash")
        if self.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"interpolation {self.interpolation!r}: expected bicubic or bilinear")

    def draw(self, samples: Sequence[Sample], seeds: Tensor) -> Params:
        return {}

    def geometry(self, source: Tensor, params: Params) -> Tensor:
        height, width = source.shape[-2:]
        if self.resize_mode == "squash":
            to = (self.size, self.size)
        else:
            short = min(height, width)
            to = tuple(self.size if side == short else int(self.size * side / short) for side in (height, width))
        if (height, width) != to:
            source = F.interpolate(source[None], to, mode=self.interpolation, antialias=True)[0]
        top, left = (round((side - self.size) / 2) for side in to)
        return source[:, top : top + self.size, left : left + self.size]

    def render(self, pixels: Tensor, params: Params) -> View:
        return View(augment.normalise(pixels, self.mean, self.std))


@dataclass(frozen=True)
class TextView(ViewSpec):
    """A caption of the sample, drawn by its seed, as token ids. `trim` cuts the batch to its longest caption (text.trim)."""

    modality: ClassVar[Literal["text"]] = "text"
    tokenizer: str = "clip"
    context_length: int = 77
    trim: bool = True

    def draw(self, samples: Sequence[Sample], seeds: Tensor) -> Params:
        number = torch.tensor([len(_captions(sample)) for sample in samples])
        return {"caption": (rng.uniform(seeds, ("caption", self.stream)) * number).long()}

    def geometry(self, source: list[str], params: Params) -> Tensor:
        return get_tokenizer(self.tokenizer).encode([source[int(params["caption"])]], self.context_length)[0]

    def render(self, pixels: Tensor, params: Params) -> View:
        return View(trim(pixels, get_tokenizer(self.tokenizer).eot) if self.trim else pixels)
