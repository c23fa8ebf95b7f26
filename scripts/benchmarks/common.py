"""What the benchmarks share: the command line, alternating runs, spread, memory of processes, records. Imports no torch."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every program timed here, ours and theirs, finds its modules compiled, as a user's does
PACKAGES = ("torch", "torchvision", "open_clip_torch", "webdataset", "pillow", "opencv-python-headless", "simplejpeg", "numpy")
CAP = "ONEDNN_MAX_CPU_ISA"  # makes a lesser CPU of this one, for the products of oneDNN (bf16, convolutions)
sys.path.insert(0, str(ROOT))  # the scripts run from a checkout, installed or not

from mmpretrain.cpu import cpu_kind  # noqa: E402 (found by the path above)


@dataclass(frozen=True)
class Spread:
    """A median with its smallest and largest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        def short(value: float) -> str:
            return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

        return short(self.median) + ("" if self.low == self.high else f" ({short(self.low)} to {short(self.high)})")


def formatted(ours: Sequence[float], peer: Sequence[float], unit: str) -> tuple[str, str]:
    """The rates (or sizes) of the two sides as a Row shows them, in `unit`."""
    return f"{Spread.of(ours)} {unit}", f"{Spread.of(peer)} {unit}"


@dataclass
class Row:
    """One line of docs/benchmarks.md. `ratio` is written so that more is better; `met` is None where nothing was to be reached."""

    row: str
    ours: str
    peer: str
    ratio: Spread | None
    target: str
    met: bool | None
    figures: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        verdict = "" if self.met is None else (", met" if self.met else ", MISSED")
        target = f"  [{self.target}{verdict}]" if self.target else ""
        return f"{self.row}: ours {self.ours}, peer {self.peer}" + (f", ratio {self.ratio}" if self.ratio else "") + target


def arguments(doc: str | None, rounds: int, **more: Any) -> argparse.Namespace:
    """--quick, --rounds, --out, and `more`: option name -> its default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds: shows that the benchmark works, not how fast anything is")
    parser.add_argument("--rounds", type=int, default=None, help=f"alternations (default: {rounds}, quick: 1)")
    parser.add_argument("--out", type=Path, default=None, help="append one JSON line per row to this file")
    for name, default in more.items():
        kind = type(default) if default is not None else str
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default)
    parsed = parser.parse_args()
    parsed.rounds = parsed.rounds or (1 if parsed.quick else rounds)
    return parsed


def alternate(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each run once a round, forwards and backwards in turn, so that a drift of the machine falls on all of them."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in list(runs) if i % 2 == 0 else reversed(list(runs)):
            found[name].append(runs[name]())
    return found


def ratio(ours: Sequence[float], peer: Sequence[float], less_is_better: bool = False) -> Spread:
    """Ours against the peer, round by round; more is better for us."""
    return Spread.of([b / a if less_is_better else a / b for a, b in zip(ours, peer)])


def threads() -> int:
    """The threads that both sides compute with: OMP_NUM_THREADS, else every core of this process."""
    wish = os.environ.get("OMP_NUM_THREADS", "")
    return int(wish) if wish.isdigit() else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# -- processes --------------------------------------------------------------------------------------------------------------


@dataclass
class Finished:
    seconds: float
    peak_mb: float  # of the process itself
    tree_mb: float  # of it and its children, pages that they share counted once
    output: str
    seen: list[float]  # seconds at which `watch` had so many lines: seen[0] the first


def _status(pid: int, name: str) -> float:
    """A memory figure of /proc/PID/status in MB; 0 where the process has gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


def family(pid: int) -> list[int]:
    """A process and all its descendants that still run."""
    members, todo = [], [pid]
    while todo:
        member = todo.pop()
        try:
            todo += [int(c) for task in Path(f"/proc/{member}/task").iterdir() for c in (task / "children").read_text().split()]
        except OSError:  # it has ended
            continue
        members.append(member)
    return members


def _shared_once(pid: int) -> float:
    """Proportional set size of a process and all its descendants, MB."""
    total = 0.0
    for member in family(pid):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
        except (OSError, StopIteration):
            continue
    return total


def measured(
    command: Sequence[str],
    env: Mapping[str, str] | None = None,
    watch: Path | None = None,
    pattern: str = "",
    cores: set[int] | None = None,
    tree_every: int = 25,
) -> Finished:
    """Run a command to its end. `watch`, a file it writes, is looked at for lines with `pattern`.

    Its memory is sampled every 20 ms, with that of its children every `tree_every` times.

    The high-water mark is read from /proc rather than from getrusage, which counts the parent's memory at the fork too.
    Raises RuntimeError with the end of the output where the command fails.
    """
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}, cwd=ROOT)
        if cores is not None:
            os.sched_setaffinity(process.pid, cores)
        peak = tree = 0.0
        ended = threading.Event()
        seen: list[float] = []

        def look() -> None:
            at, rest, turn = 0, b"", 0
            nonlocal peak, tree
            while True:
                last = ended.is_set()
                if watch is not None and watch.exists() and watch.stat().st_size > at:
                    with watch.open("rb") as file:
                        file.seek(at)
                        data = file.read()
                    at += len(data)
                    *lines, rest = (rest + data).split(b"\n")
                    now = time.perf_counter() - started
                    seen.extend(now for line in lines if pattern.encode() in line)
                peak = max(peak, _status(process.pid, "VmHWM"))
                if turn % tree_every == 0:
                    tree = max(tree, _shared_once(process.pid))
                turn += 1
                if last:
                    return
                ended.wait(0.02)

        looker = threading.Thread(target=look)
        looker.start()
        try:
            code = process.wait()
        finally:
            if process.poll() is None:  # interrupted: leave nothing running
                process.kill()
                process.wait()
            seconds = time.perf_counter() - started
            ended.set()
            looker.join()
        log.seek(0)
        output = log.read().decode(errors="replace")
    if code:
        raise RuntimeError(f"{shlex.join(map(str, command))[:400]} ended with status {code}:\n{output[-3000:]}")
    return Finished(seconds, peak, tree, output, seen)


# -- records ----------------------------------------------------------------------------------------------------------------


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    return f"{cpu_kind()}, {threads()} threads, {memory:.0f} GB"


def capped() -> str:
    """What rows measured on a lesser CPU than this one are called by: empty where oneDNN is not capped."""
    cap = os.environ.get(CAP)
    return f", oneDNN capped at {cap}" if cap else ""


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def record(parsed: argparse.Namespace, row: Row) -> None:
    """Print the row, and append it to --out. A quick run judges nothing."""
    row.met = None if parsed.quick else row.met
    print(row, flush=True)
    if parsed.out is None:
        return
    script = Path(sys.argv[0]).name
    line = {"benchmark": script.removeprefix("bench_").removesuffix(".py"), **asdict(row), "quick": parsed.quick}
    line |= {"machine": machine(), "date": datetime.date.today().isoformat(), "versions": versions()}
    kept = [word for word in sys.argv[1:] if word != "--out" and word != str(parsed.out)]
    line["command"] = (f"{CAP}={os.environ[CAP]} " if os.environ.get(CAP) else "") + shlex.join(
        ["python", f"scripts/benchmarks/{script}", *kept]
    )
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    with parsed.out.open("a") as file:
        file.write(json.dumps(line) + "\n")
