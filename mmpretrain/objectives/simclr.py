"""The objective `simclr`: contrastive learning between two views of an image over the global batch (SimCLR)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor

from mmpretrain.config.build import Range
from mmpretrain.functional import info_nce, nt_xent, unit
from mmpretrain.heads import mlp
from mmpretrain.objectives.base import Augment, Context, Objective, ObjectiveConfig, require
from mmpretrain.types import Encode, Requested


@dataclass
class SimCLRConfig(ObjectiveConfig):
    """Options of `simclr`. The augmentation is the paper's (appendix A) with colour strength 0.5."""

    temperature: Annotated[float, Range(above=0)] = 0.1  # of the softmax over similarities
    augment: Augment = field(default_factory=lambda: Augment("simclr"))  # both views
    hidden: Annotated[int, Range(0)] = 0  # width inside the projection head; 0: twice the tower's
    projection: Annotated[int, Range(1)] = 128  # width of the head's output
    layers: Annotated[int, Range(1)] = 2  # linear maps in the projection head
    norm: Literal["batch", "layer", "none"] = "batch"  # inside the projection head
    loss: Literal["nt_xent", "info_nce"] = "nt_xent"  # info_nce: one direction, positives on the diagonal


class SimCLR(Objective):
    """Cross-entropy of a view against all other views of the global batch, with the image's second view as the target.

    Source: Chen et al. 2020, section 2, equation 1 (NT-Xent). Departure: the projection head's hidden layer has twice
    the tower's width by default, where the paper's has the same width.
    """

    Config = SimCLRConfig

    def __init__(self, config: SimCLRConfig, context: Context) -> None:
        super().__init__()
        width = require(context.image_width, "an image tower", "simclr")
        outputs = frozenset({"pooled"})
        first, second = (Encode(config.source, context.image_view(config.augment, i), outputs=outputs) for i in range(2))
        self.needs = {"first": first, "second": second}
        self.config = config
        self.projection_head = mlp(width, config.hidden or 2 * width, config.projection, config.layers, config.norm)

    def forward(self, first: Requested, second: Requested) -> dict[str, Tensor]:  # type: ignore[override]
        # One pass of the head over both views: its BatchNorm sees all 2N of them.
        z = self.projection_head(torch.cat([first.pooled, second.pooled]))
        a, b = unit(z).chunk(2)
        if self.config.loss == "info_nce":
            loss = info_nce(a, b, a.new_tensor(1 / self.config.temperature), symmetric=False)
        else:
            loss = nt_xent(a, b, self.config.temperature)
        return {"loss": loss, "similarity": (a * b).sum(1).mean().detach()}
