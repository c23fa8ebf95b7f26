"""Serial builds of shards from records that one process makes in order; a repeated call keeps the finished shards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.files import local_folder, write_json
from data_prep.records import OutputError, Record, RecordError
from data_prep.shards.tar_writer import MANIFEST, SIZES, ShardFile, manifest_of, open_temporary
from mmpretrain.data import index as shard_index

UNFINISHED = "unfinished.json"


def _groups(records: Iterable[Record], max_count: int, max_bytes: int) -> Iterator[list[Record]]:
    seen: set[bytes] = set()
    group: list[Record] = []
    size = 0
    for record in records:
        record.check()
        digest = hashlib.blake2b(record.key.encode(), digest_size=12).digest()
        if digest in seen:
            raise RecordError(f"key {record.key!r} comes twice: keys must be unique over the whole data set")
        seen.add(digest)
        length = record.tar_bytes()
        if group and (len(group) >= max_count or size + length > max_bytes):
            yield group
            group, size = [], 0
        group.append(record)
        size += length
    if group:
        yield group


def _write(group: list[Record], path: Path) -> str:
    """Writes a shard and its index; returns its sha256."""
    file = ShardFile(open_temporary(path))
    try:
        for record in group:
            file.add(record)
        index, sha256 = file.close()
        shard_index.save(index, shard_index.index_path(path))
        os.replace(file.path, path)  # last: a shard at its final name is complete and indexed
        return sha256
    except BaseException:
        file.abandon()
        raise


def _same(group: list[Record], path: Path) -> bool:
    """Returns whether a finished shard holds exactly these samples."""
    index = shard_index.open_index(path, save_new=False)
    if index.checksum is None or index.keys != [record.key for record in group]:
        return False
    for sample, record in enumerate(group):
        members = index.members(sample)
        if members.keys() != record.members.keys() or not all(members[e].holds(data) for e, data in record.members.items()):
            return False
    return True


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shards(
    records: Iterable[Record],
    out: Path | str,
    *,
    max_count: int = 10_000,
    max_bytes: int = 1 << 30,
    command: str | None = None,
    licence: str | None = None,
) -> dict[str, Any]:
    """Writes `out`/00000.tar ..., an index beside each, sizes.json and manifest.json.

    The same records give the same bytes. A shard receives its final name once it is complete, so a killed build resumes:
    called again with the same records, it compares finished shards (keys, checksums) and keeps them. Anything else in
    `out` is refused, never overwritten.

    Args:
        records: the samples, in order.
        out: a local folder.
        max_count: samples per shard.
        max_bytes: bytes per shard, where `max_count` samples exceed it.
        command: the command line, for the manifest.
        licence: of the data, for the manifest.

    Returns:
        The manifest.

    Raises:
        RecordError: duplicate, dotted or unsafe keys.
        OptionError: `out` is a URL.
        OutputError: `out` holds something else.
    """
    out = local_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    ours = (out / MANIFEST).exists() or (out / UNFINISHED).exists()
    if not ours and any(out.iterdir()):
        raise OutputError(f"{out} is not empty and holds no build of ours. Choose another --out, or empty the folder.")
    if not (out / MANIFEST).exists():
        write_json(out / UNFINISHED, {"max_count": max_count, "max_bytes": max_bytes})
    for leftover in out.glob("*.tmp*"):
        leftover.unlink()
    shards: dict[str, dict[str, Any]] = {}
    members: dict[str, int] = {}
    for number, group in enumerate(_groups(records, max_count, max_bytes)):
        path = out / f"{number:05d}.tar"
        if not path.exists():
            if (out / MANIFEST).exists():
                raise OutputError(f"{out} holds a finished build with fewer samples than these inputs give. Choose another --out.")
            sha256 = _write(group, path)
        elif _same(group, path):
            sha256 = _sha256(path)
        else:
            raise OutputError(
                f"{path} exists and holds other samples than these inputs give. Choose another --out, or delete the old build."
            )
        shards[path.name] = {"count": len(group), "bytes": path.stat().st_size, "sha256": sha256}
        for record in group:
            for extension in record.members:
                members[extension] = members.get(extension, 0) + 1
    extra = sorted(p.name for p in out.glob("*.tar") if p.name not in shards)
    if extra:
        raise OutputError(f"{out} also holds {', '.join(extra[:3])}, which these inputs do not give. Choose another --out.")
    manifest = manifest_of(shards, members, command, licence)
    write_json(out / SIZES, {name: shard["count"] for name, shard in shards.items()})
    write_json(out / MANIFEST, manifest)
    (out / UNFINISHED).unlink(missing_ok=True)
    return manifest
