"""Pictures of the views of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def view_grid(rows: Sequence[Tensor], mean: Sequence[float], std: Sequence[float], pad: int = 2) -> Tensor:
    """Arrange views in a grid: each entry of `rows` becomes one row of the picture.

    Views may differ in n, h and w (multi-crop): smaller images lie at the top left of a cell of the largest size.

    Args:
        rows: normalised images [n, 3, h, w].
        mean: of the normalisation, per channel.
        std: of the normalisation, per channel.
        pad: pixels between images.

    Returns:
        float [3, H, W] in 0..1.
    """
    m, s = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    if not rows or any(r.ndim != 4 or r.shape[1] != 3 for r in rows):
        raise ValueError(f"expected one or more tensors [n, 3, h, w], found shapes {[tuple(r.shape) for r in rows]}")
    height, width = max(r.shape[2] for r in rows) + pad, max(r.shape[3] for r in rows) + pad
    grid = torch.ones(3, pad + len(rows) * height, pad + max(len(r) for r in rows) * width)
    for i, row in enumerate(rows):
        for j, image in enumerate(row.detach().float().cpu()):
            y, x = pad + i * height, pad + j * width
            grid[:, y : y + image.shape[1], x : x + image.shape[2]] = (image * s + m).nan_to_num(0.0).clamp(0, 1)
    return grid
