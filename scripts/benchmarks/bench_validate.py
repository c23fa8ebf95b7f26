"""Validating shards without decoding, against reading the same bytes and doing nothing with them, alternately in one process.

    python scripts/benchmarks/bench_validate.py [--samples 20000] [--rounds 5] [--quick]

Builds indexed shards of 40 KB images. Three passes take turns: reading every byte (what the disk allows), validate with the sha256 of
every member, and validate by headers, captions and image sizes alone. Each is timed cold, the pages of the shards having been dropped
from memory, and warm. Prints MB/s of each, and what part of the reading speed validation reaches.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.validate_members import Checks
from data_prep.validate_shard import Examine
from data_prep.writer import Record, write_shards

BYTES = 40_000  # of an image, about that of a 500 x 375 JPEG


def build(folder: Path, samples: int) -> list[str]:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(out, "JPEG")
    image = out.getvalue()
    padding = np.random.default_rng(1).bytes(BYTES - len(image))  # readers stop at the end mark
    records = (Record(f"{i:08d}", {"jpg": image + padding, "txt": b"caption %d" % i}) for i in range(samples))
    write_shards(records, folder, max_count=2_000)
    return sorted(map(str, folder.glob("*.tar")))


def drop(names: list[str]) -> None:
    for name in names:
        file = os.open(name, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def read(names: list[str]) -> None:
    buffer = bytearray(1 << 22)
    for name in names:
        with open(name, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="1,000 samples, three rounds")
    arguments = parser.parse_args()
    samples, rounds = (1_000, 3) if arguments.quick else (arguments.samples, arguments.rounds)

    def validate(checksums: bool) -> Callable[[list[str]], None]:
        examine = Examine(Checks(need=("image", "txt"), decode=False, checksums=checksums))

        def each(names: list[str]) -> None:
            assert sum(examine(name).good for name in names) == samples, "validation finds damage in sound shards"

        return each

    passes = {"read": read, "sha256": validate(True), "headers": validate(False)}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        names = build(Path(folder) / "shards", samples)
        megabytes = sum(os.path.getsize(name) for name in names) / 1e6
        for cold in (True, False):
            speeds: dict[str, list[float]] = {name: [] for name in passes}
            for _ in range(rounds):
                for name, run in passes.items():
                    drop(names) if cold else read(names)
                    started = time.perf_counter()
                    run(names)
                    speeds[name].append(megabytes / (time.perf_counter() - started))
            print(f"{'cold' if cold else 'warm'}, {samples:,} samples, {megabytes:,.0f} MB, one process")
            for name, values in speeds.items():
                ratios = [a / b for a, b in zip(values, speeds["read"])]
                spread = f"{statistics.median(ratios):.2f} of reading ({min(ratios):.2f} to {max(ratios):.2f})"
                rate = statistics.median(values) / megabytes * samples
                print(f"{name:>10}: {statistics.median(values):8,.0f} MB/s, {rate:9,.0f} samples/s, {spread}")


if __name__ == "__main__":
    main()
