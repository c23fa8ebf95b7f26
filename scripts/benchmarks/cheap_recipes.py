"""Recipes that make training cheaper, on the emoji task at equal CPU-seconds: zero-shot on another vendor's emoji, several seeds.

    python scripts/benchmarks/cheap_recipes.py --noto shards/noto --photos shards/clothing --test raw/emoji-twemoji/emoji.csv

docs/emoji.md says how the data is made. Each arm is first timed over a few steps (CPU-seconds of the whole process, start-up apart), then
given as many steps as the budget allows. Arms: clip; flip (half of the patches dropped, the last tenth of the run whole: Li et al. 2023);
clipa (80% of the budget at 32 px, the rest at 64 px, position embedding resized: Li et al. 2023b); combined with a CLIP view of its own;
combined with SimCLR's view as the CLIP view.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WEAK = "{preset: weak, scale: [0.5, 1.0]}"  # the geometry of the shared view, without its colours


@dataclass(frozen=True)
class Stage:
    """One run of train.py: a share of the budget, and what differs from the recipe."""

    share: float
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arm:
    recipe: str
    stages: tuple[Stage, ...] = (Stage(1.0),)


ARMS = {
    "clip": Arm("emoji_clip"),
    "flip": Arm("emoji_clip", (Stage(1.0, ("objectives.clip.token_drop=0.5", "objectives.clip.whole_tail=0.1")),)),
    "clipa": Arm("emoji_clip", (Stage(0.8, ("image_size=32",)), Stage(0.2, ("optim.lr=5e-4",)))),
    "combined, own view": Arm("emoji_combined", (Stage(1.0, (f"objectives.clip.augment={WEAK}",)),)),
    "combined, shared view": Arm("emoji_combined"),
}


def run(command: list[str]) -> tuple[float, str]:
    """CPU-seconds (user and system) of a process and its children, and what it printed. Raises RuntimeError where it fails."""
    report = "import resource, runpy, sys; sys.argv = sys.argv[1:]; status = 0\n"
    report += "try: runpy.run_path(sys.argv[0], run_name='__main__')\nexcept SystemExit as e: status = e.code or 0\n"
    report += "u = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]\n"
    report += "print('CPU', sum(x.ru_utime + x.ru_stime for x in u)); sys.exit(status)"
    done = subprocess.run(
        [sys.executable, "-c", report, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    return float(done.stdout.rsplit("CPU ", 1)[1]), done.stdout


def train(arm: Arm, stage: Stage, steps: int, folder: Path, seed: int, data: list[str], start: Path | None = None) -> float:
    warm = max(1, min(30, steps // 10))
    options = [
        f"run_dir={folder}",
        f"steps={steps}",
        f"seed={seed}",
        f"optim.warmup_steps={warm}",
        "cost_every=0",
        "loader_threads=1",
        "threads=1",
    ]
    options += [*data, *stage.options, *([f"init_from={start}"] if start else [])]
    return run(["train.py", f"configs/{arm.recipe}.yaml", *options])[0]


def arm_data(arm: Arm, noto: Path, photos: Path) -> list[str]:
    sources = ["sources.pairs", "sources.captions"] if arm.recipe == "emoji_combined" else ["sources.pairs"]
    return [f"{s}.shards={noto}" for s in sources] + ([f"sources.photos.shards={photos}"] if arm.recipe == "emoji_combined" else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noto", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=220.0, help="CPU-seconds of each run, start-up not counted")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each")
    parser.add_argument("--folder", type=Path, default=Path("runs/cheap"), help="new: runs that go on would be timed wrongly")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists: name a new --folder")

    def timed(job: tuple[str, Stage]) -> float:
        """CPU-seconds a step: the difference of a longer and a shorter run, so that start-up cancels."""
        name, stage = job
        arm, folder = ARMS[name], arguments.folder / "timing" / f"{name.replace(', ', '_').replace(' ', '_')}-{stage.share}"
        data = arm_data(arm, arguments.noto, arguments.photos)
        short, long = (train(arm, stage, n, folder / str(n), 0, data) for n in (5, 35))
        return (long - short) / 30

    def score(job: tuple[str, int]) -> dict[str, float]:
        name, seed = job
        arm, folder = ARMS[name], arguments.folder / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}"
        data, start, used, counts = arm_data(arm, arguments.noto, arguments.photos), None, 0.0, []
        for number, stage in enumerate(arm.stages):
            steps = int(arguments.budget * stage.share / per_step[name, stage])
            used += train(arm, stage, steps, folder / str(number), seed, data, start)
            start, counts = folder / str(number), [*counts, steps]
        command = [
            "scripts/evaluate.py",
            str(start),
            "zero_shot",
            f"data={arguments.test}",
            "image=file",
            "label=name",
            "exclude=skin tone",
        ]
        _, printed = run([*command, 'templates=["{c}"]', "--json"])
        metrics = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))["metrics"]
        print(f"{name}, seed {seed}: {counts} steps, {used:.0f} CPU-s with start-up, {metrics}", file=sys.stderr, flush=True)
        return {"cpu_s": used, "acc1": metrics["acc1"], "acc5": metrics["acc5"], "steps": sum(counts)}

    with ThreadPoolExecutor(arguments.jobs) as pool:
        stages = [(name, stage) for name, arm in ARMS.items() for stage in arm.stages]
        per_step = dict(zip(stages, pool.map(timed, stages)))
        jobs = [(name, seed) for seed in range(arguments.seeds) for name in ARMS]
        scores = dict(zip(jobs, pool.map(score, jobs)))
    print("| recipe | steps | CPU-minutes | top-1 | top-5 |\n| --- | --- | --- | --- | --- |")
    for name in ARMS:
        rows = [scores[name, seed] for seed in range(arguments.seeds)]

        def cell(key: str, rows: list = rows) -> str:
            return f"{100 * statistics.mean(r[key] for r in rows):.1f}% ({', '.join(f'{100 * r[key]:.1f}' for r in rows)})"

        minutes = statistics.mean(r["cpu_s"] for r in rows) / 60
        print(f"| {name} | {rows[0]['steps']} | {minutes:.1f} | {cell('acc1')} | {cell('acc5')} |")


if __name__ == "__main__":
    main()
