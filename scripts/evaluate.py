"""Evaluate a run or a model: python scripts/evaluate.py RUN_OR_MODEL EVALUATOR data=... [key=value ...]

RUN_OR_MODEL is a run folder (its newest valid checkpoint), a checkpoint or open_clip folder, a weights file with --arch,
NAME:PRETRAINED_TAG of open_clip, timm:NAME, or hf:FOLDER. Works under accelerate launch and torchrun with any number of processes.
A run without a contrastive objective (its checkpoints have no logit_scale) has no trained joint space: zero_shot, retrieval and binding
refuse it. The `seed` of a result line is the evaluator's, whether a run or this script wrote it; the run's is in its config.yaml.
Exit status: 0 done, 1 failed, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", metavar="RUN_OR_MODEL", nargs="?")
    p.add_argument("evaluator", metavar="EVALUATOR", nargs="?")
    p.add_argument("options", metavar="key=value", nargs="*", help="options of the evaluator, listed below")
    p.add_argument("--json", action="store_true", help="print the result line as JSON and nothing else")
    p.add_argument("--out", type=Path, help="append the result line to this file (default: the run's results.jsonl)")
    p.add_argument("--name", help="what the result is called (default: the evaluator's name)")
    p.add_argument("--seed", type=int, help="the same as seed=N: what the evaluator draws; noted in the result line")
    p.add_argument("--weights", choices=["student", "teacher"], default="student", help="of a run: the trained towers, or their EMA copy")
    p.add_argument("--arch", help="open_clip model name or JSON file, where RUN_OR_MODEL is a file of weights alone")
    p.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32", help="autocast of the towers")
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    p.add_argument("-h", "--help", action="store_true", help="this text, and every evaluator's options")
    return p


def options_help() -> str:
    """Every evaluator with its options, defaults and documentation."""
    from mmpretrain.config.documentation import describe
    from mmpretrain.evaluators import EVALUATORS
    from mmpretrain.evaluators.data.datasets import DataConfig

    shared = describe(DataConfig)
    known = {name for name, _, _ in shared}
    sections = [("every evaluator", "", shared)]
    for kind, evaluator in EVALUATORS.items():
        own = [row for row in describe(evaluator.Config) if row[0] not in known]
        sections.append((kind, (evaluator.__doc__ or "").split("\n")[0], own))
    lines = []
    for title, doc, rows in sections:
        lines.append(f"\n{title}: {doc}" if doc else f"\n{title}:")
        lines += [f"  {name}={default}\n      {text}" for name, default, text in rows]
    return "\n".join(lines)


def run_folder(model: str) -> Path | None:
    """The run that a run folder or one of its checkpoints belongs to."""
    path = Path(model)
    if (path / "checkpoints").is_dir():
        return path
    parent = path.resolve().parent
    return parent.parent if path.is_dir() and parent.name == "checkpoints" else None


def show(line: dict[str, Any], messages: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mmpretrain.tracking.console import plain

    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in line["metrics"].items():
        table.add_row(Text(name), f"{value:.4f}")
    for name, value in line.get("baselines", {}).items():
        table.add_row(Text(f"baseline {name}"), f"{value:.4f}")
    console = Console()
    console.print(Text(plain(f"{line['name']} on {line['dataset']}, {line['n']} samples")))
    console.print(table)
    for message in messages:
        console.print(Text(plain(message)))


def evaluate(arguments: argparse.Namespace) -> int:
    from mmpretrain import cpu

    cpu.bound_spinning()  # read when torch is imported
    import torch
    from accelerate import Accelerator

    from mmpretrain.checkpoint import find_checkpoint
    from mmpretrain.config.build import OptionError
    from mmpretrain.evaluators import build_evaluator
    from mmpretrain.evaluators.base import result_line
    from mmpretrain.evaluators.models import load_model
    from mmpretrain.report.extras import save_result_extras
    from mmpretrain.tracking.jsonl import JsonLines, jsonable

    options = list(arguments.options)
    if arguments.seed is not None:
        if any(text.startswith("seed=") for text in options):
            raise OptionError("both --seed and seed= are given: leave one out")
        options.append(f"seed={arguments.seed}")
    evaluator = build_evaluator(arguments.evaluator, options)  # before anything slow: a wrong key is said at once
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise OptionError("--device cuda: there is no CUDA device here")
    accelerator = Accelerator(cpu=arguments.device == "cpu" or not torch.cuda.is_available())
    model = load_model(
        arguments.model,
        accelerator.device,
        weights=arguments.weights,
        arch=arguments.arch,
        precision=arguments.precision,
        find_checkpoint=find_checkpoint,
    )
    result = evaluator(model, accelerator)
    if accelerator.is_main_process:
        name = arguments.name or arguments.evaluator
        line = {"step": None} | result_line(arguments.evaluator, name, evaluator.config, model, result)
        run = run_folder(arguments.model)
        out = arguments.out or (run / "results.jsonl" if run else None)
        messages = []
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            JsonLines(out).append(line)
            messages.append(f"appended to {out}")
        if run is not None and arguments.out is None:
            save_result_extras(run, name, None, result)
        if skipped := result.tables.get("skipped"):
            messages.append(f"{len(skipped)} items could not be used, first {skipped[0]['key']}: {skipped[0]['reason']}")
        if arguments.json:
            print(json.dumps(jsonable(line), ensure_ascii=False), flush=True)
        else:
            show(line, messages)
    accelerator.end_training()
    return 0


def main() -> int:
    p = parser()
    arguments = p.parse_intermixed_args()
    if arguments.help:
        print(p.format_help() + options_help())
        return 0
    if arguments.model is None or arguments.evaluator is None:
        p.error("RUN_OR_MODEL and EVALUATOR are required")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")
    from mmpretrain.errors import HangError, MMPretrainError, file_errors

    try:
        with file_errors():
            return evaluate(arguments)
    except MMPretrainError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, HangError):
            os._exit(error.status)  # an ordinary exit would wait for the thread that hangs
        return error.status


if __name__ == "__main__":
    sys.exit(main())
