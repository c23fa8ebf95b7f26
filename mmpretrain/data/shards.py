"""Named shards -> their samples' bytes: specs are expanded, indexes opened, files read by position."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mmpretrain.data.cache import ShardCache, is_remote, remote_index, stated_counts
from mmpretrain.data.index import Damage, Member, ShardIndex, open_index
from mmpretrain.data.names import Joined, Range
from mmpretrain.data.order import Recent, in_part
from mmpretrain.data.schema import BadSample, ShardError

_BRACE = re.compile(r"\{([^{}]*)\}")
LISTED = 10_000  # more names than these are not written out


def expand_braces(text: str) -> list[str]:
    """`a{00..02}.tar` -> three names, padded as written; `{a,b}` -> alternatives; anything else in braces is literal."""
    for match in _BRACE.finditer(text):
        inner = match.group(1)
        span = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
        if span:
            first, last = span.groups()
            width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
            options = [str(n).zfill(width) for n in range(int(first), int(last) + 1)]
        elif "," in inner:
            options = inner.split(",")
        else:
            continue
        head, tail = text[: match.start()], text[match.end() :]
        return [head + option + rest for option in options for rest in expand_braces(tail)]
    return [text]


def _range(spec: str) -> Range | None:
    """A remote spec of one brace range and nothing else to expand."""
    spans = [match for match in _BRACE.finditer(spec) if re.fullmatch(r"\d+\.\.\d+", match[1]) or "," in match[1]]
    if not is_remote(spec) or len(spans) != 1 or "," in spans[0][1]:
        return None
    first, last = spans[0][1].split("..")
    width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
    return Range(spec[: spans[0].start()], int(first), max(0, int(last) - int(first) + 1), width, spec[spans[0].end() :])


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
    for name in expand_braces(spec):
        if is_remote(name) or os.path.isfile(name):
            names.append(name)
            continue
        found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []
        if not found:
            folder = os.path.dirname(name) or "."
            there = sorted(os.listdir(folder))[:5] if os.path.isdir(folder) else None
            holds = f"{folder} holds {', '.join(there) or 'nothing'}" if there is not None else f"there is no folder {folder}"
            raise ShardError(f"{name}: no such shard ({holds}). Check `shards:` in the recipe.")
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


def read_at(file: int, offset: int, size: int) -> bytes:
    """`size` bytes of an open file. pread rather than mmap: a file cut while it is read gives a short read, not a bus error."""
    parts, at, left = [], offset, size
    while left and (part := os.pread(file, left, at)):
        parts.append(part)
        at, left = at + len(part), left - len(part)
    if left:
        raise BadSample("cut", f"{left} of {size} bytes missing at byte {at}")
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Open:
    """An open shard: its index and a file to read from by position, which threads may share."""

    def __init__(self, path: str, index: ShardIndex, chosen: np.ndarray | None) -> None:
        self.path, self.index, self.chosen = path, index, chosen
        self._file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def read(self, member: Member, verify: bool) -> bytes:
        data = read_at(self._file, member.offset, member.size)
        if verify and member.sha256 is not None and hashlib.sha256(data).digest() != member.sha256:
            raise BadSample("checksum", f"the {member.size} bytes at {member.offset} are not those that the index was written for")
        return data


class ShardSet:
    """The shards of one component of a source.

    Opening checks every local shard (indexing those that have no index), so that trouble shows at start. `counts` [S] are the samples of
    each that belong to `split`. Indexes and files are opened again as the order needs them, and the least recently used are let go.
    """

    def __init__(self, spec: str | list[str], split: tuple[float, str] | None, window: int, cache: ShardCache, verify: bool) -> None:
        self.names = expand(spec)
        self._split, self._cache, self._verify = split, cache, verify
        self._stated = stated_counts(self.names)
        self._opened = Recent(self._open, max(64, 2 * window + 8))
        self.damage: list[tuple[str, Damage]] = []
        self.duplicates = 0
        self.found: dict[str, int] = {}  # extension -> samples that have it, over the shards looked at
        self.looked_at = 0  # samples in them
        counts = self._stated.copy()
        # A million remote shards are not opened one by one where their counts are stated.
        trusted = np.fromiter((is_remote(name) for name in self.names), bool, len(self.names))
        self.remote = bool(trusted.any())
        trusted &= (counts >= 0) if split is None else False
        with ThreadPoolExecutor(min(8, len(self.names)), thread_name_prefix="preflight") as pool:
            looked_at = np.flatnonzero(~trusted).tolist()
            for shard, (count, index) in zip(looked_at, pool.map(self._survey, looked_at)):
                counts[shard] = count
                self.damage += [(self.names[shard], damage) for damage in index.damage]
                self.duplicates += index.duplicates
                self.looked_at += len(index)
                for extension, number in index.counts().items():
                    self.found[extension] = self.found.get(extension, 0) + number
        self.counts = counts

    def _index(self, shard: int, path: str | None = None) -> ShardIndex:
        name = self.names[shard]
        stated = int(self._stated[shard]) if self._stated[shard] >= 0 else None
        if not is_remote(name):
            return open_index(name, stated, cache=self._cache.indexes)
        index = remote_index(name)
        if index is None and path is not None:
            index = open_index(path, stated)
        if index is None:
            raise ShardError(
                f"{name}: a remote shard needs its index, or a sizes.json beside it, before the first read. "
                f"Run `python -m data_prep index '{name}'` on a copy and upload what it writes."
            )
        return index

    def _survey(self, shard: int) -> tuple[int, ShardIndex]:
        index = self._index(shard)
        return len(index) if self._split is None else int(in_part(index.keys, *self._split).sum()), index

    def _open(self, shard: int) -> _Open:
        name = self.names[shard]
        path = self._cache.fetch(name) if is_remote(name) else name
        index = self._index(shard, path)
        chosen = None if self._split is None else np.flatnonzero(in_part(index.keys, *self._split))
        found = len(index) if chosen is None else len(chosen)
        if hasattr(self, "counts") and found != self.counts[shard]:
            raise ShardError(
                f"{name}: {found} samples, but {int(self.counts[shard])} when the run began. Shards must not change during a run."
            )
        return _Open(path, index, chosen)

    def members(self, shard: int, sample: int) -> tuple[str, dict[str, Member], _Open]:
        """(key, extension -> place, the open shard) of a sample of the split."""
        opened = self._opened(shard)
        at = sample if opened.chosen is None else int(opened.chosen[sample])
        return opened.index.keys[at], opened.index.members(at), opened

    def read(self, opened: _Open, member: Member) -> bytes:
        return opened.read(member, self._verify)

    def read_ahead(self, shards: list[int]) -> None:
        """Start fetching the remote shards that come next."""
        self._cache.read_ahead([self.names[shard] for shard in shards if is_remote(self.names[shard])])

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(zip(self.names, self.counts.tolist()))


def shard_label(name: str) -> str:
    """A shard's name in sample keys and logs: the last folder and the file."""
    return "/".join(Path(name).parts[-2:])


def load_classes(value: list[str] | str | None) -> list[str] | None:
    """Class names from a list, or from a file: one a line, or a JSON list."""
    if value is None or not isinstance(value, str):
        return None if value is None else list(value)
    text = Path(value).read_text(encoding="utf-8")
    names = json.loads(text) if value.endswith(".json") else text.splitlines()
    return [name.strip() for name in names if name.strip()]
