"""The checksum of a member in an index: XXH3 of 128 bits, which finds damage at the speed of memory.

It is no proof against forgery, and need not be: whoever can change a shard can change the index beside it. For that, `manifest.json` holds
the sha256 of every shard, which `sha256sum` compares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import xxhash

BYTES = 16
# By their length, so that an index tells by itself what it holds; the first versions of the builder took sha256.
_KINDS: dict[int, Callable[[Any], bytes]] = {BYTES: xxhash.xxh3_128_digest, 32: lambda data: hashlib.sha256(data).digest()}


def checksum(data: bytes | memoryview, length: int = BYTES) -> bytes:
    """The checksum of that length in bytes. Raises KeyError for a length that is none."""
    return _KINDS[length](data)


def known(length: int) -> bool:
    return length in _KINDS
