"""Sample counts in files beside shards: sizes.json, __len__, _info.json, manifest.json, img2dataset's _stats.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from data_prep import files
from data_prep.validate.kinds import Finding
from mmpretrain.data.schema import ShardError


@dataclass(frozen=True)
class Stated:
    """The sample count that `file` states of `shard` ("" for the whole folder)."""

    file: str
    shard: str
    count: int


def _sizes(data: bytes) -> dict[str, int]:
    return {name: _count(count) for name, count in json.loads(data).items()}


def _manifest(data: bytes) -> dict[str, int]:
    return {name: _count(shard["count"]) for name, shard in json.loads(data)["shards"].items()}


def _info(data: bytes) -> dict[str, int]:
    """Parses the format of timm: {"splits": {"train": {"filenames": [...], "shard_lengths": [...], "num_samples": n}}}."""
    counts = {}
    for split in json.loads(data)["splits"].values():
        if "filenames" in split and "shard_lengths" in split:
            counts |= dict(zip(split["filenames"], map(_count, split["shard_lengths"]), strict=True))
    return counts


def _total(data: bytes) -> dict[str, int]:
    return {"": _count(int(data))}


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


FILES: dict[str, Callable[[bytes], dict[str, int]]] = {
    "sizes.json": _sizes,
    "manifest.json": _manifest,
    "_info.json": _info,
    "__len__": _total,
}


def stated(folder: str, shards: list[str]) -> tuple[list[Stated], list[Finding]]:
    """Reads the counts that the files of a folder state of its shards (base names), and the findings of unreadable files."""
    counts: list[Stated] = []
    findings: list[Finding] = []

    def read(name: str, parse: Callable[[bytes], dict[str, int]]) -> None:
        place = files.join(folder, name)
        try:
            counts.extend(Stated(place, shard, count) for shard, count in parse(files.read_bytes(place)).items())
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            findings.append(Finding(place, "", -1, "bad_count_file", f"{type(error).__name__}: {error}"[:300]))

    for name, parse in FILES.items():
        read(name, parse)
    for shard in shards:
        stats = shard.removesuffix(".tar") + "_stats.json"
        read(stats, lambda data, shard=shard: {shard: _count(json.loads(data)["successes"])})
    return counts, findings


def compare(folder: str, counts: dict[str, int]) -> tuple[dict[str, int], Iterator[Finding]]:
    """Compares the samples of a folder's shards with the stated counts.

    Args:
        folder: of the shards.
        counts: base name -> samples in the shard.

    Returns:
        (stated counts by base name, findings of disagreements).
    """
    entries, unreadable = stated(folder, list(counts))
    known = {}
    for entry in entries:
        known.setdefault(entry.shard, entry.count)

    def findings() -> Iterator[Finding]:
        yield from unreadable
        try:
            tars = {name.rpartition("/")[2] for name in files.listing(folder) if name.endswith(".tar")}
        except (ShardError, OSError):
            tars = set(counts)
        for entry in entries:
            shard = files.join(folder, entry.shard) if entry.shard else folder
            if entry.shard in counts and counts[entry.shard] != entry.count:
                detail = f"{entry.file} says {entry.count} samples, there are {counts[entry.shard]}"
                yield Finding(shard, "", -1, "count_disagrees", detail)
            elif not entry.shard and tars <= counts.keys() and sum(counts.values()) != entry.count:
                yield Finding(
                    shard, "", -1, "count_disagrees", f"{entry.file} says {entry.count} samples, there are {sum(counts.values())}"
                )
            elif entry.shard and entry.shard not in counts and entry.shard not in tars:
                yield Finding(shard, "", -1, "missing_shard", f"{entry.file} says that it has {entry.count} samples; it is not there")

    return known, findings()
