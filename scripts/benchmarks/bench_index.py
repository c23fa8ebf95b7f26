"""Indexing shards that others built, against webdataset's own iteration over the same tars, alternately in one process.

    python scripts/benchmarks/bench_index.py [--quick] [--rounds 5] [--samples 200000] [--out FILE]

Builds tars of small images and captions, reads each once so that both find them in memory, and checks that both see the same samples.
Ours scans the headers and saves nothing; the peer reads names and bytes, which is what its users do to count or to look for a key.
"""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import webdataset
from common import Row, Spread, alternate, arguments, formatted, ratio, record

from mmpretrain.data.index import scan

REQUIRED = 100_000  # samples/s


def build(folder: Path, samples: int, per_shard: int) -> list[str]:
    names = []
    for start in range(0, samples, per_shard):
        names.append(str(folder / f"{start // per_shard:05d}.tar"))
        with tarfile.open(names[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(start, min(start + per_shard, samples)):
                for extension, data in (("jpg", b"\xff\xd8\xff" + bytes(2000)), ("txt", b"a caption of a few words")):
                    info = tarfile.TarInfo(f"{i:08d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return names


def ours(names: list[str]) -> list[str]:
    return [key for name in names for key in scan(name).keys]


def peer(names: list[str]) -> list[str]:
    # The tars are fed as urls, opened, and their members grouped by key: webdataset's reading without decoding.
    files = webdataset.tariterators.url_opener({"url": name} for name in names)
    members = webdataset.tariterators.tar_file_expander(files)
    return [sample["__key__"] for sample in webdataset.tariterators.group_by_keys(members)]


def main() -> None:
    parsed = arguments(__doc__, rounds=5, samples=0)
    samples = parsed.samples or (5_000 if parsed.quick else 200_000)
    with tempfile.TemporaryDirectory() as folder:
        names = build(Path(folder), samples, 10_000)
        if ours(names) != peer(names):
            raise RuntimeError("the two do not see the same samples: the comparison would mean nothing")

        def speed(read: Callable[[list[str]], list[str]]) -> float:
            started = time.perf_counter()
            read(names)
            return samples / (time.perf_counter() - started)

        found = alternate({read.__name__: lambda read=read: speed(read) for read in (ours, peer)}, parsed.rounds)
    rates = {name: Spread.of(values) for name, values in found.items()}
    met = rates["ours"].median >= REQUIRED
    texts = formatted(found["ours"], found["peer"], "samples/s")
    goal = f"at least {REQUIRED:,} samples/s"
    record(parsed, Row("index, foreign shards in memory, one process", *texts, ratio(found["ours"], found["peer"]), goal, met))


if __name__ == "__main__":
    main()
