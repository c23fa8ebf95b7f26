"""The objective `siglip`: a sigmoid loss on every pair of image and caption of the global batch (SigLIP)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn

from mmpretrain.config.build import Range
from mmpretrain.functional import sigmoid_loss, unit
from mmpretrain.objectives.base import Augment, Context, Objective, ObjectiveConfig
from mmpretrain.types import Encode, Requested


@dataclass
class SigLIPConfig(ObjectiveConfig):
    """Options of `siglip`. Scale and bias start as in the paper (section 3.2); the default view is open_clip's."""

    augment: Augment = field(default_factory=Augment)  # the image view
    view_index: Annotated[int, Range(0)] = 0  # which of several views of that kind
    init_scale: Annotated[float, Range(above=0)] = 10.0  # initial value of the learned inverse temperature
    init_bias: float = -10.0  # initial value of the learned bias: most pairs do not match


class SigLIP(Objective):
    """A logistic loss on every pair of image and caption of the global batch, with a learned scale and bias.

    Source: Zhai et al. 2023, section 3.2, equation 1 and algorithm 1. Departure: captions are gathered on every rank,
    where section 3.3 passes them from device to device; the loss is the same.
    """

    Config = SigLIPConfig
    exported = ("logit_scale", "logit_bias")

    def __init__(self, config: SigLIPConfig, context: Context) -> None:
        super().__init__()
        self.needs = {
            "image": Encode(config.source, context.image_view(config.augment, config.view_index)),
            "text": Encode(config.source, context.text_view()),
        }
        self.logit_scale = nn.Parameter(torch.tensor([math.log(config.init_scale)]))
        self.logit_bias = nn.Parameter(torch.tensor([config.init_bias]))

    def forward(self, image: Requested, text: Requested) -> dict[str, Tensor]:  # type: ignore[override]
        a, b = unit(image.features), unit(text.features)
        scale = self.logit_scale.exp()
        loss = sigmoid_loss(a, b, scale, self.logit_bias)
        return {"loss": loss, "logit_scale": scale.detach()[0], "logit_bias": self.logit_bias.detach()[0]}
