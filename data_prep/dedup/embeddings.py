"""Copies by cosine similarity of image embeddings, tile by tile."""

from __future__ import annotations

import tempfile

import numpy as np
import torch

from data_prep.copies import Copies
from data_prep.embed import Encoder
from data_prep.subset import Numbering
from mmpretrain.config.build import OptionError

TILE = 4096


def drop_alike(copies: Copies, numbering: Numbering, model: str, threshold: float) -> list[tuple[int, str]]:
    """Drops the remaining samples with a cosine of at least `threshold` to a kept sample.

    The embeddings are stored as float16 in a temporary file, 2 E bytes a sample; memory holds two tiles and their cosines
    (64 MB). Time is proportional to E times the square of the samples: some minutes for 100,000 on a few cores, or for a
    million on one accelerator.

    Args:
        copies: receives the dropped samples.
        numbering: locates the samples.
        model: see `embed.Encoder`.
        threshold: a cosine above 0, at most 1.

    Returns:
        (sample, reason) of those that could not be embedded: they are kept without a comparison.

    Raises:
        OptionError: a threshold out of range, or `model` does not name a model.
    """
    if not 0 < threshold <= 1:
        raise OptionError(f"--threshold {threshold}: expected a cosine above 0, at most 1")
    encoder = Encoder(model)
    samples = np.sort(copies.first[copies.of[copies.first] < 0])
    not_embedded: list[tuple[int, str]] = []
    with tempfile.TemporaryFile() as file:
        rows, width = [], 0
        for batch in encoder.batches(numbering.places(samples), caption=None):
            not_embedded += [(sample, str(error)) for sample, error in batch.bad]
            if batch.samples:
                value = encoder.images(batch, joint=False).numpy().astype(np.float16)
                file.write(value.tobytes())
                width = value.shape[1]
                rows += batch.samples
        if not rows:
            return not_embedded
        file.flush()
        stored = np.memmap(file, np.float16, "r", shape=(len(rows), width))
        _tiles(copies, stored, np.array(rows), threshold, encoder.device)
        del stored
    return not_embedded


def _tiles(copies: Copies, stored: np.ndarray, rows: np.ndarray, threshold: float, device: torch.device) -> None:
    """Compares tiles in the order of ranks, so that a sample is known to be kept before it drops others."""
    order = np.argsort(copies.rank[rows])

    def tile(start: int) -> torch.Tensor:
        part = torch.from_numpy(stored[order[start : start + TILE]]).to(device).float()
        return torch.nn.functional.normalize(part, dim=-1)

    for first in range(0, len(rows), TILE):
        query = tile(first)
        for second in range(first, len(rows), TILE):
            cosines = query @ tile(second).T
            if first == second:
                cosines = cosines.triu(1)  # each pair once, none with itself
            alike = cosines >= threshold
            for row in torch.nonzero(alike.any(1)).flatten().tolist():
                kept = int(rows[order[first + row]])
                if copies.of[kept] >= 0:
                    continue
                columns = torch.nonzero(alike[row]).flatten().cpu()
                others = rows[order[columns.numpy() + second]]
                wanted = copies.wanted(np.stack([np.full(len(others), kept), others], 1))
                for sample, cosine in zip(others[wanted].tolist(), cosines[row].cpu()[columns].numpy()[wanted].tolist()):
                    copies.drop(kept, sample, "embedding", cosine)
