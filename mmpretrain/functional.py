"""Losses as pure functions. n: rows of this rank, m: rows of all ranks, d: features.

Distributed convention: the mean over ranks of a returned loss is the loss over the global batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmpretrain.distributed import all_gather_with_grad, exchange_with_grad, rank

TILE = 1024  # rows and columns of one tile of similarities: 4 MB in fp32, faster here than 2048 and a quarter of its memory


def _tiles(count: int) -> list[slice]:
    return [slice(start, min(start + TILE, count)) for start in range(0, count, TILE)]


class _LogSumExp(torch.autograd.Function):
    """Row-wise and column-wise log-sum-exp of scale * a @ b.T in tiles, which the backward pass recomputes."""

    @staticmethod
    def _tile(a: Tensor, b: Tensor, rows: slice, columns: slice, offset: int | None) -> Tensor:
        s = a[rows] @ b[columns].T  # [r, c]
        if offset is not None:  # hide every row's similarity to itself
            start = rows.start + offset - columns.start
            if -s.shape[0] < start < s.shape[1]:
                s.diagonal(start).fill_(-math.inf)
        return s

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, offset: int | None, columns_too: bool) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        row_lse = a.new_full((len(a),), -math.inf)
        col_lse = a.new_full((len(b),), -math.inf)
        for rows in _tiles(len(a)):
            for columns in _tiles(len(b)):
                s = _LogSumExp._tile(a, b, rows, columns, offset) * scale
                row_lse[rows] = torch.logaddexp(row_lse[rows], s.logsumexp(1))
                if columns_too:
                    col_lse[columns] = torch.logaddexp(col_lse[columns], s.logsumexp(0))
        ctx.save_for_backward(a, b, scale, row_lse, col_lse)
        ctx.offset, ctx.columns_too = offset, columns_too
        return row_lse, col_lse

    @staticmethod
    def backward(ctx: Any, grad_row: Tensor, grad_col: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, b, scale, row_lse, col_lse = ctx.saved_tensors
        grad_a, grad_b, grad_scale = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(scale)
        with torch.autocast(a.device.type, enabled=False):
            for rows in _tiles(len(a)):
                for columns in _tiles(len(b)):
                    s = _LogSumExp._tile(a, b, rows, columns, ctx.offset)
                    logits = s * scale
                    g = torch.exp(logits - row_lse[rows, None]).mul_(grad_row[rows, None])  # softmax over the row
                    if ctx.columns_too:
                        g += torch.exp(logits - col_lse[None, columns]).mul_(grad_col[None, columns])
                    grad_scale += (g * s.nan_to_num_(neginf=0.0)).sum()
                    g *= scale
                    grad_a[rows] += g @ b[columns]
                    grad_b[columns] += g.T @ a[rows]
        return grad_a, grad_b, grad_scale, None, None


def exact(x: Tensor) -> Tensor:
    """Convert to at least fp32: a loss in bf16 would have gradient errors of 1e-2."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def unit(x: Tensor) -> Tensor:
    """Normalise the rows of [n, d] to length one, in at least fp32."""
    return F.normalize(exact(x), dim=1)


