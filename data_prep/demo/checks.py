"""Checks of the demo: baselines without learning (chance, nearest neighbours by colour histogram and raw pixels), and duplicates.

Each baseline must be at most LIMIT, else the benchmark is too easy. The neighbours are images of `pairs`, with their true labels.
"""

from __future__ import annotations

import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.demo.scenes import GENERATOR_VERSION, SIDE
from data_prep.perceptual import DIFFERENCE, HASH_DISTANCE, alike_in_colour, differences, signature, small
from mmpretrain.atomic import write_atomically
from mmpretrain.data import index as shard_index
from mmpretrain.errors import MissingFileError
from mmpretrain.evaluators.baselines import NEIGHBOURS, colour_histogram, neighbour_hits, raw_pixels
from mmpretrain.system import cores

LIMIT = 0.25
CACHE = "baselines.json"


def read_split(folder: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes the images and reads the labels of a split.

    Args:
        folder: of its shards.

    Returns:
        (images uint8 [n, S, S, 3], classes int64 [n], -1 without a label), in shard order.

    Raises:
        MissingFileError: the folder holds no shards.
    """
    paths = sorted(Path(folder).glob("*.tar"))
    if not paths:
        raise MissingFileError(f"no .tar in {folder}: write the demo shards first (python -m data_prep demo {Path(folder).parent})")
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


def nearest_neighbours(train: np.ndarray, labels: np.ndarray, test: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Accuracy of majority vote among the k nearest by Euclidean distance, for each k of NEIGHBOURS; see `neighbour_hits`."""
    hits = neighbour_hits(train, labels, test, truth)
    return {f"k={k}": n / len(test) for k, n in zip(NEIGHBOURS, hits.tolist(), strict=True)}


def nearest_neighbour_baselines(root: Path | str, split: str = "test") -> dict:
    """Computes the baselines of a split, with `pairs` as training images.

    The result is cached in `root`/baselines.json for the same generator, seed and sizes.

    Args:
        root: folder of the demo.
        split: to classify.

    Returns:
        Chance and both accuracies, as fractions, with details; "passed": all are at most LIMIT.
    """
    root = Path(root)
    key = {"generator_version": GENERATOR_VERSION, "of": [json.loads((root / name / "demo.json").read_text()) for name in ("pairs", split)]}
    cache = root / CACHE
    if cache.exists() and (cached := json.loads(cache.read_text()))["key"] == key:
        return cached["result"]
    (train, labels), (test, truth) = read_split(root / "pairs"), read_split(root / split)
    histogram, pixels = (
        nearest_neighbours(np.stack([*map(features, train)]), labels, np.stack([*map(features, test)]), truth)
        for features in (colour_histogram, raw_pixels)
    )
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
    write_atomically(cache, json.dumps({"key": key, "result": result}, indent=1) + "\n")
    return result


TRAIN, TEST = ("pairs", "photos"), ("val", "test", "heldout", "shifted", "binding")


def count_duplicates(train: np.ndarray, test: np.ndarray) -> dict[str, int]:
    """Counts the test images with an equal or nearly equal training image.

    Args:
        train: uint8 [m, S, S, 3].
        test: uint8 [n, S, S, 3].

    Returns:
        "same_pixels": equal digests; "same_hash": perceptual hashes, which ignore colour, within HASH_DISTANCE bits;
        "perceptual":
        same_hash, and a difference of at most DIFFERENCE from one of those images, as `dedup` compares them.
    """
    train_signs, test_signs = (np.array([signature(image) for image in images]) for images in (train, test))
    seen = set(map(tuple, train_signs["digest"].tolist()))
    same = sum(tuple(digest) in seen for digest in test_signs["digest"].tolist())
    near = perceptual = 0
    for image, signed in zip(test, test_signs):
        close = np.flatnonzero(np.bitwise_count(train_signs["hash"] ^ signed["hash"]) <= HASH_DISTANCE)
        near += bool(len(close))
        close = close[alike_in_colour(train_signs["colour"][close], signed["colour"])]
        if len(close):
            pictures = np.stack([small(train[index]) for index in close])
            perceptual += bool((differences(pictures, small(image)[None]) <= DIFFERENCE).any())
    return {"train": len(train), "test": len(test), "same_pixels": same, "same_hash": near, "perceptual": perceptual}


def duplicates(root: Path | str) -> dict[str, int]:
    """Counts the duplicates of all test splits under `root` in the training splits; see `count_duplicates`."""
    root = Path(root)
    train, test = ([read_split(root / name)[0] for name in names if (root / name).exists()] for names in (TRAIN, TEST))
    if not train or not test:
        raise MissingFileError(f"{root} needs a training split ({', '.join(TRAIN)}) and a test split ({', '.join(TEST)})")
    return count_duplicates(np.concatenate(train), np.concatenate(test))
