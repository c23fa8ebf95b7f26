"""Division of samples by the hash of their keys, the same in a source, an evaluator and `data_prep build`. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def is_held_out(content: bytes, holdout: float) -> bool:
    """Return whether content belongs to the held-out share `holdout`, 0 to 1; a larger share contains a smaller one."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=4).digest()) < holdout * 2.0**32


def in_part(keys: Sequence[str], holdout: float, part: str) -> np.ndarray:
    """Return which keys belong to a part ("train" or "holdout"), bool [n]. Resharding and further samples do not change it."""
    held = np.array([is_held_out(key.rsplit("~", 1)[0].encode("utf-8", "surrogateescape"), holdout) for key in keys], bool)
    return held if part == "holdout" else ~held
