"""Values of other ranges -> 0 to 255."""

from __future__ import annotations

from functools import cache

import numpy as np


@cache
def _table(highest: int) -> np.ndarray:
    """uint8 [highest + 1], rounded to the nearest."""
    values = np.arange(highest + 1, dtype=np.int64)
    return ((values * 510 + highest) // (2 * highest)).astype(np.uint8)


def eight_bit(values: np.ndarray, highest: int) -> np.ndarray:
    """Unsigned integers of at most 16 bits, 0 to `highest`, -> uint8 of the same shape; larger ones are white."""
    table = _table(highest)
    return table[np.minimum(values, highest) if highest < 65535 else values]


def eight_bit_of_range(values: np.ndarray) -> np.ndarray:
    """Signed or wide integers or floats, which state no range, -> uint8, by the range the values show.

    Floats in 0..1 are fractions; anything within 0..65535 is 16 bit; else the image's own minimum and maximum become 0 and 255.
    """
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low >= 0 and high <= 1:
        scaled = values * 255
    elif low >= 0 and high <= 255:
        scaled = values
    elif low >= 0 and high <= 65535:
        scaled = values / 257
    else:
        scaled = (values - low) / max(high - low, 1e-12) * 255
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
