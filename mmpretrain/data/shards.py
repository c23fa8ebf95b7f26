"""Sets of shards: indexes are opened, and members read by position."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mmpretrain.config.build import OptionError
from mmpretrain.data.cache import ShardCache, remote_index, stated_counts
from mmpretrain.data.formats import read_json, read_text
from mmpretrain.data.holdout import in_part
from mmpretrain.data.index import Damage, LeftOut, Member, ShardIndex, open_index
from mmpretrain.data.order import Recent
from mmpretrain.data.schema import BadSample, ShardError
from mmpretrain.data.shard_names import expand, is_remote
from mmpretrain.data.tar import read_at


class _Open:
    """An open shard: its index, and a file to read from by position, which threads may share."""

    def __init__(self, path: str, index: ShardIndex, chosen: np.ndarray | None) -> None:
        self.path, self.index, self.chosen = path, index, chosen
        self._file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def read(self, member: Member, verify: bool) -> bytes:
        data = read_at(self._file, member.offset, member.size)
        if verify and not member.holds(data):
            raise BadSample("checksum", f"the {member.size} bytes at {member.offset} are not those that the index was written for")
        return data


class ShardSet:
    """The shards of one component of a source.

    The constructor checks every local shard, and indexes those without an index, so that problems show at the start.
    `counts` [S] are the samples of each shard that belong to `split`. Indexes and files are opened again as the order
    needs them; the most recently used remain open.

    Args:
        spec: see `expand`.
        split: (held-out share, part); None: all samples.
        window: shards whose samples are mixed.
        cache: of remote shards.
        verify: compare members with their checksums.

    Raises:
        ShardError: a shard cannot be used.
    """

    def __init__(self, spec: str | list[str], split: tuple[float, str] | None, window: int, cache: ShardCache, verify: bool) -> None:
        self.names = expand(spec)
        self._split, self._cache, self._verify = split, cache, verify
        self._stated = stated_counts(self.names)
        self._opened = Recent(self._open, window + 8)
        self.damage: list[tuple[str, Damage]] = []
        self.left_out: list[tuple[str, LeftOut]] = []  # (shard, member that cannot be read)
        self.duplicates = 0
        self.extension_counts: dict[str, int] = {}  # extension -> samples that have it, in the opened shards
        self.looked_at = 0  # samples in the opened shards
        counts = self._stated.copy()
        # Remote shards with stated counts are not opened: there may be a million.
        trusted = np.fromiter((is_remote(name) for name in self.names), bool, len(self.names))
        self.remote = bool(trusted.any())
        trusted &= (counts >= 0) if split is None else False
        with ThreadPoolExecutor(min(8, len(self.names)), thread_name_prefix="preflight") as pool:
            looked_at = np.flatnonzero(~trusted).tolist()
            for shard, (count, index) in zip(looked_at, pool.map(self._survey, looked_at)):
                counts[shard] = count
                self.damage += [(self.names[shard], damage) for damage in index.damage]
                self.left_out += [(self.names[shard], member) for member in index.left_out or ()]
                self.duplicates += index.duplicates
                self.looked_at += len(index)
                for extension, number in index.counts().items():
                    self.extension_counts[extension] = self.extension_counts.get(extension, 0) + number
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
        count = len(index) if chosen is None else len(chosen)
        if hasattr(self, "counts") and count != self.counts[shard]:
            raise ShardError(
                f"{name}: {count} samples, but {int(self.counts[shard])} when the run began. Shards must not change during a run."
            )
        return _Open(path, index, chosen)

    def members(self, shard: int, sample: int) -> tuple[str, dict[str, Member], _Open]:
        """Return (key, extension -> location, open shard) of a sample of the split."""
        opened = self._opened(shard)
        index = sample if opened.chosen is None else int(opened.chosen[sample])
        return opened.index.keys[index], opened.index.members(index), opened

    def read(self, opened: _Open, member: Member) -> bytes:
        """Read a member of an open shard. Raises BadSample."""
        return opened.read(member, self._verify)

    def read_ahead(self, shards: list[int]) -> None:
        """Start to fetch the remote ones of these shards."""
        self._cache.read_ahead([self.names[shard] for shard in shards if is_remote(self.names[shard])])

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(zip(self.names, self.counts.tolist()))


@functools.lru_cache(1024)
def shard_label(name: str) -> str:
    """Return a shard's name for sample keys and logs: the last folder and the file."""
    return "/".join(Path(name).parts[-2:])


def load_classes(value: list[str] | str | None) -> list[str] | None:
    """Return class names from a list, or from a file with one per line or a JSON list. Raises FileError or OptionError."""
    if value is None or not isinstance(value, str):
        return None if value is None else list(value)
    names = read_json(value) if value.endswith(".json") else read_text(value).splitlines()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise OptionError(f"{value}: expected a list of class names, found {str(names)[:60]!r}")
    return [name.strip() for name in names if name.strip()]
