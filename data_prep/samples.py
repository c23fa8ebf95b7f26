"""Read shards, local or remote, sample by sample: what `stats`, `filter`, `dedup` and `validate` are made of."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from data_prep import files
from data_prep.records import Record
from mmpretrain.data import shard_names as training_names
from mmpretrain.data.cache import retried
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
    from mmpretrain.data import decode  # torch, which those that pass bytes through need not wait for

    extension, _, name = caption.partition(":")
    if extension not in record.members:
        raise BadSample("missing_field", f"{extension}; it has {', '.join(sorted(record.members))}")
    if not name:
        return [decode.decode_text(record.members[extension])]
    fields = decode.decode_json(record.members[extension])
    if name not in fields:
        raise BadSample("missing_field", f"{caption}; it has {', '.join(sorted(fields))[:200]}")
    return decode.captions_from(fields[name], caption)


def pixels(data: bytes, limits: ImageLimits | None = None) -> Tensor:
    """An image file -> uint8 [3,H,W], exactly as training decodes it. Raises BadSample."""
    from mmpretrain.data import decode

    return decode.decode_image(data, limits or decode.ImageLimits())
