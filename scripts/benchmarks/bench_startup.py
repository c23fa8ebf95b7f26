"""Start-up, seconds: `train.py --help`, `import mmpretrain`, and the demo's first training step after launch.

    python scripts/benchmarks/bench_startup.py [--quick] [--rounds 3] [--out FILE]

Files are in the page cache, as on any second start. Beside each the peer's: open_clip_train.main --help and `import open_clip`. The demo is
launched once with its shards there, and once without, which includes writing them.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, Row, Spread, alternate, arguments, measured, ratio, record


def seconds(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - started


def imported(name: str) -> float:
    """Seconds of `import NAME` inside a fresh interpreter."""
    code = f"import time; t = time.perf_counter(); import {name}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return float(done.stdout)


def first_step(folder: Path, demo: Path | None) -> float:
    """Seconds from launch until the demo's first step is in its log. `demo`: folder whose shards are used; None: they are written first."""
    here = folder / "work"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    (here / "data").mkdir()
    if demo is not None:
        (here / "data" / "demo").symlink_to(demo)
    code = (
        "import os, sys, runpy; os.chdir(sys.argv[1]); sys.argv = sys.argv[2:]; "
        "sys.path.insert(0, os.path.dirname(sys.argv[0])); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    words = [str(here), str(ROOT / "train.py"), "run_dir=run", "steps=2", "evaluators=null", "log_every=1"]
    done = measured([sys.executable, "-c", code, *words], {"CUDA_VISIBLE_DEVICES": ""}, here / "run" / "metrics.jsonl", "samples_seen")
    return done.seen[0]


def main() -> None:
    parsed = arguments(__doc__, rounds=3)
    seconds(str(ROOT / "train.py"), "--help")  # bytecode and page cache
    pairs = {"ours": lambda: seconds(str(ROOT / "train.py"), "--help"), "peer": lambda: seconds("-m", "open_clip_train.main", "--help")}
    for title, runs, least in (  # importing another package is no rival to importing ours: no ratio for it
        ("`train.py --help`", pairs, 1.5),
        ("`import mmpretrain`", {"ours": lambda: imported("mmpretrain"), "peer": lambda: imported("open_clip")}, 0.3),
    ):
        found = alternate(runs, parsed.rounds)
        mine = Spread.of(found["ours"])
        row = Row(
            f"startup, {title}",
            f"{mine} s",
            f"{Spread.of(found['peer'])} s",
            None if "import" in title else ratio(found["ours"], found["peer"], less_is_better=True),
            f"under {least:g} s",
            mine.median < least,
        )
        record(parsed, row)
    if parsed.quick:
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fresh = first_step(folder, None)
        shutil.move(folder / "work" / "data" / "demo", folder / "demo")
        there = Spread.of([first_step(folder, folder / "demo") for _ in range(parsed.rounds)])
    record(parsed, Row("startup, first step of the demo, its shards there", f"{there} s", "-", None, "under 15 s", there.median < 15))
    record(parsed, Row("startup, first step of the demo, shards written first", f"{fresh:.3g} s", "-", None, "", None))


if __name__ == "__main__":
    main()
