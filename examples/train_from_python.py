"""Train a recipe from Python at several learning rates, and compare the losses.

    python examples/train_from_python.py RECIPE.yaml [key=value ...]

Each run goes to a folder of its own below the recipe's `run_dir`. A run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mmpretrain.config import recipe as recipes
from mmpretrain.errors import MMPretrainError
from mmpretrain.tracking.jsonl import read_jsonl
from mmpretrain.trainer import train

FACTORS = (0.5, 1.0, 2.0)  # of the recipe's learning rate


def last_loss(run_dir: str) -> float:
    """The last training loss of a run, weighted over its objectives."""
    return [line["loss"] for line in read_jsonl(Path(run_dir) / "metrics.jsonl") if "loss" in line][-1]


def sweep(recipe: str, overrides: list[str]) -> dict[float, float]:
    """Learning rate -> last loss."""
    losses = {}
    for factor in FACTORS:
        config = recipes.load(recipe, overrides)  # checked: an unknown key raises OptionError
        config.optim.lr *= factor
        config.run_dir = f"{config.run_dir}/lr_{config.optim.lr:g}"
        if train(config) != 0:
            raise SystemExit(f"{config.run_dir}: the run ended early")
        losses[config.optim.lr] = last_loss(config.run_dir)
    return losses


if __name__ == "__main__":
    try:
        losses = sweep(sys.argv[1], sys.argv[2:])
    except MMPretrainError as error:
        raise SystemExit(f"error: {error}") from None
    for rate, loss in losses.items():
        print(f"lr {rate:g}: loss {loss:.4f}")
