"""The writer of one shard: the tar, its sha256, and its index with a checksum per member, in a single pass.

The bytes are those of `tarfile` in its pax format with mtime, uid and gid 0, so they depend on the content alone.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.records import Record
from mmpretrain.data import index as shard_index
from mmpretrain.data.index import BYTES, checksum

MANIFEST, SIZES = "manifest.json", "sizes.json"
BLOCK, RECORD = 512, 10_240  # a tar ends with two zero blocks and fills its last record
BATCH_BYTES, BATCH_PARTS = 1 << 20, 900  # of one write; writev accepts at most 1,024 parts
SYNC_BYTES = 16 << 20  # synced to disk in the background, so that `close` does not wait for a whole shard
USTAR_BYTES = 8**11  # a larger member needs a pax header


# name 100 | mode 8, uid 8, gid 8 | size 12 | mtime 12 | checksum 8 | type 1, link name 100, magic 8, and 247 of users, devices, prefix
_OWNER = b"0000644\0" + 2 * b"0000000\0"
_REST = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
_MTIME = b"00000000000\0"
_FIXED_SUM = sum(_OWNER) + sum(_REST) + sum(_MTIME) + 8 * ord(" ")  # the checksum counts its own field as spaces


def header(name: str, size: int) -> bytes:
    """Builds the header block of a member, preceded by pax blocks where the name is long or not ASCII, or the member is large."""
    raw = name.encode("utf-8", "surrogateescape")
    if len(raw) > 100 or not name.isascii() or size >= USTAR_BYTES:
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    length = b"%011o\0" % size
    total = _FIXED_SUM + sum(raw) + sum(length)
    return b"".join((raw.ljust(100, b"\0"), _OWNER, length, _MTIME, b"%06o\0 " % total, _REST))


class ShardFile:
    """A shard being written to `path`, a local file. `add` records, then `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.bytes = 0
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115 (close closes it)
        self._hash = hashlib.sha256()
        self._synced = 0
        self._syncing: threading.Thread | None = None
        self._sync_error: OSError | None = None
        self._batch: list[bytes] = []
        self._batched = 0
        self._keys: list[str] = []
        self._starts = [0]
        self._extensions: list[str] = []
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._digests = bytearray()

    def add(self, record: Record) -> None:
        """Adds a record, its members sorted by extension."""
        for extension in sorted(record.members):
            data = record.members[extension]
            size = len(data)
            head = header(f"{record.key}.{extension}", size)
            pad = -size % BLOCK
            self._extensions.append(extension)
            self._offsets.append(self.bytes + len(head))
            self._sizes.append(size)
            self._digests += checksum(data)
            self._batch += (head, data, bytes(pad))
            self.bytes += len(head) + size + pad
            self._batched += len(head) + size + pad
            if self._batched >= BATCH_BYTES or len(self._batch) >= BATCH_PARTS:
                self._flush()
        self._keys.append(record.key)
        self._starts.append(len(self._sizes))
        self.count += 1

    def _flush(self) -> None:
        for part in self._batch:
            self._hash.update(part)
        written = os.writev(self._file.fileno(), self._batch)
        if written < self._batched:  # the next write reports a full disk
            rest = memoryview(b"".join(self._batch))[written:]
            while len(rest):
                rest = rest[self._file.write(rest) :]
        self._batch, self._batched = [], 0
        if self.bytes - self._synced > SYNC_BYTES and not (self._syncing and self._syncing.is_alive()):
            self._synced = self.bytes
            self._syncing = threading.Thread(target=self._sync)
            self._syncing.start()

    def _sync(self) -> None:
        try:
            os.fdatasync(self._file.fileno())
        except OSError as error:  # the kernel reports it once
            self._sync_error = error

    def _join(self) -> None:
        if self._syncing is not None:
            self._syncing.join()

    def close(self) -> tuple[shard_index.ShardIndex, str]:
        """Ends the tar and syncs it to disk; returns (index, sha256 of the file)."""
        tail = 2 * BLOCK + -(self.bytes + 2 * BLOCK) % RECORD
        self._batch.append(bytes(tail))
        self._batched += tail
        self.bytes += tail
        self._flush()
        self._join()
        if self._sync_error is not None:
            raise self._sync_error
        os.fsync(self._file.fileno())
        self._file.close()
        extensions = sorted(set(self._extensions))
        number = {extension: i for i, extension in enumerate(extensions)}
        index = shard_index.ShardIndex(
            keys=self._keys,
            extensions=extensions,
            starts=np.array(self._starts, np.int64),
            extension=np.array([number[extension] for extension in self._extensions], np.uint16),
            offset=np.array(self._offsets, np.int64),
            size=np.array(self._sizes, np.int64),
            tar_bytes=self.bytes,
            checksum=np.frombuffer(bytes(self._digests), np.uint8).reshape(-1, BYTES),
        )
        return index, self._hash.hexdigest()

    def abandon(self) -> None:
        """Closes and deletes the unfinished file."""
        self._join()
        self._file.close()
        self.path.unlink(missing_ok=True)


def open_temporary(path: Path) -> Path:
    """Creates an empty file with a unique name beside `path`, readable by all, as the shard will be.

    `write_atomically` does not serve here: a shard is written record by record, and takes its name after its index has.
    """
    handle, temporary = tempfile.mkstemp(prefix=path.name + ".tmp-", dir=path.parent)
    os.close(handle)
    os.chmod(temporary, 0o644)
    return Path(temporary)


def manifest_of(
    shards: dict[str, dict[str, Any]], members: dict[str, int], command: str | None, licence: str | None, **more: object
) -> dict[str, Any]:
    """Returns the content of manifest.json; `shards` is name -> count, bytes, sha256, and `members` extension -> count."""
    return {
        "format": "webdataset",
        "version": shard_index.VERSION,
        "command": command,
        "licence": licence,
        "num_samples": sum(shard["count"] for shard in shards.values()),
        "members": dict(sorted(members.items())),
        **more,
        "shards": shards,
    }
