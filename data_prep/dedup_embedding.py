"""Pairs of images that a model finds alike: cosines of their embeddings, tile by tile."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import numpy as np
import torch

from data_prep.dedup_find import Found
from data_prep.score import Encoder, Place

TILE = 4096
NEIGHBOURS = 64  # of one sample in one tile: of many equal ones these suffice to join them all


def embedding_pairs(found: Found, samples: np.ndarray, model: str, threshold: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ascending samples -> (int64 [p,2] samples i < j, float32 [p] cosines) of those at least `threshold` alike.

    Embeddings lie as float16 in a temporary file, 2 E bytes a sample; in memory are two tiles and the table of their cosines (64 MB). Time
    is samples squared times E over what the device multiplies: some minutes for 100,000 on a few cores, for a million on one accelerator.
    Raises ValueError for a threshold outside 0..1, OptionError for a model that is not there.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"--threshold {threshold}: expected a cosine above 0, at most 1")
    encoder = Encoder(model)
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
        yield from _tiles(stored, np.array(rows), threshold, encoder.device)
        del stored


def _tiles(stored: np.ndarray, rows: np.ndarray, threshold: float, device: torch.device) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    def tile(start: int) -> torch.Tensor:
        part = torch.from_numpy(np.array(stored[start : start + TILE])).to(device).float()
        return torch.nn.functional.normalize(part, dim=-1)

    for first in range(0, len(rows), TILE):
        query = tile(first)
        for second in range(first, len(rows), TILE):
            cosines = query @ tile(second).T
            if first == second:
                cosines = cosines.triu(1)  # each pair once, none with itself
            value, at = cosines.topk(min(NEIGHBOURS, cosines.shape[1]), dim=1)
            i, k = torch.nonzero(value >= threshold, as_tuple=True)
            pairs = torch.stack([i + first, at[i, k] + second], 1).cpu().numpy()
            yield rows[pairs], value[i, k].float().cpu().numpy()
