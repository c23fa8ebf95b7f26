"""The demo's training beside busy programs: samples/s beside one and beside two, against an even share of the cores, and alone.

    python scripts/benchmarks/bench_busy.py [--quick] [--rounds 3] [--seconds 2] [--out FILE]

Two trainings of configs/demo.yaml, evaluators left out: one as it comes, and one whose OpenMP threads spin as long as
libgomp's own setting has it (GOMP_SPINCOUNT=300000). Both start once, then are stopped and continued, so that a few
seconds of each alternate, alone and beside one and two programs that only count. An even share of C threads beside n
busy programs is C / (C + n) of the speed alone, of whichever of the two is the faster alone in that round. Other
programs on the machine disturb the figures: the load before each round is printed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, Row, Spread, arguments, family, ratio, record, threads

UNBOUNDED = {"GOMP_SPINCOUNT": "300000"}  # libgomp's own, where no more threads than cores run
COUNTING = "n = 0\nwhile True:\n    n += 1"


class Paused:
    """A program that is stopped but while it is measured; `environ` is added to this process's."""

    def __init__(self, command: list[str], environ: dict[str, str] | None = None, log: Path | None = None) -> None:
        env = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")}
        with (log or Path(os.devnull)).open("w") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, env=env | (environ or {}), stdout=out, stderr=subprocess.STDOUT)

    def signal(self, number: int) -> None:
        for pid in family(self.process.pid):
            try:
                os.kill(pid, number)
            except ProcessLookupError:  # ended between the two
                continue

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()


class Training(Paused):
    """The demo's training, paused after its first steps."""

    def __init__(self, folder: Path, shards: Path, environ: dict[str, str], warmup: int) -> None:
        import yaml

        recipe = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
        recipe |= {"run_dir": str(folder / "run"), "steps": 10**6, "evaluators": {}, "log_every": 1, "cost_every": 0, "threads": threads()}
        recipe["checkpoint"] = {"every": 10**6}
        for source in recipe["sources"].values():
            source["shards"] = str(shards / source["shards"].removeprefix("data/demo/"))
        folder.mkdir()
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        self.rows = sum(source["batch_size"] for source in recipe["sources"].values())
        self.metrics = folder / "run" / "metrics.jsonl"
        log = folder / "log"
        super().__init__([sys.executable, str(ROOT / "train.py"), str(folder / "recipe.yaml")], environ | {"CUDA_VISIBLE_DEVICES": ""}, log)
        while not (self.metrics.exists() and self.metrics.read_bytes().count(b"\n") >= warmup):
            if self.process.poll() is not None:
                raise RuntimeError(f"train.py ended with status {self.process.returncode}:\n{log.read_text()[-3000:]}")
            time.sleep(0.1)
        self.pause()

    def speed(self, seconds: float) -> float:
        """Samples/s over the whole steps of so many seconds, and of as many more as two steps take."""
        start = self.metrics.stat().st_size
        self.go_on()
        ends = time.perf_counter() + seconds
        while True:
            time.sleep(0.05)
            *lines, _ = self.metrics.read_bytes()[start:].split(b"\n")
            if len(lines) >= 3 and time.perf_counter() >= ends:  # the first began before the pause
                break
            if self.process.poll() is not None:
                raise RuntimeError(f"train.py ended with status {self.process.returncode}")
        self.pause()
        taken = [json.loads(line)["step_s"] for line in lines[1:]]
        return self.rows * len(taken) / sum(taken)


def write_shards_of(folder: Path, pairs: int, photos: int) -> None:
    from data_prep.demo.records import chunk
    from data_prep.records import Record
    from data_prep.shards.serial import write_shards

    for split, count in (("pairs", pairs), ("photos", photos)):
        records = [record for first in range(0, count, 250) for record in chunk((0, split, first, min(first + 250, count)))]
        write_shards([Record(key, members) for key, members in records], folder / split, max_count=count // 2)


def main() -> None:
    parsed = arguments(__doc__, rounds=3, seconds=2.0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it stopped must not stay behind
    seconds, warmup = (0.3, 3) if parsed.quick else (parsed.seconds, 20)
    speeds: dict[tuple[str, int], list[float]] = {}
    loads: list[float] = []
    paused: list[Paused] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shards_of(folder / "shards", *((500, 250) if parsed.quick else (2000, 1000)))
        try:
            trainings = {}
            for name, environ in (("bounded", {}), ("unbounded", UNBOUNDED)):
                trainings[name] = Training(folder / name, folder / "shards", environ, warmup)
                paused.append(trainings[name])
            for _ in range(2):
                paused.append(Paused([sys.executable, "-c", COUNTING]))
                paused[-1].pause()
            programs = paused[-2:]
            for i in range(parsed.rounds):
                loads.append(os.getloadavg()[0])
                for beside in range(3):
                    for program in programs[:beside]:
                        program.go_on()
                    for which in list(trainings) if i % 2 == 0 else reversed(list(trainings)):
                        speeds.setdefault((which, beside), []).append(trainings[which].speed(seconds))
                    for program in programs:
                        program.pause()
        finally:
            for one in paused:
                one.end()
    print(f"load before each round (ours included): {Spread.of(loads)}", flush=True)
    alone, cores = ratio(speeds["bounded", 0], speeds["unbounded", 0]), threads()
    rates = {key: f"{Spread.of(values)} samples/s" for key, values in speeds.items()}
    figures = {f"{which}, beside {beside}": values for (which, beside), values in speeds.items()} | {"load": loads}
    row = Row(
        "busy, alone",
        rates["bounded", 0],
        f"{rates['unbounded', 0]} with unbounded spinning",
        alone,
        "at least 0.97x",
        alone.median >= 0.97,
        figures,
    )
    record(parsed, row)
    best = [max(pair) for pair in zip(speeds["bounded", 0], speeds["unbounded", 0])]
    for beside in (1, 2):
        even = [speed * cores / (cores + beside) for speed in best]
        share, unbounded = (ratio(speeds[which, beside], even) for which in ("bounded", "unbounded"))
        peer = f"even share {Spread.of(even)} samples/s; unbounded spinning {rates['unbounded', beside]}, {unbounded.median:.2f} of it"
        title = f"busy, beside {beside} busy program{'s' if beside > 1 else ''}"
        record(parsed, Row(title, rates["bounded", beside], peer, share, "at least 0.9 of the even share", share.median >= 0.9, figures))


if __name__ == "__main__":
    main()
