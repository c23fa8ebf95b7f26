"""Write samples to shards: byte-reproducible, atomic, resumable, with an index that holds every member's sha256."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmpretrain.data import index as shard_index
from mmpretrain.data.schema import SAFE_KEY, ShardError

MANIFEST, SIZES, UNFINISHED = "manifest.json", "sizes.json", "unfinished.json"


@dataclass(frozen=True)
class Record:
    """One sample: a key without dots, and its members' bytes by extension ("jpg", "txt", "cls", "json")."""

    key: str
    members: dict[str, bytes]


def _check(record: Record, seen: set[bytes]) -> None:
    if len(record.key) > 200 or not SAFE_KEY.fullmatch(record.key):
        raise ValueError(
            f"key {record.key!r}: expected at most 200 letters, digits, _ and -, with / between folders. "
            "A dot would begin the extension; other characters are unsafe in paths."
        )
    if not record.members:
        raise ValueError(f"key {record.key!r} has no members")
    for extension in record.members:
        if not extension or extension != extension.lower() or "/" in extension or "\0" in extension:
            raise ValueError(f"key {record.key!r}: {extension!r} is not an extension (lower case, no slash)")
    digest = hashlib.blake2b(record.key.encode(), digest_size=12).digest()
    if digest in seen:
        raise ValueError(f"key {record.key!r} comes twice: keys must be unique over the whole data set")
    seen.add(digest)


def _groups(records: Iterable[Record], max_count: int, max_bytes: int) -> Iterator[list[Record]]:
    seen: set[bytes] = set()
    group: list[Record] = []
    size = 0
    for record in records:
        _check(record, seen)
        length = sum(len(data) + 1024 for data in record.members.values())
        if group and (len(group) >= max_count or size + length > max_bytes):
            yield group
            group, size = [], 0
        group.append(record)
        size += length
    if group:
        yield group


def _write_tar(group: list[Record], path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for record in group:
                for extension in sorted(record.members):
                    info = tarfile.TarInfo(f"{record.key}.{extension}")  # mtime, uid, gid 0: the bytes depend on the content alone
                    info.size, info.mode = len(record.members[extension]), 0o644
                    tar.addfile(info, io.BytesIO(record.members[extension]))
        file.flush()
        os.fsync(file.fileno())
    index = shard_index.scan(temporary)
    digests = [hashlib.sha256(record.members[e]).digest() for record in group for e in sorted(record.members)]
    index.sha256 = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    if index.keys != [record.key for record in group] or len(index.offset) != len(digests) or index.damage:
        raise ShardError(f"{temporary}: the written shard does not read back as it was meant. Is the disk sound?")
    shard_index.save(index, shard_index.index_path(path))
    os.replace(temporary, path)  # last: a shard at its final name is whole, and has its index


def _same(group: list[Record], path: Path) -> bool:
    """Does the finished shard hold exactly these samples?"""
    index = shard_index.open_index(path, save_new=False)
    if index.sha256 is None or index.keys != [record.key for record in group]:
        return False
    for sample, record in enumerate(group):
        found = {extension: member.sha256 for extension, member in index.members(sample).items()}
        if found != {extension: hashlib.sha256(data).digest() for extension, data in record.members.items()}:
            return False
    return True


def write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


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
    """Write `out`/00000.tar ..., an index beside each, sizes.json and manifest.json; returns the manifest.

    The same records give the same bytes. A shard takes its final name when it is whole, so a killed build resumes: run it again with the
    same records, and finished shards are compared (keys and sha256) and kept. Anything else found in `out` is refused, never overwritten.

    Raises ValueError for duplicate, dotted or unsafe keys; FileExistsError where `out` holds something else.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    ours = (out / MANIFEST).exists() or (out / UNFINISHED).exists()
    if not ours and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty and holds no build of ours. Choose another --out, or empty the folder.")
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
                raise FileExistsError(f"{out} holds a finished build with fewer samples than these inputs give. Choose another --out.")
            _write_tar(group, path)
        elif not _same(group, path):
            raise FileExistsError(
                f"{path} exists and holds other samples than these inputs give. Choose another --out, or delete the old build."
            )
        shards[path.name] = {"count": len(group), "bytes": path.stat().st_size, "sha256": _sha256(path)}
        for record in group:
            for extension in record.members:
                members[extension] = members.get(extension, 0) + 1
    extra = sorted(p.name for p in out.glob("*.tar") if p.name not in shards)
    if extra:
        raise FileExistsError(f"{out} also holds {', '.join(extra[:3])}, which these inputs do not give. Choose another --out.")
    manifest = {
        "format": "webdataset",
        "version": shard_index.VERSION,
        "command": command,
        "licence": licence,
        "num_samples": sum(shard["count"] for shard in shards.values()),
        "members": dict(sorted(members.items())),
        "shards": shards,
    }
    write_json(out / SIZES, {name: shard["count"] for name, shard in shards.items()})
    write_json(out / MANIFEST, manifest)
    (out / UNFINISHED).unlink(missing_ok=True)
    return manifest
