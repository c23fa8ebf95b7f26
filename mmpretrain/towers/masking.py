"""Random, blockwise and attentive token masks, drawn from counter seeds, with exactly round(ratio * N) hidden per row."""

from __future__ import annotations

import torch
from torch import Tensor

from mmpretrain import rng
from mmpretrain.errors import ModelError
from mmpretrain.types import MaskSpec

_RECTANGLES = 24  # rounds of the block mask; any remaining count is filled patch by patch


def draw_mask(spec: MaskSpec, seeds: Tensor, grid: tuple[int, int], attention: Tensor | None = None) -> Tensor:
    """Draw the mask of every row, bool [B, N], True = hidden, N = grid[0] * grid[1] in raster order.

    Args:
        spec: kind and ratio. With `patch` > 1 squares of patches are hidden; one square is cut to make the count
            exact.
        seeds: int64 [B]; a row's mask depends on its own seed and the spec alone.
        grid: patches down, across.
        attention: [B, N], for kind "attentive": the least attended patches are hidden first.

    Raises:
        ModelError: a ratio outside 0..1, or an attention that is missing or of another grid.

    Source: Yang et al. 2023 (A-CLIP), section 3.2, for attentive masks.
    """
    num = grid[0] * grid[1]
    count = round(spec.ratio * num)
    if not 0 <= spec.ratio <= 1 or (spec.mode == "drop" and count == num):
        raise ModelError(f"mask ratio {spec.ratio} hides {count} of {num} tokens: give a ratio in 0..1 that leaves some when dropping")
    # not `repr(spec)`: `from_` holds a frozenset, whose order differs between processes
    name = ("mask", spec.kind, spec.mode, spec.ratio, spec.patch, spec.index)
    if spec.kind == "block":
        return _block(seeds, name, grid, count)
    square = _squares(grid, spec.patch).to(seeds.device)  # [N]
    num_squares = int(square.max()) + 1
    if spec.kind == "random":
        score = rng.uniform(seeds, name, num_squares)
    elif attention is None:
        raise ModelError("an attentive mask needs the class-token attention [B,N] of the encode named in MaskSpec.from_")
    elif attention.shape != (len(seeds), num):
        raise ModelError(f"attention {tuple(attention.shape)} for a mask of {(len(seeds), num)}: `from_` must encode the same patch grid")
    else:
        total = torch.zeros(len(seeds), num_squares, device=seeds.device).index_add_(1, square, attention.float())
        score = total / torch.bincount(square, minlength=num_squares)
    return _first(score[:, square], count)


def _first(score: Tensor, count: int) -> Tensor:
    """Select the `count` smallest of each row of [B, N], as bool; of equal scores the first in raster order."""
    order = score.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def _squares(grid: tuple[int, int], patch: int) -> Tensor:
    """Return the square of `patch` patches a side of each patch, int64 [N]; squares at the border may be cut."""
    down, across = (torch.arange(side) // patch for side in grid)
    return (down[:, None] * (int(across[-1]) + 1) + across).flatten()


def _block(seeds: Tensor, name: tuple, grid: tuple[int, int], count: int) -> Tensor:
    """Draw blockwise masks: rectangles of at least 8% of the image with aspect ratios of 0.3 to 1/0.3.

    The rectangle that would exceed `count` is cut in raster order, where the paper rejects it, so that the count is
    exact and a fixed number of rounds suffices for every row.

    Source: Bao et al. 2022 (BEiT), algorithm 1.
    """
    rows, columns = (torch.arange(side, device=seeds.device) for side in grid)
    num, smallest = grid[0] * grid[1], max(1.0, 0.08 * grid[0] * grid[1])
    u = rng.uniform(seeds, name, _RECTANGLES, 4)  # area, aspect, top, left
    hidden = torch.zeros(len(seeds), num, dtype=torch.bool, device=seeds.device)
    for i in range(_RECTANGLES):
        left = count - hidden.sum(1)
        area = smallest + u[:, i, 0] * (left - smallest).clamp(min=0)
        aspect = torch.exp((2 * u[:, i, 1] - 1) * torch.log(torch.tensor(1 / 0.3)))
        height = (area * aspect).sqrt().round().clamp(1, grid[0]).long()
        width = (area / aspect).sqrt().round().clamp(1, grid[1]).long()
        top = (u[:, i, 2] * (grid[0] - height + 1)).long()[:, None]
        start = (u[:, i, 3] * (grid[1] - width + 1)).long()[:, None]
        inside = ((rows >= top) & (rows < top + height[:, None]))[:, :, None] & ((columns >= start) & (columns < start + width[:, None]))[
            :, None
        ]
        fresh = inside.flatten(1) & ~hidden
        hidden |= fresh & (fresh.cumsum(1) <= left[:, None])
    return _first(rng.uniform(seeds, (*name, "rest"), num).masked_fill(hidden, -1.0), count)
