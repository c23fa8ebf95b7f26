"""Read shards, local or remote, sample by sample: what `stats`, `filter`, `dedup` and `validate` are made of."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import IO, TYPE_CHECKING, NamedTuple

from data_prep import files
from data_prep.records import Record
from mmpretrain.data import shard_names as training_names
from mmpretrain.data.cache import remote_index, retried
from mmpretrain.data.fields import Fields
from mmpretrain.data.index import SUFFIX, ShardIndex, index_path, open_index
from mmpretrain.data.schema import BadSample, ShardError, image_extension
from mmpretrain.data.shard_names import is_remote
from mmpretrain.data.tar import read_at

if TYPE_CHECKING:
    from torch import Tensor

    from mmpretrain.data.decode import ImageLimits

__all__ = ["LocalCopy", "Shard", "captions", "expand", "image_member", "pixels"]


class LocalCopy:
    """A shard as a local file: itself, or a temporary copy of a remote one with the index that lies beside it."""

    def __init__(self, name: str) -> None:
        """Raises ShardError where a remote shard cannot be fetched whole."""
        self.name = name
        self._copy = ExitStack()
        try:
            self.path = self._copy.enter_context(files.local(name))
            if is_remote(name) and files.exists(name + SUFFIX):
                index_path(self.path).write_bytes(files.read_bytes(name + SUFFIX))
        except BaseException:
            self.close()
            raise

    def explain(self, error: Exception) -> str:
        """An error's text, with the shard's own name in place of the copy's."""
        return str(error).replace(str(self.path), self.name)

    def close(self) -> None:
        self._copy.close()

    def __enter__(self) -> LocalCopy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Shard:
    """One shard: its index, and its samples by number. Pickles as its name: the receiver opens it again.

    A saved index is used where it fits the file, else the headers are scanned; nothing is written beside the shard.
    """

    def __init__(self, name: str) -> None:
        """Raises ShardError where the shard is no tar, or contradicts an index that holds checksums."""
        self.name = name
        self._file = -1
        self._copy = LocalCopy(name)
        try:
            self.index: ShardIndex = open_index(self._copy.path, save_new=False)
            self._file = os.open(self._copy.path, os.O_RDONLY)
        except BaseException as error:
            self._copy.close()
            if isinstance(error, ShardError):
                raise ShardError(self._copy.explain(error)) from error
            raise

    def __len__(self) -> int:
        return len(self.index)

    def key(self, i: int) -> str:
        return self.index.keys[i]

    def read(self, i: int, extensions: Collection[str] | None = None) -> Record:
        """Sample `i`, with those of `extensions` that it has, or all. Raises BadSample (cut, checksum)."""
        members = {}
        for extension, member in self.index.members(i).items():
            if extensions is not None and extension not in extensions:
                continue
            data = read_at(self._file, member.offset, member.size)
            if not member.holds(data):
                raise BadSample("checksum", f"{extension}: the {member.size} bytes at {member.offset} are not those of the index")
            members[extension] = data
        return Record(self.key(i), members)

    def __iter__(self) -> Iterator[Record]:
        return (self.read(i) for i in range(len(self)))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._copy.close()

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_copy"):
            self.close()

    def __reduce__(self) -> tuple[type[Shard], tuple[str]]:
        return Shard, (self.name,)


def _remote(spec: str) -> list[str]:
    """The shards of a remote folder or glob; a remote file is itself."""
    found: list[str] = []
    for name in training_names.expand_braces(spec):
        if name.endswith(".tar") and "*" not in name:
            found.append(name)
            continue
        system, path = files.filesystem(name)
        pattern = path if "*" in path else f"{path.rstrip('/')}/*.tar"
        there = sorted(retried(lambda system=system, pattern=pattern: system.glob(pattern), name))
        if not there:
            raise ShardError(f"{name}: no *.tar there. Give a folder that holds shards, a glob, or the shards' own URLs.")
        found += [system.unstrip_protocol(each) for each in there]
    return found


def expand(specs: list[str]) -> list[str]:
    """Shard specs -> names in order: as training's (paths, folders, globs, brace ranges, `::`), also remote folders and globs."""
    names: list[str] = []
    for spec in specs:
        if spec.startswith("file://"):
            names += training_names.expand(spec.removeprefix("file://"))
        elif is_remote(spec) and "::" not in spec:
            names += _remote(spec)
        else:
            names += training_names.expand(spec)
    if not names:
        raise ShardError("no shards were named")
    return names


def image_member(members: Collection[str]) -> str | None:
    """The extension of a sample's image, or None."""
    return image_extension(list(members))


def captions(record: Record, caption: str = "txt") -> list[str]:
    """A sample's captions from a member (`txt`) or from a field of its json (`json:caption`), cleaned as training does.

    Raises BadSample: missing_field, empty_caption, not_utf8, bad_json, bad_caption.
    """
    return Fields.of(record.members).captions(caption)


def pixels(data: bytes, limits: ImageLimits | None = None) -> Tensor:
    """An image file -> uint8 [3,H,W], exactly as training decodes it. Raises BadSample."""
    from mmpretrain.data import decode  # torch, which those that pass bytes through need not wait for

    return decode.decode_image(data, limits or decode.ImageLimits())


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


class Place(NamedTuple):
    """One sample: its number over all shards, its shard, and its number there."""

    sample: int
    shard: str
    index: int


SPAN = 500  # samples of a task


@dataclass(frozen=True)
class Span:
    """Some samples of a shard; `stop` None: all of them."""

    name: str
    start: int = 0
    stop: int | None = None


def spans(names: list[str]) -> Iterator[Span]:
    """A remote shard is one task, so that it is fetched once; a local one is divided, so that few shards keep all cores busy."""
    for name in names:
        if is_remote(name):
            yield Span(name)
            continue
        with Shard(name) as shard:
            for start in range(0, max(len(shard), 1), SPAN):
                yield Span(name, start, min(start + SPAN, len(shard)))


def damage_lines(shard: Shard) -> list[str]:
    """What of a shard cannot be read at all, for a report."""
    return [f"{shard.name} at byte {d.offset}: {d.reason}: {d.detail}; about {d.lost} samples lost" for d in shard.index.damage]
