"""Tiny shards, a tiny recipe, and ways to run it: shared by the tests of training."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data_prep.records import Record
from data_prep.shards.serial import write_shards
from mmpretrain import trainer
from mmpretrain.checkpoint import find_checkpoint, load_tensors
from mmpretrain.tracking.jsonl import read_jsonl
from tests.tiny import MODEL, WORDS


def picture(seed: int, size: int = 20) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size + 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def shards(root: Path, pairs: int = 40, photos: int = 30) -> Path:
    """`pairs` captioned and labelled samples in four shards, `photos` bare ones in three."""
    captioned = (
        Record(f"p{i:04d}", {"png": picture(i), "txt": WORDS[i % len(WORDS)].encode(), "cls": str(i % 3).encode()}) for i in range(pairs)
    )
    write_shards(captioned, root / "pairs", max_count=-(-pairs // 4))
    write_shards((Record(f"q{i:04d}", {"png": picture(1000 + i)}) for i in range(photos)), root / "photos", max_count=-(-photos // 3))
    (root / "pairs" / "classnames.txt").write_text("circle\nsquare\nstar\n")
    return root


def recipe(root: Path, run_dir: Path, **changes) -> dict:
    data = {
        "run_dir": str(run_dir),
        "seed": 3,
        "steps": 12,
        "model": MODEL,
        "precision": "fp32",
        "threads": 1,
        "log_every": 1,
        "cost_every": 5,
        "sources": {
            "pairs": {"shards": str(root / "pairs" / "*.tar"), "batch_size": 8},
            "photos": {"shards": str(root / "photos" / "*.tar"), "batch_size": 4},
        },
        "objectives": {
            "clip": {"source": "pairs", "augment": "crop"},
            "simclr": {"source": "photos"},
            "simmim": {"source": "photos"},
            "masked_text": {"source": "pairs", "weight": 0.1},
        },
        "teacher": {"momentum": 0.9},
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "checkpoint": {"every": 3, "keep": 2},
    }
    return data | changes


def write_recipe(path: Path, data: dict) -> Path:
    path.write_text(yaml.safe_dump(data))
    return path


def weights(run_dir: Path) -> dict[str, np.ndarray]:
    """Every tensor of the run's last checkpoint, the optimizer's included."""
    import torch

    folder = find_checkpoint(run_dir)
    found = {f"{stem}.{k}": v.numpy() for stem in ("model", "objectives", "teacher") for k, v in load_tensors(folder, stem).items()}
    for name, state in torch.load(folder / "optimizer.pt", weights_only=True).items():
        found |= {f"optimizer.{name}.{k}": v.numpy() for k, v in state.items()}
    return found


def logged(run: Path) -> list[dict]:
    """The lines of metrics.jsonl that log a step; those of the cost of an objective stand between them."""
    return [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: weights, moments, and what was logged (but for speed)."""
    wa, wb = weights(a), weights(b)
    assert wa.keys() == wb.keys()
    differing = [k for k in wa if not np.array_equal(wa[k], wb[k])]
    assert not differing, differing[:5]
    timeless = [
        [
            {k: v for k, v in line.items() if k not in ("samples_per_s", "data_wait_s", "step_s") and "cost_" not in k}
            for line in read_jsonl(run / "metrics.jsonl")
        ]
        for run in (a, b)
    ]
    assert timeless[0] == timeless[1], json.dumps(timeless)[:500]


@contextmanager
def broken_off(step: int) -> Iterator[None]:
    """A run inside ends with an exception in `step`, counted from 0, and the next one does not."""
    real = trainer.set_learning_rate

    def breaks(optimizer, config, now, steps):
        if now == step:
            raise KeyboardInterrupt
        return real(optimizer, config, now, steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "set_learning_rate", breaks)
        with pytest.raises(KeyboardInterrupt):
            yield
