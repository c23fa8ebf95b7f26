"""Evaluate the colour model, and fine-tune a tiny tower, in two processes: begun once, so that torch is imported once, then forked."""

from __future__ import annotations

import json
import os
import socket
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
        "processes": accelerator.num_processes,
        "main": accelerator.is_main_process,
    }


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    child = os.fork()  # before torch has started any thread
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = "1" if child == 0 else "0"
    found = results(*sys.argv[1:])
    if found["main"]:
        print(json.dumps(found), flush=True)
    if child:
        assert os.waitpid(child, 0)[1] == 0


if __name__ == "__main__":
    main()
