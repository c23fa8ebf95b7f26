"""Shard readers: samples of local and remote shards by number, spans of samples, and their captions and images."""

from __future__ import annotations

import glob
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
    """A shard as a local file: the file itself, or a temporary copy of a remote shard and its index."""

    def __init__(self, name: str) -> None:
        """Fetches a remote shard. Raises ShardError where it cannot be fetched whole."""
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
        """Returns the text of an error, with the name of the shard in place of the copy's."""
        return str(error).replace(str(self.path), self.name)

    def close(self) -> None:
        self._copy.close()

    def __enter__(self) -> LocalCopy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Shard:
    """One shard: its index, and its samples by number. Pickled by name: the receiver opens it again.

    A saved index is used where it fits the file, else the headers are scanned; nothing is written beside the shard.
    """

    def __init__(self, name: str) -> None:
        """Opens the shard. Raises ShardError where it is not a tar, or contradicts an index that holds checksums."""
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
        """Reads a sample.

        Args:
            i: the number of the sample in the shard.
            extensions: the members to read, of those that the sample has; None: all.

        Raises:
            BadSample: a member is cut off or differs from its checksum.
        """
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
    """Expands a remote folder or glob to its shards; a remote file stays as it is."""
    names: list[str] = []
    for name in training_names.expand_braces(spec):
        if name.endswith(".tar") and "*" not in name:
            names.append(name)
            continue
        system, path = files.filesystem(name)
        pattern = path if "*" in path else f"{glob.escape(path.rstrip('/'))}/*.tar"
        matches = sorted(retried(lambda system=system, pattern=pattern: system.glob(pattern), name))
        if not matches:
            raise ShardError(f"{name}: no *.tar found. Give a folder that holds shards, a glob, or the shards' own URLs.")
        names += [system.unstrip_protocol(each) for each in matches]
    return names


def expand(specs: list[str]) -> list[str]:
    """Expands shard specs to names, in order: those of training (paths, folders, globs, braces, `::`), and remote folders and globs."""
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
    """Returns the extension of the image among a sample's members; None without one."""
    return image_extension(list(members))


def captions(record: Record, caption: str = "txt") -> list[str]:
    """A sample's captions from a member (`txt`) or from a field of its json (`json:caption`), cleaned as training does.

    Raises BadSample: missing_field, empty_caption, not_utf8, bad_json, bad_caption.
    """
    return Fields.of(record.members).captions(caption)


def pixels(data: bytes, limits: ImageLimits | None = None) -> Tensor:
    """Decodes an image file to uint8 [3,H,W], exactly as training does. Raises BadSample."""
    from mmpretrain.data import decode  # torch, which those that pass bytes through need not wait for

    return decode.decode_image(data, limits or decode.ImageLimits())


PIECE_BYTES = 64 << 20  # fetched at a time


class ShardRange:
    """A range of samples of a shard, numbered as in the shard.

    `file` holds the shard's bytes from offset `first` on. It is unnamed, so a killed worker leaves nothing behind.
    """

    def __init__(self, index: ShardIndex, file: IO[bytes], first: int = 0) -> None:
        self.index, self._file, self._first = index, file, first

    def __del__(self) -> None:
        self.close()

    def key(self, i: int) -> str:
        return self.index.keys[i]

    def read(self, i: int, extensions: Collection[str] | None = None) -> Record:
        """Reads a sample; see `Shard.read`."""
        members = {}
        for extension, member in self.index.members(i).items():
            if extensions is None or extension in extensions:
                members[extension] = read_at(self._file.fileno(), member.offset - self._first, member.size)
                if not member.holds(members[extension]):
                    raise BadSample("checksum", f"{extension}: the {member.size} bytes at {member.offset} are not those of the index")
        return Record(self.key(i), members)

    def close(self) -> None:
        self._file.close()


def _fetch_range(name: str, index: ShardIndex, start: int, stop: int) -> ShardRange:
    """Fetches samples `start` to `stop - 1` of a remote shard. Raises ShardError where that fails, or the index does not fit."""
    members = slice(int(index.starts[start]), int(index.starts[stop]))
    first = int(index.offset[members].min())
    end = int((index.offset[members] + index.size[members]).max())
    system, path = files.filesystem(name)
    num_bytes = retried(lambda: system.size(path), name)
    if num_bytes is not None and num_bytes != index.tar_bytes:
        raise ShardError(f"{name}: {num_bytes} bytes, but its index was made for {index.tar_bytes}. Index it again.")
    fetched = ShardRange(index, tempfile.TemporaryFile(), first)  # noqa: SIM115 (the range closes it)
    for low in range(first, end, PIECE_BYTES):
        high = min(low + PIECE_BYTES, end)
        fetched._file.write(retried(lambda low=low, high=high: system.cat_file(path, start=low, end=high), name))
    fetched._file.flush()
    return fetched


@lru_cache(maxsize=1)
def _fetch_whole(name: str, state: str) -> ShardRange:
    """Fetches a whole remote shard, and caches the last one: the next task of a worker is usually of the same shard.

    `state` identifies the version of the shard. Raises ShardError.
    """
    with LocalCopy(name) as copy:
        try:
            return ShardRange(open_index(copy.path, save_new=False), os.fdopen(os.open(copy.path, os.O_RDONLY), "rb"))
        except ShardError as error:
            raise ShardError(copy.explain(error)) from error


@contextmanager
def opened(name: str, start: int, stop: int) -> Iterator[Shard | ShardRange]:
    """Opens a shard for reading samples `start` to `stop - 1`. Raises ShardError."""
    if not is_remote(name):
        with Shard(name) as shard:
            yield shard
    elif (index := remote_index(name)) is None or stop - start == len(index):
        system, path = files.filesystem(name)
        yield _fetch_whole(name, retried(lambda: system.ukey(path), name))
    else:
        part = _fetch_range(name, index, start, stop)
        try:
            yield part
        finally:
            part.close()


class Place(NamedTuple):
    """Location of a sample: its number over all shards, its shard, and its index in that shard."""

    sample: int
    shard: str
    index: int


SPAN = 500  # samples of a task


@dataclass(frozen=True)
class Span:
    """Samples `start` to `stop - 1` of a shard; `stop` None: to the end."""

    name: str
    start: int = 0
    stop: int | None = None


def spans(names: list[str]) -> Iterator[Span]:
    """Divides shards into spans: a remote shard is one, so that it is fetched once; local ones are split to occupy all cores."""
    for name in names:
        if is_remote(name):
            yield Span(name)
            continue
        with Shard(name) as shard:
            for start in range(0, max(len(shard), 1), SPAN):
                yield Span(name, start, min(start + SPAN, len(shard)))


def damage_lines(shard: Shard) -> list[str]:
    """Returns a line per unreadable region or member of a shard, for a report."""
    regions = [f"{shard.name} at byte {d.offset}: {d.reason}: {d.detail}; about {d.lost} samples lost" for d in shard.index.damage]
    return regions + [f"{shard.name} at byte {m.offset}: {m.reason}: {m}" for m in shard.index.left_out or ()]
