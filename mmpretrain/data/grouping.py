"""Member names -> samples: members of one key belong together, wherever a writer put them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmpretrain.data.schema import split_name


@dataclass
class Grouping:
    """Samples in order of first appearance. M members belong to them; `member` says which of the names each is."""

    keys: list[str]
    extensions: list[str]  # the distinct ones
    starts: np.ndarray  # int64 [S+1] into the members
    extension: np.ndarray  # uint16 or uint32 [M] into `extensions`
    member: np.ndarray  # int64 [M] into the names
    duplicates: int  # keys that came again; each is a sample of its own, with ~2, ~3 ... after the key


def group(names: Sequence[str]) -> Grouping:
    """Under a microsecond a name: shards are indexed when they are first opened."""
    numbers: dict[str, int] = {}  # extension -> its number
    spelt: dict[str, int] = {}  # the same as names spell it; none holds a slash
    samples: dict[str, int] = {}  # key -> its number
    of: list[int] = []  # [M] samples
    kinds: list[int] = []  # [M] extensions
    left_out: list[int] = []
    for i, name in enumerate(names):
        key, _, extension = name.partition(".")
        number = spelt.get(extension)
        if number is None or key[-1:] in ("", "/"):
            named = split_name(name)
            if named is None:
                left_out.append(i)
                continue
            key, lower = named
            number = numbers.setdefault(lower, len(numbers))
            if "/" not in extension:
                spelt[extension] = number
        of.append(samples.setdefault(key, len(samples)))
        kinds.append(number)
    sample, kind = np.array(of, np.int64), np.array(kinds, np.int64)
    keys, duplicates = list(samples), 0
    if len(np.unique(sample * max(len(numbers), 1) + kind)) < len(sample):
        keys, sample, duplicates = _apart(keys, of, kinds)
    member = np.delete(np.arange(len(names)), left_out)
    if (np.diff(sample) < 0).any():  # interleaved
        order = np.argsort(sample, kind="stable")
        sample, kind, member = sample[order], kind[order], member[order]
    extensions = sorted(numbers)
    place = np.zeros(len(numbers), np.uint16 if len(extensions) <= 1 << 16 else np.uint32)  # keys with dots may make one of every member
    place[[numbers[extension] for extension in extensions]] = np.arange(len(extensions))
    starts = np.concatenate([[0], np.cumsum(np.bincount(sample, minlength=len(keys)))]).astype(np.int64)
    return Grouping(keys, extensions, starts, place[kind], member, duplicates)


def _apart(keys: list[str], of: list[int], kinds: list[int]) -> tuple[list[str], np.ndarray, int]:
    """Where a sample would have a member twice, another begins: (keys, [M] samples, how many keys came again)."""
    current: dict[int, int] = {}
    times = [0] * len(keys)
    named: list[str] = []
    seen: list[set[int]] = []
    samples = np.zeros(len(of), np.int64)
    for i, (key, kind) in enumerate(zip(of, kinds)):
        at = current.get(key)
        if at is None or kind in seen[at]:
            times[key] += 1
            current[key] = at = len(named)
            named.append(keys[key] if times[key] == 1 else f"{keys[key]}~{times[key]}")
            seen.append(set())
        seen[at].add(kind)
        samples[i] = at
    return named, samples, len(named) - len(keys)
