"""The objective `clip`: symmetric InfoNCE between images and captions over the global batch (CLIP, FLIP)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
from torch import Tensor, nn

from mmpretrain.config.build import Range
from mmpretrain.functional import info_nce, unit
from mmpretrain.objectives.base import Augment, Context, Objective, ObjectiveConfig
from mmpretrain.types import Encode, MaskSpec, Requested


@dataclass
class CLIPConfig(ObjectiveConfig):
    """Options of `clip`. Temperature and its limit are the paper's (section 2.5); the default view is open_clip's."""

    augment: Augment = field(default_factory=Augment)  # the image view; equal to another objective's, it is one view
    view_index: Annotated[int, Range(0)] = 0  # which of several views of that kind
    init_temperature: Annotated[float, Range(above=0)] = 0.07  # initial value of the learned temperature
    max_logit_scale: Annotated[float, Range(1)] = 100.0  # the inverse temperature never exceeds this
    token_drop: Annotated[float, Range(0, below=1)] = 0.0  # fraction of patches dropped from the image (FLIP, Li et al. 2023)
    whole_tail: Annotated[float, Range(0, below=1)] = 0.0  # last fraction of the run that drops none (FLIP, section 3)


class CLIP(Objective):
    """Symmetric cross-entropy over the similarities of the global batch's images and captions, with a learned temperature.

    Source: Radford et al. 2021 (CLIP), section 2.3 and figure 3; Li et al. 2023 (FLIP), section 3, for `token_drop`
    and `whole_tail`. Departure: the inverse temperature is at least 1, as in open_clip, besides the paper's upper
    limit.
    """

    Config = CLIPConfig
    exported = ("logit_scale",)

    def __init__(self, config: CLIPConfig, context: Context) -> None:
        super().__init__()
        self.max_log_scale = math.log(config.max_logit_scale)
        self.tail = config.whole_tail
        self.mask = MaskSpec(config.token_drop, mode="drop") if config.token_drop > 0 else None
        self.needs: dict[str, Encode] = {
            "image": Encode(config.source, context.image_view(config.augment, config.view_index), self.mask),
            "text": Encode(config.source, context.text_view()),
        }
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / config.init_temperature)]))

    def before_step(self, progress: float) -> None:
        mask = None if progress >= 1 - self.tail else self.mask
        self.needs["image"] = replace(self.needs["image"], mask=mask)

    def forward(self, image: Requested, text: Requested) -> dict[str, Tensor]:  # type: ignore[override]
        a, b = unit(image.features), unit(text.features)
        scale = self.logit_scale.exp()
        return {"loss": info_nce(a, b, scale), "logit_scale": scale.detach()[0]}

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        self.logit_scale.clamp_(0, self.max_log_scale)
