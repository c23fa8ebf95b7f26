"""Some samples of a remote shard: their bytes alone are fetched, where the index beside it says which."""

from __future__ import annotations

import tempfile
from collections.abc import Collection

from data_prep import files
from data_prep.records import Record
from data_prep.samples import Shard
from mmpretrain.data.cache import remote_index, retried
from mmpretrain.data.index import ShardIndex
from mmpretrain.data.names import is_remote
from mmpretrain.data.schema import BadSample, ShardError
from mmpretrain.data.tar import read_at

PIECE = 64 << 20  # bytes held at once


class ShardRange:
    """Samples `start` to `stop - 1` of a shard, under the numbers that they have in it."""

    def __init__(self, name: str, index: ShardIndex, start: int, stop: int) -> None:
        """Raises ShardError where they cannot be fetched, or the shard is not that of the index."""
        self.index = index
        members = slice(int(index.starts[start]), int(index.starts[stop]))
        first = self._first = int(index.offset[members].min())
        end = int((index.offset[members] + index.size[members]).max())
        system, path = files.filesystem(name)
        found = retried(lambda: system.size(path), name)
        if found is not None and found != index.tar_bytes:
            raise ShardError(f"{name}: {found} bytes, but its index was made of {index.tar_bytes}. Index it again.")
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (close closes it)
        for low in range(first, end, PIECE):
            high = min(low + PIECE, end)
            self._file.write(retried(lambda low=low, high=high: system.cat_file(path, start=low, end=high), name))
        self._file.flush()

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


def opened(name: str, start: int, stop: int) -> Shard | ShardRange:
    """A ShardRange, or a Shard where it is local, has no index beside it, or is wanted whole. Raises ShardError."""
    index = remote_index(name) if is_remote(name) else None
    if index is None or stop - start == len(index):
        return Shard(name)
    return ShardRange(name, index, start, stop)
