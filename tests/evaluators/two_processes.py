"""Run by torchrun: evaluate the colour model, and fine-tune a tiny tower, on however many processes there are."""

from __future__ import annotations

import json
import sys

from accelerate import Accelerator

from mmpretrain.evaluators import build_evaluator
from mmpretrain.evaluators.models import TowerModel
from tests.evaluators.fake import ColourModel
from tests.tiny import towers


def results(folder: str, table: str) -> dict:
    accelerator = Accelerator(cpu=True)
    common = {"threads": 1, "batch_size": 2, "max_bad_fraction": 0.5}
    shot = build_evaluator("zero_shot", common | {"data": f"{folder}/test"})(ColourModel(), accelerator)
    pairs = build_evaluator("retrieval", common | {"data": table, "tile": 2})(ColourModel(), accelerator)
    near = build_evaluator("knn", common | {"data": folder, "k": 3})(ColourModel(), accelerator)
    tune = common | {"data": folder, "steps": 2, "train_batch_size": 4, "random": False}
    tuned = build_evaluator("finetune", tune)(TowerModel(towers()), accelerator)
    return {
        "metrics": [shot.metrics, pairs.metrics, near.metrics],
        "n": [shot.n, pairs.n, near.n, tuned.n],
        "skipped": sorted(row["key"] for row in shot.tables["skipped"]),
        "loss": [row["loss"] for row in tuned.tables["loss"]],
        "main": accelerator.is_main_process,
    }


if __name__ == "__main__":
    found = results(*sys.argv[1:])
    if found["main"]:
        print(json.dumps(found))
