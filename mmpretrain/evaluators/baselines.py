"""Baselines without learning for classification: nearest neighbours by colour histogram and by raw pixels.

They show how much of a data set can be solved without a model. They depend on the data alone, so each pair of data
sets is measured once per process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from mmpretrain import distributed
from mmpretrain.data.decode import decode_image
from mmpretrain.data.schema import BadSample
from mmpretrain.evaluators.data.datasets import EvalSet
from mmpretrain.evaluators.features import gather_rows, part

Name = Literal["colour_histogram", "raw_pixels"]
NEIGHBOURS = (1, 5, 20, 50)  # the best is reported: a baseline should be as strong as possible
PIXELS_SIDE = 32  # side of the images whose raw pixels are compared
MAX_TRAIN = 50_000  # training images; drawn at random from a larger set
CHUNK = 256  # queries compared at once


@dataclass
class BaselineConfig:
    """The option of classification evaluators to report baselines."""

    baselines: list[Name] = field(default_factory=list)  # also accuracies without learning: colour_histogram, raw_pixels


def colour_histogram(image: np.ndarray) -> np.ndarray:
    """Compute a colour histogram, float32 [512], of an image, uint8 [H, W, 3]: eight bins per channel, square roots of frequencies.

    The dot product of two is their Bhattacharyya coefficient, so the nearest by Euclidean distance is the most
    similar.
    """
    high = image >> 5
    flat = (high[..., 0].astype(np.uint16) << 6 | high[..., 1] << 3 | high[..., 2]).reshape(-1)
    return np.sqrt(np.bincount(flat, minlength=512) / len(flat)).astype(np.float32)


def raw_pixels(image: np.ndarray, side: int = PIXELS_SIDE) -> np.ndarray:
    """Average an image, uint8 [H, W, 3], over a grid of side x side: float32 [side * side * 3] in 0..1, which also averages noise."""
    channels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).double()
    return adaptive_avg_pool2d(channels, side).permute(1, 2, 0).reshape(-1).div(255).float().numpy()


# name -> (name in results, features of an image, their number)
BASELINES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], int]] = {
    "colour_histogram": ("colour_histogram_knn", colour_histogram, 512),
    "raw_pixels": ("raw_pixel_knn", raw_pixels, PIXELS_SIDE**2 * 3),
}


def neighbour_hits(train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray, own: np.ndarray | None = None) -> np.ndarray:
    """Count the queries that the majority vote among their k nearest neighbours, by Euclidean distance, labels correctly.

    Args:
        train: float32 [m, D].
        labels: int64 [m], 0 or greater.
        test: float32 [n, D], the queries.
        truth: int64 [n].
        own: int64 [n], the row of `train` that is the query itself, and does not vote.

    Returns:
        int64, one count for each k of NEIGHBOURS. Ties go to the nearer.
    """
    square = (train**2).sum(1)
    hits = np.zeros(len(NEIGHBOURS), np.int64)
    nearest = min(max(NEIGHBOURS), len(train) - (own is not None))
    if nearest < 1:
        return hits
    for low in range(0, len(test), CHUNK):
        distance = square - 2 * test[low : low + CHUNK] @ train.T
        if own is not None:
            distance[np.arange(len(distance)), own[low : low + CHUNK]] = np.inf
        near = np.argpartition(distance, nearest - 1, axis=1)[:, :nearest]
        near = np.take_along_axis(near, np.argsort(np.take_along_axis(distance, near, 1), 1, kind="stable"), 1)
        votes = labels[near]  # [b, nearest], nearest first
        for i, k in enumerate(NEIGHBOURS):
            score = np.zeros((len(votes), int(labels.max()) + 1))
            for rank, vote in enumerate(votes[:, :k].T):
                score[np.arange(len(votes)), vote] += 1 - 1e-6 * rank
            hits[i] += (score.argmax(1) == truth[low : low + CHUNK]).sum()
    return hits


_measured: dict[str, dict[str, float]] = {}  # by `_key`


def measure(names: Sequence[str], train: EvalSet | None, test: EvalSet, accelerator: Accelerator, threads: int) -> dict[str, float]:
    """Measure the accuracies on `test` of nearest neighbours among the images of `train`; the same on every process.

    Args:
        names: of BASELINES.
        train: labelled images, whose classes are matched to those of `test` by name; None: the other images of `test`.
        test: labelled images.
        accelerator: of this process.
        threads: that read and decode, on each process.

    Returns:
        Name in results -> the best accuracy over k of NEIGHBOURS, of the images that can be decoded.
    """
    if not names:
        return {}
    key = _key(names, train, test)
    if key not in _measured:
        _measured[key] = _measure(names, train, test, accelerator, threads)
    return _measured[key]


def _key(names: Sequence[str], *sets: EvalSet | None) -> str:
    digest = hashlib.sha256(repr(sorted(names)).encode())
    for dataset in sets:
        if dataset is not None:
            digest.update(dataset.fingerprint().encode() + dataset.labels.numpy().tobytes() + repr(dataset.classes).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _measure(names: Sequence[str], train: EvalSet | None, test: EvalSet, accelerator: Accelerator, threads: int) -> dict[str, float]:
    known = {name: i for i, name in enumerate(test.classes)}
    features, rows = _features(names, test, accelerator, threads)
    truth = test.labels[rows].numpy()
    mine = part(len(rows))
    own = None
    if train is None:
        voters, labels = features, truth
        own = np.arange(len(rows))[mine.start : mine.stop]
    else:
        train = train.drawn(MAX_TRAIN, 0)
        voters, rows_of_train = _features(names, train, accelerator, threads)
        # A class that only `train` has may vote, but is never correct: its index follows those of the test set.
        extra = {name: len(known) + i for i, name in enumerate(name for name in train.classes if name not in known)}
        position = torch.tensor([(known | extra)[name] for name in train.classes])
        labels = position[train.labels[rows_of_train]].numpy()
    result = {}
    for name in dict.fromkeys(names):
        hits = neighbour_hits(voters[name], labels, features[name][mine.start : mine.stop], truth[mine.start : mine.stop], own)
        total = distributed.all_reduce_sum(torch.from_numpy(hits).to(accelerator.device)).max().item()
        result[BASELINES[name][0]] = total / max(len(rows), 1)
    return result


def _features(names: Sequence[str], dataset: EvalSet, accelerator: Accelerator, threads: int) -> tuple[dict[str, np.ndarray], Tensor]:
    """Compute features of the images that can be decoded; the same on every process.

    Returns:
        (name -> float32 [m, D]; int64 [m], the items, ascending).
    """

    def work(row: int) -> list[np.ndarray] | None:
        try:
            image = decode_image(dataset.items[row].read(), dataset.limits()).permute(1, 2, 0).numpy()
        except BadSample:  # counted where the model's features are computed
            return None
        return [BASELINES[name][1](image) for name in names]

    mine = part(len(dataset))
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="baselines") as pool:
        results = list(pool.map(work, mine))
    usable = [row for row, value in zip(mine, results, strict=True) if value is not None]
    values = [value for value in results if value is not None]
    features = {}
    for i, name in enumerate(names):
        local = torch.from_numpy(np.stack([value[i] for value in values])) if values else torch.empty(0, BASELINES[name][2])
        features[name] = gather_rows(local.to(accelerator.device)).cpu().numpy()
    return features, gather_rows(torch.tensor(usable, dtype=torch.int64, device=accelerator.device)).cpu()
