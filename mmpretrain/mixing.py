"""Mixup and CutMix with a partner row, drawn from counter seeds, so that ranks and chunks do not change the result."""

from __future__ import annotations

import torch
from torch import Tensor

from mmpretrain import rng
from mmpretrain.errors import ModelError
from mmpretrain.types import MixSpec


def mix_pictures(spec: MixSpec, pixels: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor]:
    """Mix every picture with that of its partner, row i ^ 1.

    Args:
        spec: alphas of mixup and CutMix.
        pixels: [B, 3, H, W].
        seeds: int64 [B]; a pair draws from the seed of its even row.

    Returns:
        The mixed pictures [B, 3, H, W], and float32 [B], the share of a row's own picture.

    Raises:
        ModelError: an odd number of rows, or an alpha outside [0, 1].

    Source: Zhang et al. 2018 (mixup), equation 1; Yun et al. 2019 (CutMix), equations 1 and 2.
    """
    if len(pixels) % 2:
        raise ModelError(f"{len(pixels)} rows on a rank or in a chunk: mixing pairs row i with i ^ 1, so their number must be even")
    if not (spec.mixup or spec.cutmix) or not (0 <= spec.mixup <= 1 and 0 <= spec.cutmix <= 1):
        raise ModelError(f"mixup {spec.mixup} and cutmix {spec.cutmix}: expected alphas of 0 to 1, one of them above 0")
    height, width = pixels.shape[-2:]
    first = seeds.view(-1, 2)[:, 0].repeat_interleave(2)  # [B]
    cuts = torch.full((len(seeds),), bool(spec.cutmix), device=seeds.device)
    if spec.mixup and spec.cutmix:
        cuts = rng.uniform(first, ("mix", spec.index, "kind")) < 0.5
    blend = rng.beta(first, ("mix", spec.index, "mixup"), spec.mixup) if spec.mixup else torch.ones_like(first, dtype=torch.float32)
    partner = pixels.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    weight = torch.where(cuts, 1.0, blend)
    mask = torch.zeros(len(pixels), height, width, dtype=torch.bool, device=pixels.device)
    if spec.cutmix:
        side = (1 - rng.beta(first, ("mix", spec.index, "cutmix"), spec.cutmix)).sqrt()
        centre = rng.uniform(first, ("mix", spec.index, "centre"), 2)
        inside = []
        for axis, length in enumerate((height, width)):
            middle, half = (centre[:, axis] * length).floor(), (side * length / 2).floor()
            place = torch.arange(length, device=pixels.device)
            inside.append((place >= (middle - half)[:, None]) & (place < (middle + half)[:, None]))
        mask = inside[0][:, :, None] & inside[1][:, None, :] & cuts[:, None, None]
        weight = torch.where(cuts, 1 - mask.float().mean((1, 2)), weight)  # the pasted area, clipped at the border
    share = torch.where(cuts, 1.0, weight).to(pixels.dtype).view(-1, 1, 1, 1)
    mixed = pixels * share + partner * (1 - share)
    return torch.where(mask[:, None], partner, mixed), weight


def partners(values: Tensor) -> Tensor:
    """Return the values [B, ...] of every row's partner, row i ^ 1."""
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