def info_nce(a: Tensor, b: Tensor, scale: Tensor, symmetric: bool = True) -> Tensor:
    """Compute the symmetric InfoNCE of matched rows over the global batch, in O(m) memory.

    Source: Radford et al. 2021 (CLIP), figure 3.

    Args:
        a: [n, d] unit vectors.
        b: [n, d] unit vectors; row i matches row i of `a`.
        scale: scalar or [1], the inverse temperature.
        symmetric: average both directions; else only a to b.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b, scale = exact(a), exact(b), exact(scale.reshape(()))
        n = len(a)
        positive = (a * b).sum(1) * scale  # [n]
        row_lse, col_lse = _LogSumExp.apply(a, all_gather_with_grad(b), scale, None, symmetric)  # type: ignore[misc]
        loss = (row_lse - positive).mean()
        if not symmetric:
            return loss
        # A column's sum runs over the rows of every rank: each rank holds a part of it, and gives it to the column's owner.
        parts = exchange_with_grad(col_lse.view(-1, n))  # [world, n]
        return (loss + (parts.logsumexp(0) - positive).sum() / n) / 2


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """Compute NT-Xent over the 2m views of the global batch: each view against all others, its sibling being positive.

    Source: Chen et al. 2020 (SimCLR), equation 1.

    Args:
        a: [n, d] unit vectors, one view of n images.
        b: [n, d] unit vectors, another view of the same images.
        temperature: of the softmax.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = exact(a), exact(b)
        local = torch.cat([a, b])  # [2n, d]
        everyone = all_gather_with_grad(local)  # rank by rank: [a0 b0 a1 b1 ...]
        scale = local.new_tensor(1 / temperature)
        lse, _ = _LogSumExp.apply(local, everyone, scale, rank() * len(local), False)  # type: ignore[misc]
        positive = (a * b).sum(1) / temperature
        return (lse - torch.cat([positive, positive])).mean()


class _Sigmoid(torch.autograd.Function):
    """Sum over all pairs of softplus(-z * (scale * a @ b.T + bias)), z = +1 on matches and -1 elsewhere, tile by tile."""

    @staticmethod
    def _logits(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, rows: slice, columns: slice, offset: int) -> tuple[Tensor, Tensor]:
        s = a[rows] @ b[columns].T
        logits = s * scale + bias
        start = rows.start + offset - columns.start
        if -s.shape[0] < start < s.shape[1]:
            logits.diagonal(start).neg_()
        return s, logits  # softplus(logits) is the pair's loss

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, offset: int) -> Tensor:  # type: ignore[override]
        total = a.new_zeros(())
        for rows in _tiles(len(a)):
            for columns in _tiles(len(b)):
                total += F.softplus(_Sigmoid._logits(a, b, scale, bias, rows, columns, offset)[1]).sum()
        ctx.save_for_backward(a, b, scale, bias)
        ctx.offset = offset
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        a, b, scale, bias = ctx.saved_tensors
        grads = [torch.zeros_like(t) for t in (a, b, scale, bias)]
        with torch.autocast(a.device.type, enabled=False):
            for rows in _tiles(len(a)):
                for columns in _tiles(len(b)):
                    s, logits = _Sigmoid._logits(a, b, scale, bias, rows, columns, ctx.offset)
                    g = torch.sigmoid(logits) * grad
                    start = rows.start + ctx.offset - columns.start
                    if -s.shape[0] < start < s.shape[1]:
                        g.diagonal(start).neg_()
                    grads[2] += (g * s).sum()
                    grads[3] += g.sum()
                    g *= scale
                    grads[0][rows] += g @ b[columns]
                    grads[1][columns] += g.T @ a[rows]
        return (*grads, None)


def sigmoid_loss(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Compute the pairwise sigmoid loss over the global batch, divided by the number of rows.

    Source: Zhai et al. 2023 (SigLIP), equation 1.

    Args:
        a: [n, d] unit vectors.
        b: [n, d] unit vectors; row i matches row i of `a`.
        scale: scalar or [1], the inverse temperature.
        bias: scalar or [1].
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b, scale, bias = exact(a), exact(b), exact(scale.reshape(())), exact(bias.reshape(()))
        return _Sigmoid.apply(a, all_gather_with_grad(b), scale, bias, rank() * len(a)) / len(a)  # type: ignore[operator]


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut images [B, 3, H, W] into patches [B, N, 3 * patch * patch], in raster order."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """Assemble patches [B, N, 3 * patch * patch] to images [B, 3, H, W]: the inverse of `patchify`."""
    x = patches.reshape(len(patches), *grid, 3, patch, patch).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(len(patches), 3, grid[0] * patch, grid[1] * patch)
