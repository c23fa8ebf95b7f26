"""Shard specs -> names in order, and the counts stated beside them. A range of a million remote shards stays a range."""

from __future__ import annotations

import bisect
import glob
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from braceexpand import UnbalancedBracesError, braceexpand  # pyright: ignore[reportAttributeAccessIssue] (not in its stubs)

from mmpretrain.data.schema import ShardError

_BRACE = re.compile(r"\{([^{}]*)\}")
_SPAN = re.compile(r"(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.-?(\d{1,18}))?")
_LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z](?:\.\.-?\d{1,18})?")
_TOO_LONG = re.compile(r"\{(?=[^{}]*\d{19})[^{},]*\.\.[^{},]*\}")  # a range with a number of more than 18 digits
_COUNTED = re.compile("\0(\\d+)\0")
LISTED = 10_000  # more names than these are not written out
MOST = 10_000_000  # more names than these are a slip of the hand
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


def is_remote(name: str) -> bool:
    return "://" in name and not name.startswith("file://")


def _padding(first: str, last: str) -> int:
    """The width that a range pads its numbers to, as in bash and webdataset: `{00..10}` pads, `{0..10}` does not."""
    padded = any(number.startswith("0") and number != "0" for number in (first, last))
    return max(len(first), len(last)) if padded else 0


def _count_names(text: str) -> int:
    """The number of names that the braces of `text` stand for, without making them: from the innermost braces outwards."""

    def product(part: str) -> int:
        return math.prod(int(count) for count in _COUNTED.findall(part))

    def counted(match: re.Match[str]) -> str:
        inner = match[1]
        if span := _SPAN.fullmatch(inner):
            count = abs(int(span[2]) - int(span[1])) // (int(span[3] or 1) or 1) + 1
        elif _LETTERS.fullmatch(inner):
            count = len(list(braceexpand(match[0])))
        else:
            count = sum(map(product, inner.split(",")))
        return f"\0{count}\0"

    replaced = 1
    while replaced:
        text, replaced = _BRACE.subn(counted, text)
    return product(text)


def _check_count(text: str) -> None:
    """Raise ShardError for braces that stand for more names than anybody means."""
    count = _count_names(text)
    if count > MOST:
        number = f"{count:,}" if count < 10**18 else "over 10^18"
        raise ShardError(f"{text[:200]}: its braces stand for {number} names, more than {MOST:,}. Give the range of the shards there are.")


def expand_braces(text: str) -> list[str]:
    """Names that the braces of `text` stand for, as bash and webdataset read them (both call `braceexpand`).

    `a{00..02}.tar` is three names, padded as written; `{a,b}` are alternatives; braces may be nested. Braces that hold neither a range nor
    alternatives, unbalanced braces, numbers of more than 18 digits, and backslashes stay as they are, because file names may contain them.

    Raises:
        ShardError: for more than `MOST` names.
    """
    if _TOO_LONG.search(text):
        return [text]
    _check_count(text)
    try:
        return list(braceexpand(text, escape=False))
    except (UnbalancedBracesError, RecursionError):
        return [text]


def _range(spec: str) -> Range | None:
    """A remote spec of one ascending brace range and nothing else to expand."""
    groups = list(_BRACE.finditer(spec))
    spans = [group for group in groups if "," in group[1] or ".." in group[1]]
    if not is_remote(spec) or len(spans) != 1 or "{" in (rest := _BRACE.sub("", spec)) or "}" in rest:
        return None
    span = _SPAN.fullmatch(spans[0][1])
    if span is None or span[3] or "-" in span[0] or int(span[2]) < int(span[1]):
        return None
    _check_count(spec)
    first, last = span[1], span[2]
    head, tail = spec[: spans[0].start()], spec[spans[0].end() :]
    return Range(head, int(first), int(last) - int(first) + 1, _padding(first, last), tail)


def _literal_folder(spec: str) -> str:
    """The folders at the start of a path that exist under the very name, with their slash: characters in them choose nothing."""
    end = 0
    while (slash := spec.find("/", end)) >= 0 and (slash == 0 or os.path.isdir(spec[:slash])):
        end = slash + 1
    return spec[:end]


def _expand_one(spec: str) -> Sequence[str]:
    if os.path.isfile(spec):  # literal first: a path may contain # ? [ or {
        return [spec]
    if spec.startswith("pipe:"):
        raise ShardError(
            f"{spec!r}: pipe: runs a shell command, which a recipe may not. Give the URL itself: fsspec opens s3://, gs://, https:// ..."
        )
    if os.path.isdir(spec):
        found = sorted(glob.glob(os.path.join(glob.escape(spec), "*.tar")))
        if not found:
            raise ShardError(f"{spec}: a folder without *.tar. Give the folder that holds the shards.")
        return found
    if (span := _range(spec)) is not None:
        return span
    names: list[str] = []
    folder = "" if is_remote(spec) else _literal_folder(spec)
    for tail in expand_braces(spec[len(folder) :]):
        name = folder + tail
        if is_remote(name) or os.path.isfile(name):
            names.append(name)
            continue
        patterns = (tail, tail.replace("[", "[[]")) if glob.has_magic(tail) else ()  # brackets as choices, or else as themselves
        matches = (glob.glob(glob.escape(folder) + pattern, recursive=True) for pattern in patterns)
        found = sorted(next(filter(None, matches), []))
        if not found:
            parent = os.path.dirname(name) or "."
            there = sorted(os.listdir(parent))[:5] if os.path.isdir(parent) else None
            holds = f"{parent} holds {', '.join(there) or 'nothing'}" if there is not None else f"there is no folder {parent}"
            raise ShardError(f"{name}: no such shard ({holds}). Check the name, and the folder it is relative to.")
        names += found
    return names


def expand(spec: str | list[str]) -> Sequence[str]:
    """A shard spec -> paths and URLs in order: literal paths, folders, globs, brace ranges, and several joined with `::` or in a list."""
    specs = [spec] if isinstance(spec, str) else list(spec)
    parts = [_expand_one(part) for item in specs for part in ([item] if os.path.exists(item) else item.split("::")) if part]
    names = Joined(parts)
    if not names:
        raise ShardError(f"shards: {spec!r} names no shard")
    return list(names) if len(names) <= LISTED else names
