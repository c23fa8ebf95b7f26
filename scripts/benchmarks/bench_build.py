"""Shards from a folder of JPEGs: `build folder` against a plain loop over webdataset.ShardWriter, and against `cp` of the shards' bytes.

    python scripts/benchmarks/bench_build.py [--quick] [--rounds 5] [--images 20000] [--width 420] [--memory 200000] [--out FILE]

Ours and the peer are whole programs, from the start of the interpreter; the time of the peer's loop alone, without its imports, is a row of
its own, still against our whole program. Ours also takes a checksum of every member and the sha256 of every shard, writes indexes and waits
for the disk (fsync), which the peer does not; the copy, of four shards of the same bytes, is waited for as ours is. The files read lie
in memory. What is reached for is the lower of three times the peer's rate and 80% of the copy's. Beforehand the members of both are
compared: the same bytes. Memory is that of the command and its workers, pages that they share counted once.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common import ROOT, Row, Spread, alternate, arguments, measured, ratio, record
from pictures import jpeg, picture

PEER = """
import sys, time
from pathlib import Path
import webdataset
folder, out, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
out.mkdir()
started = time.perf_counter()
with webdataset.ShardWriter(str(out / "%05d.tar"), maxcount=count, verbose=0) as sink:
    for path in sorted(folder.rglob("*.jpg")):
        sink.write({"__key__": path.stem, "jpg": path.read_bytes()})
print("SECONDS", time.perf_counter() - started)
"""


def folder_of(images: int, files: list[bytes], place: Path) -> int:
    """`images` files in folders of a thousand; gives their bytes."""
    for i in range(images):
        if i % 1000 == 0:
            (place / f"{i // 1000:04d}").mkdir(parents=True)
        (place / f"{i // 1000:04d}" / f"{i:07d}.jpg").write_bytes(files[i % len(files)])
    return sum(len(files[i % len(files)]) for i in range(images))


@dataclass
class Kinds:
    """The three programs over the same images; each gives its seconds."""

    source: Path
    work: Path
    count: int  # images per shard
    loops: list[float] = field(default_factory=list)  # the peer's, without its imports

    def ours(self, out: Path) -> float:
        command = [sys.executable, "-m", "data_prep", "build", "folder", self.source, "--out", out, "--max-count", self.count]
        return _seconds([*command, "--processes", 2])[0]

    def peer(self, out: Path) -> float:
        seconds, output = _seconds([sys.executable, "-c", PEER, self.source, out, self.count])
        self.loops.append(float(output.split("SECONDS")[1]))
        return seconds

    def copy(self, out: Path) -> float:
        shards = self.work / "shards"
        if not shards.exists():
            self.ours(shards)
        out.mkdir()
        copied = _seconds(["cp", *sorted(shards.glob("*.tar")), out])[0]
        return copied + _seconds(["sync", *sorted(out.iterdir())])[0]


def _seconds(command: Sequence[object]) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run([str(word) for word in command], cwd=ROOT, check=True, capture_output=True, text=True)
    return time.perf_counter() - started, done.stdout


def contents(out: Path) -> list[bytes]:
    found = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(member).read() for member in tar]  # type: ignore[union-attr]
    return found


def check_same_work(source: Path, work: Path) -> None:
    kinds = Kinds(source, work, 100)
    kinds.ours(work / "ours")
    kinds.peer(work / "peer")
    if contents(work / "ours") != contents(work / "peer"):
        raise RuntimeError("the shards hold different images: the comparison would mean nothing")


def peak_mb(images: int, count: int, files: list[bytes], work: Path) -> float:
    """Of a build of `images` in shards of `count`."""
    source, out = work / f"tiny-{images}", work / f"out-{images}"
    folder_of(images, files, source)
    command = [sys.executable, "-m", "data_prep", "build", "folder", str(source), "--out", str(out), "--max-count", str(count)]
    found = measured([*command, "--processes", "2"], tree_every=2)  # the small build is over in two seconds
    if json.loads((out / "manifest.json").read_text())["num_samples"] != images:
        raise RuntimeError(f"{images} images in, another number out")
    shutil.rmtree(source)
    shutil.rmtree(out)
    return found.tree_mb


def main() -> None:
    parsed = arguments(__doc__, rounds=5, images=0, width=420, memory=0, folder="")
    images, memory = parsed.images or (1000 if parsed.quick else 20_000), parsed.memory or (20_000 if parsed.quick else 200_000)
    with tempfile.TemporaryDirectory(dir=parsed.folder or None) as name:
        work = Path(name)
        files = [jpeg(picture(parsed.width, parsed.width * 3 // 4, seed)) for seed in range(16 if parsed.quick else 64)]
        small = work / "small"
        folder_of(300, files, small)
        check_same_work(small, work)
        size = folder_of(images, files, work / "source")
        print(f"{images} JPEGs, {size / images / 1000:.1f} KB each", flush=True)

        kinds = Kinds(work / "source", work, max(1, images // 4))

        def run(kind: Callable[[Path], float]) -> float:
            seconds = kind(work / "out")
            shutil.rmtree(work / "out")
            print(f"{kind.__name__}: {seconds:.2f} s, {images / seconds:,.0f} images/s, {size / seconds / 1e6:,.0f} MB/s", flush=True)
            return images / seconds

        kinds.copy(work / "first")  # makes the shards that are copied
        os.sync()  # what was prepared is on the disk before anything is timed
        found = alternate({kind.__name__: lambda kind=kind: run(kind) for kind in (kinds.ours, kinds.peer, kinds.copy)}, parsed.rounds)
        found["loop"] = [images / seconds for seconds in kinds.loops]
        shutil.rmtree(work / "source")
        ratios = {name: ratio(found["ours"], found[name]) for name in ("peer", "loop", "copy")}
        rates = {name: f"{Spread.of(values)} images/s" for name, values in found.items()}
        met = ratios["peer"].median >= 3 or ratios["copy"].median >= 0.8
        figures = {"mb_per_s": {name: [v * size / images / 1e6 for v in values] for name, values in found.items()}}
        goal = "3x, or 0.8x the copy, whichever is less"
        record(parsed, Row("build, against a ShardWriter program", rates["ours"], rates["peer"], ratios["peer"], goal, met, figures))
        record(parsed, Row("build, against ShardWriter's loop alone", rates["ours"], rates["loop"], ratios["loop"], "", None))
        record(parsed, Row("build, against cp and sync of the shards", rates["ours"], rates["copy"], ratios["copy"], goal, met))

        tiny = [jpeg(picture(32, 24, seed)) for seed in range(8)]
        few, many = (peak_mb(number, memory // 80, tiny, work) for number in (memory // 20, memory))
        bound = f"{memory:,} samples at most 1.2x of {memory // 20:,}"
        grown = Spread(few / many, few / many, few / many)
        texts = f"{many:.0f} MB of {memory:,}", f"{few:.0f} MB of {memory // 20:,}"
        record(parsed, Row("build, peak memory of all processes", *texts, grown, bound, many <= 1.2 * few))


if __name__ == "__main__":
    main()
