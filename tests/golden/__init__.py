"""Golden losses: 20 steps of every recipe in configs/, made small, in one file per recipe, compared exactly.

Run `python -m tests.golden` after a change that is meant to move a loss, and commit the files that it rewrites; with
names (`python -m tests.golden demo`) it rewrites those alone. Name the change and the recipes that it moves in the
commit message.

A loss differs in its last digits between kinds of CPU and between versions of PyTorch. So the runs take one thread,
fp32, and kernels that every x86-64 CPU with AVX2 has (`PINNED`), and every line names the kind of arithmetic that gave
it. On a recorded kind all digits must agree. On any other kind losses and gradient norms must agree to `TOLERANCE`, and
the test warns that it compared to no more than that. `python -m tests.golden --add` records one more kind beside the
others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
STEPS = 20
SCENES = 256  # of each demo split that the recipes train on
TIMEOUT_S = 600

PINNED = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",  # the one mode of MKL in which CPUs of different vendors agree
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "ACCELERATE_USE_CPU": "true",
}
COMPARED = ("loss", "grad_norm")  # last parts of the names in metrics.jsonl whose values are golden
TOLERANCE = 1e-4  # relative, between kinds; AVX-512 and SSE kernels differ from the pinned ones by up to 6e-6

_TEXT = {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
_TOWERS = {  # in place of towers of 12 layers
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": _TEXT,
}
_EMOJI_TOWERS = {**_TOWERS, "vision_cfg": {"image_size": 64, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32}}


@dataclass(frozen=True)
class Golden:
    """How a recipe is made to fit a test: its sources read demo shards, and `changes` shrinks what is large.

    Args:
        recipe: path below configs/.
        shards: source -> demo split.
        changes: dotted option -> value.
        slow: run by `pytest -m slow` alone.
    """

    recipe: str
    shards: Mapping[str, str]
    changes: Mapping[str, Any]
    slow: bool = False


def _batch(**sizes: int) -> dict[str, int]:
    return {f"sources.{source}.batch_size": size for source, size in sizes.items()}


_PAIRS = {"pairs": "pairs"}
_PHOTOS = {"photos": "photos"}
RECIPES = {
    "demo": Golden("demo.yaml", {**_PAIRS, "captions": "pairs", **_PHOTOS}, _batch(pairs=16, captions=4, photos=8)),
    "demo_dino": Golden("demo_dino.yaml", {**_PAIRS, **_PHOTOS}, _batch(pairs=16, photos=8)),
    "demo_mae": Golden("demo_mae.yaml", {**_PAIRS, **_PHOTOS}, _batch(pairs=16, photos=8)),
    "emoji_clip": Golden("emoji_clip.yaml", _PAIRS, {"model": _EMOJI_TOWERS, **_batch(pairs=16)}),
    "emoji_combined": Golden(
        "emoji_combined.yaml",
        {**_PAIRS, "captions": "pairs", **_PHOTOS},
        {"model": _EMOJI_TOWERS, **_batch(pairs=16, captions=4, photos=8)},
    ),
    "clip_simclr_masked": Golden("clip_simclr_masked.yaml", {**_PAIRS, **_PHOTOS}, {"model": _TOWERS, **_batch(pairs=8, photos=8)}),
    "slip_vitb16": Golden(
        "slip_vitb16.yaml",
        {**_PAIRS, **_PHOTOS},
        {"model": _TOWERS, "objectives.simclr.hidden": 256, "objectives.simclr.projection": 64, **_batch(pairs=16, photos=16)},
    ),
    "clip_vit": Golden("seeds/clip_vit.yaml", _PAIRS, {"model": _TOWERS, **_batch(pairs=16)}),
    # A small learning rate: at the recipe's own, Adam and BatchNorm over 8 rows turn a last digit of step 1 into a tenth
    # of the loss.
    "simclr_resnet50": Golden("seeds/simclr_resnet50.yaml", _PHOTOS, {"image_size": 64, "optim.lr": 1e-5, **_batch(photos=8)}, slow=True),
}


def compared(name: str) -> bool:
    """Is this a name in metrics.jsonl whose values are golden?"""
    return name.rpartition("/")[2] in COMPARED


def differences(golden: list[dict[str, Any]], measured: list[dict[str, Any]], tolerance: float = 0.0) -> list[str]:
    """Compare the steps of two runs, the golden one's values in each.

    Returns:
        One message per value that is missing, is NaN, or differs by more than `tolerance` of the golden one; 0: at all.
    """
    steps = {line["step"]: line for line in measured}
    messages = []
    for line in golden:
        for name, expected in line.items():
            value = steps.get(line["step"], {}).get(name)
            if value is None or not abs(value - expected) <= tolerance * abs(expected):  # NaN differs from everything
                messages.append(f"step {line['step']}, {name}: {value!r}, expected {expected!r}")
    if len(measured) != len(golden):
        messages.append(f"{len(measured)} steps, expected {len(golden)}")
    return messages


def measure(names: Iterable[str], folder: Path) -> None:
    """Train recipes for 20 steps with pinned kernels, in one process of their own, and write `folder`/NAME.jsonl.

    Raises:
        RuntimeError: a run failed; the message ends with what it printed.
    """
    command = [sys.executable, "-m", "tests.golden.pinned", str(folder), *names]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | PINNED | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of a golden file by their kind, each a step with its losses."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        kinds.setdefault(line.pop("kind"), []).append(line)
    return kinds


def write(path: Path, kinds: Mapping[str, list[dict[str, Any]]]) -> None:
    """Write a golden file. JSON holds the shortest digits that give each float back exactly."""
    lines = [json.dumps({"kind": kind, **line}) for kind, steps in kinds.items() for line in steps]
    path.write_text("\n".join(lines) + "\n")
