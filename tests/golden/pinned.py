"""The process that trains recipes for golden losses, under the environment `golden.PINNED`.

Usage: python -m tests.golden.pinned FOLDER NAME ...
"""

from __future__ import annotations

import json
import platform
import runpy
import sys
from pathlib import Path

import torch
import yaml

from tests import golden


def kind() -> str:
    """What the last digits of a loss depend on, beside the code: PyTorch's version and the kernels that it takes."""
    library = "MKL" if torch.backends.mkl.is_available() else "no MKL"
    return f"torch {torch.__version__.partition('+')[0]}, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {library}"


def main_of(script: str | Path, *arguments: str) -> int:
    """The exit status of a command, run in this process: PyTorch is imported once for all recipes."""
    sys.argv = [str(script), *arguments]
    try:
        if isinstance(script, Path):
            runpy.run_path(str(script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def losses(run: Path) -> list[dict[str, float]]:
    """Step, losses and gradient norm of each line of metrics.jsonl that logs a step."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k == "step" or golden.compared(k)} for line in lines if "loss" in line]


def train(name: str, folder: Path) -> None:
    """Train one recipe on the demo shards in `folder`/demo and write `folder`/NAME.jsonl."""
    plan = golden.RECIPES[name]
    recipe = yaml.safe_load((golden.ROOT / "configs" / plan.recipe).read_text())
    recipe.pop("evaluators", None)
    copied = folder / f"{name}.yaml"
    copied.write_text(yaml.safe_dump(recipe, sort_keys=False))  # losses are added in the order of the objectives
    changes = {
        "run_dir": folder / "runs" / name, "steps": golden.STEPS, "epochs": None, "precision": "fp32", "threads": 1,
        "log_every": 1, "cost_every": 0,
        **{f"sources.{source}.shards": folder / "demo" / split / "*.tar" for source, split in plan.shards.items()},
        **plan.changes,
    }  # fmt: skip
    overrides = [f"{option}={json.dumps(value, default=str)}" for option, value in changes.items()]
    status = main_of(golden.ROOT / "train.py", str(copied), *overrides)
    if status:
        raise RuntimeError(f"{name}: train.py ended with status {status}")
    golden.write(folder / f"{name}.jsonl", {kind(): losses(folder / "runs" / name)})


def main() -> int:
    folder, *names = sys.argv[1:]
    root = Path(folder).resolve()
    counts = [f"--{split}={golden.SCENES}" for split in ("pairs", "photos")]
    status = main_of("data_prep", "demo", str(root / "demo"), "--split=pairs", "--split=photos", *counts, "--processes=1")
    if status:
        raise RuntimeError(f"data_prep demo ended with status {status}")
    for name in names:
        train(name, root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
