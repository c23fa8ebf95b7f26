"""Validating shards without decoding, against reading the same bytes and doing nothing with them, alternately.

    python scripts/benchmarks/bench_validate.py [--quick] [--rounds 5] [--samples 20000] [--out FILE]

Builds indexed shards of 40 KB images. Three passes take turns: reading every byte in one go (what the disk allows), validate with the
checksum of every member, and validate by headers, captions and image sizes alone; these in as many processes as there are cores, which
were started before. Each is timed cold, the pages of the shards having been dropped from memory, and warm.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import Row, Spread, alternate, arguments, ratio, record
from PIL import Image

from data_prep.records import Record
from data_prep.shards.serial import write_shards
from data_prep.validate.members import Checks
from data_prep.validate.shard import Examine
from mmpretrain.system import cores

REQUIRED = 0.8  # of the speed of reading: limited by the disk
BYTES = 40_000  # of an image, about that of a 500 x 375 JPEG


def build(folder: Path, samples: int) -> list[str]:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(out, "JPEG")
    image = out.getvalue()
    padding = np.random.default_rng(1).bytes(BYTES - len(image))  # readers stop at the end mark
    records = (Record(f"{i:08d}", {"jpg": image + padding, "txt": b"caption %d" % i}) for i in range(samples))
    write_shards(records, folder, max_count=1_000)
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
    parsed = arguments(__doc__, rounds=5, samples=0)
    samples = parsed.samples or (2_000 if parsed.quick else 20_000)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder, multiprocessing.Pool(cores()) as pool:
        names = build(Path(folder) / "shards", samples)
        megabytes = sum(os.path.getsize(name) for name in names) / 1e6

        def validate(checksums: bool) -> Callable[[list[str]], None]:
            examine = Examine(Checks(need=("image", "txt"), decode=False, checksums=checksums))

            def every(names: list[str]) -> None:
                if sum(report.good for report in pool.imap_unordered(examine, names)) != samples:
                    raise RuntimeError("validation finds damage in sound shards")

            return every

        def speed(run: Callable[[list[str]], None], cold: bool) -> float:
            drop(names) if cold else read(names)
            started = time.perf_counter()
            run(names)
            return megabytes / (time.perf_counter() - started)

        passes = {"read": read, "with checksums": validate(True), "headers and captions": validate(False)}
        for cold in (True, False):
            found = alternate({name: lambda run=run, cold=cold: speed(run, cold) for name, run in passes.items()}, parsed.rounds)
            for name in list(passes)[1:]:
                against = ratio(found[name], found["read"])
                rate = samples / megabytes * Spread.of(found[name]).median
                texts = f"{Spread.of(found[name])} MB/s, {rate:,.0f} samples/s", f"read: {Spread.of(found['read'])} MB/s"
                goal, met = (f"at least {REQUIRED} of reading", against.median >= REQUIRED) if cold else ("", None)
                title = f"validate --no-decode, {name}, {'cold' if cold else 'warm'}, {cores()} processes"
                record(parsed, Row(title, *texts, against, goal, met))


if __name__ == "__main__":
    main()
