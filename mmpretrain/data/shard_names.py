"""Expansion of shard specs to names, in order. A range of a million remote shards is kept as a range."""

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
MAX_MATERIALISED = 10_000  # names kept as a list; more are kept as ranges
MAX_NAMES = 10_000_000  # names of a spec; more are taken for a typing error
_ENTRY = re.compile(rb'\s*"([^"\\]+)"\s*:\s*(\d+)\s*([,}])')


class Range(Sequence[str]):
    """HEAD + number + TAIL, for `length` numbers from `first`, padded to `width` digits."""

    def __init__(self, head: str, first: int, length: int, width: int, tail: str) -> None:
        self.head, self.first, self.length, self.width, self.tail = head, first, length, width, tail

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.length))]
        if not -self.length <= index < self.length:
            raise IndexError(index)
        return f"{self.head}{self.first + index % self.length:0{self.width}d}{self.tail}"

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
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        part = bisect.bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.parts)


def in_order(data: bytes, names: Iterable[str]) -> list[int] | None:
    """Read the counts of a sizes.json that lists exactly these names (their last parts) in this order; None for any other text.

    It is read entry by entry: a dictionary of a million shards would take ten times the memory of the text.
    """
    offset = len(data) - len(data.lstrip())
    if data[offset : offset + 1] != b"{":
        return None
    offset, counts, more = offset + 1, [], b","
    for name in names:
        entry = _ENTRY.match(data, offset) if more == b"," else None
        if entry is None or entry[1] != name.rpartition("/")[2].encode():
            return None
        counts.append(int(entry[2]))
        offset, more = entry.end(), entry[3]
    return counts if counts and more == b"}" and not data[offset:].strip() else None


def is_remote(name: str) -> bool:
    """Return whether a name is a URL of another kind than file://."""
    return "://" in name and not name.startswith("file://")


def _padding(first: str, last: str) -> int:
    """Return the width to which a range pads its numbers, as in bash and webdataset: `{00..10}` pads, `{0..10}` does not."""
    padded = any(number.startswith("0") and number != "0" for number in (first, last))
    return max(len(first), len(last)) if padded else 0


def _count_names(text: str) -> int:
    """Count the names that the braces of `text` stand for without expanding them, from the innermost braces outwards."""

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
    """Raise ShardError for braces that stand for more than MAX_NAMES names."""
    count = _count_names(text)
    if count > MAX_NAMES:
        number = f"{count:,}" if count < 10**18 else "over 10^18"
        raise ShardError(
            f"{text[:200]}: its braces stand for {number} names, more than {MAX_NAMES:,}. Give the range of the existing shards."
        )


def expand_braces(text: str) -> list[str]:
    """Expand the braces of `text` as bash and webdataset do (webdataset calls `braceexpand` too).

    `a{00..02}.tar` is three names, padded as written; `{a,b}` are alternatives; braces may be nested. Braces that hold
    neither a range nor alternatives, unbalanced braces, numbers of more than 18 digits, and backslashes are kept,
    because file names may contain them.

    Raises:
        ShardError: more than `MAX_NAMES` names.
    """
    if _TOO_LONG.search(text):
        return [text]
    _check_count(text)
    try:
        return list(braceexpand(text, escape=False))
    except (UnbalancedBracesError, RecursionError):
        return [text]


def _range(spec: str) -> Range | None:
    """Return a remote spec with one ascending brace range, and nothing else to expand, as a Range; None for others."""
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
    """Return the folders at the start of a path that exist under this very name, with their slash: their characters are no pattern."""
    end = 0
    while (slash := spec.find("/", end)) >= 0 and (slash == 0 or os.path.isdir(spec[:slash])):
        end = slash + 1
    return spec[:end]


def _expand_one(spec: str) -> Sequence[str]:
    if os.path.isfile(spec):  # literal names first: a path may contain # ? [ or {
        return [spec]
    if spec.startswith("pipe:"):
        raise ShardError(
            f"{spec!r}: pipe: runs a shell command, which a recipe may not. Give the URL itself: fsspec opens s3://, gs://, https:// ..."
        )
    if os.path.isdir(spec):
        matches = sorted(glob.glob(os.path.join(glob.escape(spec), "*.tar")))
        if not matches:
            raise ShardError(f"{spec}: a folder without *.tar. Give the folder that holds the shards.")
        return matches
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
        globbed = (glob.glob(glob.escape(folder) + pattern, recursive=True) for pattern in patterns)
        matches = sorted(next(filter(None, globbed), []))
        if not matches:
            parent = os.path.dirname(name) or "."
            there = sorted(os.listdir(parent))[:5] if os.path.isdir(parent) else None
            holds = f"{parent} holds {', '.join(there) or 'nothing'}" if there is not None else f"there is no folder {parent}"
            raise ShardError(f"{name}: no such shard ({holds}). Check the name, and the folder it is relative to.")
        names += matches
    return names


def expand(spec: str | list[str]) -> Sequence[str]:
    """Expand a shard spec to paths and URLs in order.

    Args:
        spec: a path, folder, glob or brace range; several joined by `::`, or a list of these.

    Raises:
        ShardError: a spec names no shard, or more than `MAX_NAMES`.
    """
    specs = [spec] if isinstance(spec, str) else list(spec)
    parts = [_expand_one(part) for item in specs for part in ([item] if os.path.exists(item) else item.split("::")) if part]
    names = Joined(parts)
    if not names:
        raise ShardError(f"shards: {spec!r} names no shard")
    return list(names) if len(names) <= MAX_MATERIALISED else names
