"""Images that a model finds alike: cosines of their embeddings, tile by tile."""

from __future__ import annotations

import tempfile

import numpy as np
import torch

from data_prep.dedup_find import Found
from data_prep.score import Encoder, Place

TILE = 4096


def drop_alike(found: Found, model: str, threshold: float) -> None:
    """Drop what is at least `threshold` alike to a kept sample, over those that are not dropped yet.

    Embeddings lie as float16 in a temporary file, 2 E bytes a sample; in memory are two tiles and the table of their cosines (64 MB). Time
    is samples squared times E over what the device multiplies: some minutes for 100,000 on a few cores, for a million on one accelerator.
    Raises ValueError for a threshold outside 0..1, OptionError for a model that is not there.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"--threshold {threshold}: expected a cosine above 0, at most 1")
    encoder = Encoder(model)
    samples = np.sort(found.copies.first[found.copies.of[found.copies.first] < 0])
    places = (Place(sample, *found.place(sample)) for sample in samples.tolist())
    with tempfile.TemporaryFile() as file:
        rows, width = [], 0
        for batch in encoder.batches(places, caption=None):
            found.not_embedded += [(sample, str(error)) for sample, error in batch.bad]  # stay: they were only not compared
            if batch.samples:
                value = encoder.images(batch, joint=False).numpy().astype(np.float16)
                file.write(value.tobytes())
                width = value.shape[1]
                rows += batch.samples
        if not rows:
            return
        file.flush()
        stored = np.memmap(file, np.float16, "r", shape=(len(rows), width))
        _tiles(found, stored, np.array(rows), threshold, encoder.device)
        del stored


def _tiles(found: Found, stored: np.ndarray, rows: np.ndarray, threshold: float, device: torch.device) -> None:
    """Tiles in the order of ranks, so that a sample is known to be kept before it drops others."""
    copies = found.copies
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
