"""Counter-based random numbers: a pure function of (seed, stream), the same on every rank, thread and device.

There is no generator state to save: a resumed run draws the same numbers as an uninterrupted one. The hash is
splitmix64's finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def stream(name: object) -> int:
    """Return a stable 63-bit number for a name: a digest of its repr (`hash()` is salted per process)."""
    return int.from_bytes(hashlib.blake2b(repr(name).encode(), digest_size=8).digest(), "big") >> 1


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64 >> keeps the sign: mask it off


def mix(x: Tensor) -> Tensor:
    """Hash int64 to int64; every input bit changes every output bit with probability one half."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def combine(*parts: int | Tensor) -> Tensor:
    """Fold numbers, broadcast together, into one int64 seed, such as (run seed, epoch, sample)."""
    seed = torch.zeros((), dtype=torch.int64)
    for part in parts:
        value = part if isinstance(part, Tensor) else torch.tensor(part, dtype=torch.int64)
        seed = mix(seed.to(value.device) * 3 + value + _GOLDEN)
    return seed


def bits(seeds: Tensor, name: object, *shape: int) -> Tensor:
    """Draw random int64 [B, *shape] from seeds int64 [B], one independent stream per `name`."""
    count = math.prod(shape)
    counter = torch.arange(count, device=seeds.device) * _GOLDEN
    base = mix(seeds ^ stream(name))
    return mix(mix(base[:, None] + counter) + _GOLDEN).reshape(len(seeds), *shape)


def uniform(seeds: Tensor, name: object, *shape: int) -> Tensor:
    """Draw float32 [B, *shape] in [0, 1), with 24 bits, from seeds int64 [B]."""
    return _shift(bits(seeds, name, *shape), 40).float() * 2.0**-24


def beta(seeds: Tensor, name: object, alpha: float, rounds: int = 32) -> Tensor:
    """Draw float32 [B] from Beta(alpha, alpha), 0 < alpha <= 1: the first accepted of `rounds` trials.

    A trial is accepted with probability 1/2 or more, so all of 32 are rejected with probability 2e-10; the last one is
    then used.

    Source: Johnk 1964.
    """
    u = uniform(seeds, ("beta", name), 2, rounds).double().clamp(min=2.0**-25) ** (1 / alpha)  # [B,2,rounds]
    total = u.sum(1)
    first = (total <= 1).int()
    first[:, -1] = 1
    index = first.argmax(1, keepdim=True)
    return (u[:, 0] / total).gather(1, index)[:, 0].float()


def normal(seeds: Tensor, name: object, *shape: int) -> Tensor:
    """Draw float32 [B, *shape] from the standard normal distribution (Box-Muller), from seeds int64 [B]."""
    u = uniform(seeds, ("normal", name), 2, *shape)
    return torch.sqrt(-2 * torch.log1p(-u[:, 0])) * torch.cos(2 * math.pi * u[:, 1])


def integers(seeds: Tensor, name: object, high: int, *shape: int) -> Tensor:
    """Draw int64 [B, *shape] in [0, high) from seeds int64 [B]."""
    return _shift(bits(seeds, name, *shape), 2) % high


def permutation(seed: int | Tensor, n: int) -> Tensor:
    """Draw a permutation of range(n), int64 [n], by sorting n hashed counters."""
    start = combine(seed, n)
    keys = mix(start + torch.arange(n) * _GOLDEN)
    return torch.argsort(keys, stable=True)
