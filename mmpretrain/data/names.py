"""Shard names in order, and the counts stated beside them: a range of a million remote shards stays a range."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

_ENTRY = re.compile(rb'\s*"([^"\\]+)"\s*:\s*(\d+)\s*([,}])')


class Range(Sequence[str]):
    """HEAD + number + TAIL, for `length` numbers from `first`, padded to `width` digits."""

    def __init__(self, head: str, first: int, length: int, width: int, tail: str) -> None:
        self.head, self.first, self.length, self.width, self.tail = head, first, length, width, tail

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[str]: ...
    def __getitem__(self, at: int | slice) -> str | Sequence[str]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(self.length))]
        if not -self.length <= at < self.length:
            raise IndexError(at)
        return f"{self.head}{self.first + at % self.length:0{self.width}d}{self.tail}"

    def __iter__(self) -> Iterator[str]:
        return (f"{self.head}{n:0{self.width}d}{self.tail}" for n in range(self.first, self.first + self.length))


class Joined(Sequence[str]):
    """Several sequences of names as one."""

    def __init__(self, parts: Iterable[Sequence[str]]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends = list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[str]: ...
    def __getitem__(self, at: int | slice) -> str | Sequence[str]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        at %= len(self)
        part = bisect.bisect_right(self.ends, at)
        return self.parts[part][at - (self.ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.parts)


def in_order(data: bytes, names: Iterable[str]) -> list[int] | None:
    """The counts of a sizes.json that lists exactly these names (their last parts) in this order; None for any other text.

    Reads entry by entry: a dictionary of a million shards would take ten times the memory of the text.
    """
    at = len(data) - len(data.lstrip())
    if data[at : at + 1] != b"{":
        return None
    at, counts, more = at + 1, [], b","
    for name in names:
        entry = _ENTRY.match(data, at) if more == b"," else None
        if entry is None or entry[1] != name.rpartition("/")[2].encode():
            return None
        counts.append(int(entry[2]))
        at, more = entry.end(), entry[3]
    return counts if counts and more == b"}" and not data[at:].strip() else None
