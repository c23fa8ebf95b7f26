"""The objective `dino`: self-distillation between crops of an image, from an EMA teacher (DINO)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor, nn

from mmpretrain.config.build import Range
from mmpretrain.distributed import all_reduce_sum, world_size
from mmpretrain.functional import exact
from mmpretrain.heads import PrototypeHead
from mmpretrain.objectives.base import Augment, Context, Objective, ObjectiveConfig, require
from mmpretrain.types import Encode, Requested


@dataclass
class DINOConfig(ObjectiveConfig):
    """Options of `dino`; the defaults are the paper's."""

    temperature: Annotated[float, Range(above=0)] = 0.1  # of the student
    teacher_temperature: Annotated[float, Range(above=0)] = 0.07  # after its warm-up
    warmup_teacher_temperature: Annotated[float, Range(above=0)] = 0.04  # at the start
    warmup: Annotated[float, Range(0, 1)] = 0.3  # fraction of the run over which the teacher's temperature rises (30 of 100 epochs)
    centre_momentum: Annotated[float, Range(0, below=1)] = 0.9  # of the running mean that is subtracted from the teacher's outputs
    freeze_last_layer: Annotated[float, Range(0, 1)] = 0.01  # first fraction of the run without steps of the prototypes (1 of 100 epochs)
    prototypes: Annotated[int, Range(2)] = 65536  # K, the outputs that are compared
    hidden: Annotated[int, Range(1)] = 2048  # width inside the head
    bottleneck: Annotated[int, Range(1)] = 256  # width before the prototypes
    layers: Annotated[int, Range(1)] = 3  # linear maps before the prototypes
    local_crops: Annotated[int, Range(0)] = 8  # small crops, which the student alone sees
    local_size: Annotated[int, Range(1)] = 96  # pixels a side of a small crop
    augment: Augment = field(default_factory=lambda: Augment("simclr", scale=(0.4, 1.0), saturation=0.2, jitter_prob=0.8, blur=1.0))
    second_augment: Augment = field(
        default_factory=lambda: Augment("simclr", scale=(0.4, 1.0), saturation=0.2, jitter_prob=0.8, blur=0.1, solarize=0.2)
    )  # of the second large crop
    local_augment: Augment = field(default_factory=lambda: Augment("simclr", scale=(0.05, 0.4), saturation=0.2, jitter_prob=0.8))


class DINO(Objective):
    """Cross-entropy between the teacher's centred, sharpened outputs on large crops and the student's on every other crop.

    Source: Caron et al. 2021, equation 3 (multi-crop), algorithm 1, sections 3.1 (centring) and 5, appendix C (head).
    Departures: the teacher's temperature rises, and the last layer is frozen, over fractions of the run, where the
    paper counts epochs; the loss is the mean over pairs of crops, as in the authors' code, where equation 3 has a sum.
    """

    Config = DINOConfig
    averaged = ("head",)
    centre: Tensor

    def __init__(self, config: DINOConfig, context: Context) -> None:
        super().__init__()
        width = require(context.image_width, "an image tower", "dino")
        pooled = frozenset({"pooled"})
        large = [context.image_view(config.augment, 0), context.image_view(config.second_augment, 1)]
        small = [context.image_view(config.local_augment, 2 + i, size=config.local_size) for i in range(config.local_crops)]
        self.needs = {
            "student": tuple(Encode(config.source, view, outputs=pooled) for view in large + small),
            "teacher_views": tuple(Encode(config.source, view, network="teacher", outputs=pooled) for view in large),
        }
        self.config, self.teacher_temperature = config, config.warmup_teacher_temperature
        self.head = PrototypeHead(width, config.prototypes, config.hidden, config.bottleneck, config.layers)
        self.register_buffer("centre", torch.zeros(config.prototypes))

    def before_step(self, progress: float) -> None:
        c = self.config
        rise = min(1.0, progress / c.warmup) if c.warmup else 1.0
        self.teacher_temperature = c.warmup_teacher_temperature + (c.teacher_temperature - c.warmup_teacher_temperature) * rise

    def frozen(self, progress: float) -> Iterable[nn.Parameter]:
        return self.head.last.parameters() if progress < self.config.freeze_last_layer else ()

    def forward(self, student: tuple[Requested, ...], teacher_views: tuple[Requested, ...]) -> dict[str, Tensor]:  # type: ignore[override]
        with torch.no_grad():
            targets = exact(self.teacher["head"](torch.cat([view.pooled for view in teacher_views])))  # [2B,K]
            probabilities = ((targets - self.centre) / self.teacher_temperature).softmax(-1).chunk(2)
            batch_centre = all_reduce_sum(targets.sum(0)) / (len(targets) * world_size())
            self.centre.lerp_(batch_centre.to(self.centre.dtype), 1 - self.config.centre_momentum)
        logits = exact(self.head(torch.cat([view.pooled for view in student])))
        logs = (logits / self.config.temperature).log_softmax(-1).chunk(len(student))  # each [B,K]
        pairs = [(t, s) for t in range(len(probabilities)) for s in range(len(logs)) if s != t]
        loss = torch.stack([-(probabilities[t] * logs[s]).sum(-1).mean() for t, s in pairs]).mean()
        entropy = -torch.cat([p * p.clamp(min=1e-12).log() for p in probabilities]).sum(-1).mean()  # near 0 or log K: collapse
        return {"loss": loss, "teacher_entropy": entropy}
