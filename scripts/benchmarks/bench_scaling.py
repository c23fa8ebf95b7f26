"""One process on one core against two on two, our trainer under torchrun (gloo): CLIP samples/s, and the share of the ideal.

    python scripts/benchmarks/bench_scaling.py [--quick] [--rounds 2] [--out FILE]

One thread computes and one loads in each process; 64 rows a process in "weak" scaling, 64 rows a step in "strong". docs/scaling.md takes it
from here to 1,024 GPUs.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

from common import ROOT, Row, Spread, alternate, arguments, formatted, measured, ratio, record
from trainers import SMALL, TINY, Setting


def train(setting: Setting, processes: int, batch: int, cores: set[int]) -> float:
    """Samples/s over all processes."""
    folder = setting.folder / "run"
    shutil.rmtree(folder, ignore_errors=True)
    recipe = {
        "run_dir": str(folder), "steps": setting.steps, "model": str(setting.folder / "configs" / "bench.json"), "precision": "bf16",
        "threads": 1, "loader_threads": 1, "log_every": 1, "init_from": str(setting.folder / "first.pt"),
        "sources": {"pairs": {"shards": f"{setting.folder}/shards/*.tar", "batch_size": batch}},
        "objectives": {"clip": {"source": "pairs"}}, "optim": {"lr": setting.lr, "warmup_steps": 2},
    }  # fmt: skip
    path = setting.folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        str(ROOT / "train.py"),
        str(path),
    ]
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = measured(command, environment, folder / "metrics.jsonl", "samples_seen", cores)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if len(done.seen) != setting.steps or lines[-1]["samples_seen"] != setting.steps * batch:
        raise RuntimeError(f"expected {setting.steps} steps of {batch} rows, the log has {len(done.seen)} and {lines[-1]}")
    return batch * (setting.steps - setting.warmup) / (done.seen[-1] - done.seen[setting.warmup - 1])


def main() -> None:
    import os

    parsed = arguments(__doc__, rounds=2)
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(mine) < 2:
        print("skipped: two cores are needed, and a system that lets a process be tied to them")
        return
    with tempfile.TemporaryDirectory() as name:
        size, batch, steps = (TINY, 16, 12) if parsed.quick else (SMALL, 64, 12)
        setting = Setting(Path(name), size, batch=batch, steps=steps, warmup=4, samples=512 if parsed.quick else 2000)
        setting.prepare()
        one, two = {mine[0]}, set(mine[:2])
        runs = {
            "one": lambda: train(setting, 1, batch, one),
            "weak": lambda: train(setting, 2, 2 * batch, two),
            "strong": lambda: train(setting, 2, batch, two),
        }
        found = alternate(runs, parsed.rounds)
    for kind, title in (("weak", f"{batch} rows a process"), ("strong", f"{batch} rows a step")):
        efficiency = Spread.of([value / 2 for value in (r for r in (a / b for a, b in zip(found[kind], found["one"])))])
        rates = formatted(found[kind], found["one"], "samples/s")
        speedup = ratio(found[kind], found["one"])
        record(parsed, Row(f"scaling, 1 -> 2 processes, {title}", *rates, speedup, "measured", None, {"efficiency": efficiency.median}))


if __name__ == "__main__":
    main()
