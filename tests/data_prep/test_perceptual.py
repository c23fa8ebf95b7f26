"""The one perceptual hash: of `dedup`, `stats` and the demo's checks."""

import numpy as np
from PIL import Image

from data_prep.perceptual import pairs_within, signature


def picture(seed: int, side: int, gain: float = 1.0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 220, (6, 6, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), float)
    return (image * gain).astype(np.uint8)


def bits_apart(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.bitwise_count(signature(a)["hash"] ^ signature(b)["hash"]))


def test_a_perceptual_hash_ignores_size_and_brightness_and_tells_pictures_apart() -> None:
    assert bits_apart(picture(1, 256), picture(1, 96, 0.8)) <= 4
    assert bits_apart(picture(1, 64), picture(2, 64)) > 12


def test_a_flat_picture_has_no_hash_of_its_noise() -> None:
    flat = np.full((50, 50, 3), 120, np.uint8)
    assert signature(flat)["hash"] == 0
    assert signature(flat + np.random.default_rng(0).integers(0, 2, flat.shape, np.uint8))["hash"] == 0


def test_pairs_within_a_distance_are_those_of_all_comparisons() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 63, 60, np.uint64)
    flipped = [int(value) ^ sum(1 << int(bit) for bit in rng.choice(64, 1 + i % 14, replace=False)) for i, value in enumerate(hashes)]
    hashes = np.concatenate([hashes, np.array(flipped, np.uint64)])
    found = {tuple(pair) for pairs in pairs_within(hashes, 10) for pair in pairs.tolist()}
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= 10
    assert found == {(i, j) for i, j in zip(*np.nonzero(near)) if i < j}
