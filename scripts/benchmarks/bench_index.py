"""Indexing shards that others built, against webdataset's own iteration over the same tars, alternately in one process.

    python scripts/benchmarks/bench_index.py [--samples 200000] [--rounds 5] [--quick]

Builds tars of small images and captions, reads each once so that both find them in memory, and checks that both see the same samples.
Ours scans the headers and saves nothing; the peer reads names and bytes, which is what its users do to count or to look for a key.
Prints samples/s of both, and their ratio.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import webdataset

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="5,000 samples, three rounds")
    arguments = parser.parse_args()
    samples, rounds = (5_000, 3) if arguments.quick else (arguments.samples, arguments.rounds)
    with tempfile.TemporaryDirectory() as folder:
        names = build(Path(folder), samples, 10_000)
        assert ours(names) == peer(names), "the two do not see the same samples"
        speeds: dict[str, list[float]] = {"ours": [], "webdataset": []}
        for _ in range(rounds):
            for name, read in (("ours", ours), ("webdataset", peer)):
                started = time.perf_counter()
                read(names)
                speeds[name].append(samples / (time.perf_counter() - started))
    for name, values in speeds.items():
        print(f"{name:>10}: {statistics.median(values):9,.0f} samples/s ({min(values):,.0f} to {max(values):,.0f})")
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["webdataset"])]
    print(f"     ratio: {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}); required: {REQUIRED:,} samples/s")


if __name__ == "__main__":
    main()
