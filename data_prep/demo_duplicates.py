"""Does a test scene of the demo occur in training? Exactly (sha256 of the pixels) or nearly (perceptual hash and pixel difference)."""

from __future__ import annotations

import hashlib
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image

from data_prep.demo_baselines import read_split

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
