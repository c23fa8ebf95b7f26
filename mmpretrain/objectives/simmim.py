"""The objective `simmim`: masked image modelling that predicts the pixels of hidden patches by a linear map (SimMIM)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain.config.build import Range
from mmpretrain.errors import ModelError
from mmpretrain.functional import exact, patchify, unpatchify
from mmpretrain.objectives.base import Augment, Context, Objective, ObjectiveConfig, require
from mmpretrain.types import Encode, MaskSpec, Requested


@dataclass
class SimMIMConfig(ObjectiveConfig):
    """Options of `simmim`. Ratio and augmentation are the paper's; see `SimMIM` for `mask_patch`."""

    mask_ratio: Annotated[float, Range(above=0, below=1)] = 0.6  # fraction of patches hidden
    mask_patch: Annotated[int, Range(1)] = 1  # hidden in squares of this many patches a side (SimMIM hides squares of 32 pixels)
    augment: Augment = field(default_factory=lambda: Augment("crop"))  # the image view
    view_index: Annotated[int, Range(0)] = 0  # which of several views of that kind
    normalise_target: bool = False  # predict each patch after subtracting its mean and dividing by its deviation (MAE)


class SimMIM(Objective):
    """L1 distance between the pixels of hidden patches and a linear map of their tokens.

    Source: Xie et al. 2022, section 3. Departures: by default single patches are hidden, where the paper hides squares
    of 32 pixels (`mask_patch=2` for patches of 16); `normalise_target` is MAE's. The mask embedding is the tower's.
    """

    Config = SimMIMConfig
    per_row = True  # every row hides the same number of patches: the mean over rows is the mean over hidden patches

    def __init__(self, config: SimMIMConfig, context: Context) -> None:
        super().__init__()
        self.patch = require(context.patch_size, "an image tower with patches", "simmim")
        if context.image_size % self.patch:
            raise ModelError(
                f"images of {context.image_size} pixels are not a multiple of the tower's patches of {self.patch}: change image_size"
            )
        if round(config.mask_ratio * (context.image_size // self.patch) ** 2) < 1:
            raise ModelError(f"mask_ratio {config.mask_ratio} hides none of {(context.image_size // self.patch) ** 2} patches")
        self.normalise_target = config.normalise_target
        mask = MaskSpec(config.mask_ratio, "replace", patch=config.mask_patch)
        view = context.image_view(config.augment, config.view_index)
        self.needs = {"image": Encode(config.source, view, mask, outputs=frozenset({"tokens"}))}
        self.decoder = nn.Linear(context.image_width, 3 * self.patch**2)

    def _target(self, pixels: Tensor) -> Tensor:
        target = patchify(pixels, self.patch)  # [B, N, 3pp]
        if self.normalise_target:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return target

    def forward(self, image: Requested) -> dict[str, Tensor]:  # type: ignore[override]
        target = self._target(image.view.data)
        predicted = self.decoder(image.tokens[image.mask])  # only hidden patches: [B * hidden, 3pp]
        return {"loss": F.l1_loss(exact(predicted), target[image.mask])}

    @torch.no_grad()
    def pictures(self, image: Requested) -> dict[str, list[Tensor]]:  # type: ignore[override]
        pixels = image.view.data.float()
        patches = patchify(pixels, self.patch)
        predicted = self.decoder(image.tokens).float()
        if self.normalise_target:  # back to the scale of each patch, which the model does not predict
            predicted = predicted * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
        assert image.mask is not None
        assert image.grid is not None
        hidden = image.mask[..., None]
        grey, filled = patches.masked_fill(hidden, 0.0), torch.where(hidden, predicted, patches)
        return {"reconstruction": [pixels, unpatchify(grey, self.patch, image.grid), unpatchify(filled, self.patch, image.grid)]}
