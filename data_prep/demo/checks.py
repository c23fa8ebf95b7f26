"""What the demo's test set gives away without learning: chance, and nearest neighbours by colour histogram and by raw pixels.

Each must stay at or below LIMIT, else the benchmark is too easy. Neighbours come from `pairs`, whose true labels they may use.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image

from data_prep.demo.scenes import GENERATOR_VERSION, SIDE
from mmpretrain.data import index as shard_index
from mmpretrain.machine import cores

LIMIT = 0.25
NEIGHBOURS = (1, 5, 20, 50)  # the best of these is reported: a baseline should be as strong as it can be
CACHE = "baselines.json"


def read_split(folder: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """-> (images uint8 [n, S, S, 3], class int64 [n], -1 where there is none), in shard order. Raises FileNotFoundError."""
    paths = sorted(Path(folder).glob("*.tar"))
    if not paths:
        raise FileNotFoundError(f"no .tar in {folder}: write the demo shards first (python -m data_prep demo {Path(folder).parent})")
    images, labels = [], []

    def decode(data: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(data), formats=["JPEG"]))

    with ThreadPoolExecutor(cores()) as pool:
        for path in paths:
            index = shard_index.open_index(path)
            data = path.read_bytes()
            members = [index.members(i) for i in range(len(index))]
            images += pool.map(decode, [data[m["jpg"].offset : m["jpg"].offset + m["jpg"].size] for m in members])
            labels += [int(data[m["cls"].offset : m["cls"].offset + m["cls"].size]) if "cls" in m else -1 for m in members]
    return np.stack(images), np.array(labels)


def colour_histogram(images: np.ndarray) -> np.ndarray:
    """uint8 [n, S, S, 3] -> float32 [n, 512]: eight bins a channel, as square roots of frequencies, so that a dot product of two rows is
    their Bhattacharyya coefficient."""
    high = images >> 5
    flat = (high[..., 0].astype(np.uint16) << 6 | high[..., 1] << 3 | high[..., 2]).reshape(len(images), -1)
    return np.sqrt(np.stack([np.bincount(row, minlength=512) for row in flat]) / flat.shape[1]).astype(np.float32)


def raw_pixels(images: np.ndarray) -> np.ndarray:
    """uint8 [n, S, S, 3] -> float32 [n, (S/2)**2 * 3] in 0..1: means of 2x2 pixels, which also averages the noise away."""
    pairs = images[:, ::2].astype(np.uint16) + images[:, 1::2]
    return (pairs[:, :, ::2] + pairs[:, :, 1::2]).reshape(len(images), -1).astype(np.float32) / 1020


def nearest_neighbours(train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Accuracy of majority vote among the k nearest by Euclidean distance, for each k of NEIGHBOURS; ties go to the nearer."""
    square = (train**2).sum(1)
    correct = dict.fromkeys(NEIGHBOURS, 0)
    most = min(max(NEIGHBOURS), len(train))
    for low in range(0, len(test), 256):
        distance = square - 2 * test[low : low + 256] @ train.T
        near = np.argpartition(distance, most - 1, axis=1)[:, :most]
        near = np.take_along_axis(near, np.argsort(np.take_along_axis(distance, near, 1), 1, kind="stable"), 1)
        votes = labels[near]  # [b, most], nearest first
        for k in NEIGHBOURS:
            score = np.zeros((len(votes), int(labels.max()) + 1))
            for rank, vote in enumerate(votes[:, :k].T):
                score[np.arange(len(votes)), vote] += 1 - 1e-6 * rank
            correct[k] += int((score.argmax(1) == truth[low : low + 256]).sum())
    return {f"k={k}": n / len(test) for k, n in correct.items()}


def nearest_neighbour_baselines(root: Path | str, split: str = "test") -> dict:
    """Chance and both nearest-neighbour accuracies of `pairs` -> `split`, as fractions; `passed` says whether all are within LIMIT.

    Kept in `root`/baselines.json for as long as generator, seed and sizes are the same.
    """
    root = Path(root)
    key = {"generator_version": GENERATOR_VERSION, "of": [json.loads((root / name / "demo.json").read_text()) for name in ("pairs", split)]}
    cache = root / CACHE
    if cache.exists() and (kept := json.loads(cache.read_text()))["key"] == key:
        return kept["result"]
    (train, labels), (test, truth) = read_split(root / "pairs"), read_split(root / split)
    histogram = nearest_neighbours(colour_histogram(train), labels, colour_histogram(test), truth)
    pixels = nearest_neighbours(raw_pixels(train), labels, raw_pixels(test), truth)
    result = {
        "split": split,
        "n": len(test),
        "chance": 1 / len(np.unique(labels)),
        "colour_histogram_knn": max(histogram.values()),
        "raw_pixel_knn": max(pixels.values()),
        "detail": {"colour_histogram_knn": histogram, "raw_pixel_knn": pixels, "side": SIDE},
        "limit": LIMIT,
    }
    result["passed"] = max(result["chance"], result["colour_histogram_knn"], result["raw_pixel_knn"]) <= LIMIT
    temporary = cache.with_name(f"{CACHE}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps({"key": key, "result": result}, indent=1) + "\n")
    os.replace(temporary, cache)
    return result


TRAIN, TEST = ("pairs", "photos"), ("val", "test", "heldout", "shifted", "binding")
HASH_DISTANCE = 4  # of 64 bits
PIXEL_DIFFERENCE = 12.0  # mean absolute difference, of 255: pictures with equal hashes that differ more are other scenes


def perceptual_hash(images: np.ndarray) -> np.ndarray:
    """uint8 [n, S, S, 3] -> uint64 [n]: the 64-bit DCT hash (pHash)."""
    rows = np.stack([imagehash.phash(Image.fromarray(image)).hash.ravel() for image in images])
    return np.packbits(rows, axis=1).view(np.uint64)[:, 0]


def count_duplicates(train: np.ndarray, test: np.ndarray) -> dict[str, int]:
    """How many test images (uint8 [n, S, S, 3]) have an equal, or a perceptually equal, image among the training ones [m, S, S, 3].

    same_pixels: equal sha256. same_hash: pHash within HASH_DISTANCE bits, which ignores colour. perceptual: same_hash, and a mean absolute
    pixel difference of at most PIXEL_DIFFERENCE to one of those.
    """
    seen = {hashlib.sha256(image.tobytes()).digest() for image in train}
    same = sum(hashlib.sha256(image.tobytes()).digest() in seen for image in test)
    train_hash, test_hash = perceptual_hash(train), perceptual_hash(test)
    near = perceptual = 0
    for image, bits in zip(test, test_hash):
        at = np.flatnonzero(np.bitwise_count(train_hash ^ bits) <= HASH_DISTANCE)
        near += bool(len(at))
        difference = np.abs(train[at].astype(np.int16) - image).mean((1, 2, 3))
        perceptual += bool(len(at) and difference.min() <= PIXEL_DIFFERENCE)
    return {"train": len(train), "test": len(test), "same_pixels": same, "same_hash": near, "perceptual": perceptual}


def duplicates(root: Path | str) -> dict[str, int]:
    """`count_duplicates` of all the test splits against both training splits found under `root`."""
    root = Path(root)
    train, test = ([read_split(root / name)[0] for name in names if (root / name).exists()] for names in (TRAIN, TEST))
    if not train or not test:
        raise FileNotFoundError(f"{root} needs a training split ({', '.join(TRAIN)}) and a test split ({', '.join(TEST)})")
    return count_duplicates(np.concatenate(train), np.concatenate(test))
