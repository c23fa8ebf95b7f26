"""Memory is bounded: a long run does not grow."""

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mmpretrain.tracking.jsonl import read_jsonl
from tests import runs

ROOT = Path(__file__).parent.parent
STEPS = 10_000


def resident_mb(pid: int) -> float:
    """Of a process and its children, the loader's; memory that they share counts in each."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6 + sum(resident_mb(int(child)) for child in children)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_ten_thousand_steps_do_not_grow(tmp_path):
    shards = runs.shards(tmp_path / "shards")
    recipe = runs.recipe(
        shards, tmp_path / "run", steps=STEPS, log_every=500, cost_every=200, teacher=None,
        objectives={"clip": {"source": "pairs"}, "simclr": {"source": "photos"}}, checkpoint={"every": 2000, "keep": 1},
    )  # fmt: skip
    path = runs.write_recipe(tmp_path / "recipe.yaml", recipe)
    process = subprocess.Popen([sys.executable, "train.py", str(path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    sizes: dict[int, float] = {}  # step -> MB, while it trains
    while process.poll() is None:
        lines = read_jsonl(tmp_path / "run" / "metrics.jsonl", strict=False)
        if lines:
            with suppress(OSError):  # it ended in between
                sizes[lines[-1]["step"]] = resident_mb(process.pid)
        time.sleep(0.2)
    assert process.returncode == 0
    assert max(sizes) > 0.9 * STEPS
    early = max(mb for step, mb in sizes.items() if step <= 0.2 * STEPS)
    late = max(mb for step, mb in sizes.items() if step > 0.8 * STEPS and step < STEPS)
    assert late < early + 15, f"{early:.0f} MB at the start, {late:.0f} MB at the end"
