"""Some samples of a remote shard: their bytes alone are fetched, where the index beside it says which; else the shard, once per worker."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import IO

from data_prep import files
from data_prep.records import Record
from data_prep.samples import LocalCopy, Shard
from mmpretrain.data.cache import remote_index, retried
from mmpretrain.data.index import ShardIndex, open_index
from mmpretrain.data.schema import BadSample, ShardError
from mmpretrain.data.shard_names import is_remote
from mmpretrain.data.tar import read_at

PIECE = 64 << 20  # bytes held at once


class ShardRange:
    """Samples of a shard, under the numbers that they have in it. `file` holds its bytes from `first` on, under no name: a killed worker
    leaves nothing behind."""

    def __init__(self, index: ShardIndex, file: IO[bytes], first: int = 0) -> None:
        self.index, self._file, self._first = index, file, first

    def __del__(self) -> None:
        self.close()

    def key(self, i: int) -> str:
        return self.index.keys[i]

    def read(self, i: int, extensions: Collection[str] | None = None) -> Record:
        """See Shard.read."""
        found = {}
        for extension, member in self.index.members(i).items():
            if extensions is None or extension in extensions:
                found[extension] = read_at(self._file.fileno(), member.offset - self._first, member.size)
                if not member.holds(found[extension]):
                    raise BadSample("checksum", f"{extension}: the {member.size} bytes at {member.offset} are not those of the index")
        return Record(self.key(i), found)

    def close(self) -> None:
        self._file.close()


def _part(name: str, index: ShardIndex, start: int, stop: int) -> ShardRange:
    """Raises ShardError where the bytes cannot be fetched, or the shard is not that of the index."""
    members = slice(int(index.starts[start]), int(index.starts[stop]))
    first = int(index.offset[members].min())
    end = int((index.offset[members] + index.size[members]).max())
    system, path = files.filesystem(name)
    found = retried(lambda: system.size(path), name)
    if found is not None and found != index.tar_bytes:
        raise ShardError(f"{name}: {found} bytes, but its index was made of {index.tar_bytes}. Index it again.")
    fetched = ShardRange(index, tempfile.TemporaryFile(), first)  # noqa: SIM115 (the range closes it)
    for low in range(first, end, PIECE):
        high = min(low + PIECE, end)
        fetched._file.write(retried(lambda low=low, high=high: system.cat_file(path, start=low, end=high), name))
    fetched._file.flush()
    return fetched


@lru_cache(maxsize=1)
def _whole(name: str, state: str) -> ShardRange:
    """The last one: a worker's next task is mostly of the same shard. `state`: another where it has changed. Raises ShardError."""
    with LocalCopy(name) as copy:
        try:
            return ShardRange(open_index(copy.path, save_new=False), os.fdopen(os.open(copy.path, os.O_RDONLY), "rb"))
        except ShardError as error:
            raise ShardError(copy.explain(error)) from error


@contextmanager
def opened(name: str, start: int, stop: int) -> Iterator[Shard | ShardRange]:
    """A shard to read samples `start` to `stop - 1` of. Raises ShardError."""
    if not is_remote(name):
        with Shard(name) as shard:
            yield shard
    elif (index := remote_index(name)) is None or stop - start == len(index):
        system, path = files.filesystem(name)
        yield _whole(name, retried(lambda: system.ukey(path), name))
    else:
        part = _part(name, index, start, stop)
        try:
            yield part
        finally:
            part.close()
