"""Chunks of a batch: slices of its rows, joined outputs, and the surrogate loss that returns gradients to the encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from mmpretrain.functional import exact
from mmpretrain.types import OUTPUTS, Batch, Encode, Encoded, Rows


def take(batch: Batch, i: int, chunks: int) -> Batch:
    """Return chunk `i` of `chunks` of every source's rows, without copying."""
    result = {}
    for name, rows in batch.items():
        n = len(rows.keys) // chunks
        part = slice(i * n, (i + 1) * n)
        views = {s: v._replace(data=v.data[part], target=None if v.target is None else v.target[part]) for s, v in rows.views.items()}
        result[name] = Rows(rows.keys[part], rows.seeds[part], {k: v[part] for k, v in rows.labels.items()}, views)
    return result


def first_rows(batch: Batch, count: int) -> Batch:
    """Return the first `count` rows of every source, for pictures and dry runs."""
    result = {}
    for name, rows in batch.items():
        n = len(rows.keys)
        result |= take({name: rows}, 0, max(1, n // min(count, n)))
    return result


def join(pieces: list[Encoded], rows: Rows, encode: Encode) -> Encoded:
    """Concatenate the outputs of chunks to one Encoded, whose tensors are leaves that collect the gradient.

    Args:
        pieces: outputs of the chunks, in order.
        rows: of the whole batch.
        encode: that was encoded; only the student's outputs require a gradient.
    """
    fields = {}
    for name in OUTPUTS:
        if getattr(pieces[0], name) is not None:
            fields[name] = torch.cat([getattr(p, name) for p in pieces]).requires_grad_(encode.network == "student")
    mask, mix = (None if getattr(pieces[0], name) is None else torch.cat([getattr(p, name) for p in pieces]) for name in ("mask", "mix"))
    return Encoded(**fields, mask=mask, grid=pieces[0].grid, rows=rows, view=rows.views[encode.view], mix=mix)


def slice_of(whole: Encoded, i: int, chunks: int, rows: Rows, encode: Encode) -> Encoded:
    """Return chunk `i` of `chunks` of joined outputs, without copying."""
    fields = {}
    for name in (*OUTPUTS, "mask", "mix"):
        value = getattr(whole, name)
        fields[name] = None if value is None else value[i * len(value) // chunks : (i + 1) * len(value) // chunks]
    return Encoded(**fields, grid=whole.grid, rows=rows, view=rows.views[encode.view])


def surrogate(encoded: Encoded, leaf: Encoded, i: int, chunks: int) -> Tensor:
    """Return a scalar whose backward pass sends the cached gradients of chunk `i` into the encoder.

    Args:
        encoded: outputs of the chunk, computed again with a graph.
        leaf: outputs of the whole batch, with gradients; see `join`.
        i: number of the chunk.
        chunks: number of chunks.

    Source: GradCache (Gao et al. 2021), section 3.2.
    """
    assert leaf.rows is not None  # `join` gives every leaf its rows
    total = torch.zeros((), device=leaf.rows.seeds.device)
    for name in OUTPUTS:
        cached, value = getattr(leaf, name), getattr(encoded, name)
        if cached is not None and cached.grad is not None:
            n = len(cached) // chunks
            total = total + (exact(value) * exact(cached.grad[i * n : (i + 1) * n])).sum()
    return total
