"""Evaluation during training: the recipe's evaluators on the live towers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from mmpretrain import distributed
from mmpretrain.config.build import OptionError
from mmpretrain.config.recipe import Config, EvaluationConfig
from mmpretrain.errors import MMPretrainError, file_errors
from mmpretrain.evaluators import EVALUATORS
from mmpretrain.evaluators.base import result_line
from mmpretrain.evaluators.models import TowerModel
from mmpretrain.interrupts import Interrupts
from mmpretrain.model import PretrainModel
from mmpretrain.report.extras import save_result_extras
from mmpretrain.towers.teacher import Teacher
from mmpretrain.tracking.jsonl import read_jsonl
from mmpretrain.tracking.tracker import Tracker


@dataclass(frozen=True)
class DataInProgress:
    """Data of evaluators that another process still writes while training begins."""

    pending: Mapping[Path, Callable[[], object]] = field(default_factory=dict)  # absolute folder -> waits until it is complete

    def wait(self, data: str) -> Callable[[], object] | None:
        """Return the function that waits for data in a folder that is still being written; None for other data."""
        path = Path(data).absolute()
        return next((self.pending[folder] for folder in (path, *path.parents) if folder in self.pending), None)


def _data(options: Any) -> list[str]:
    """Return the data that an evaluator reads."""
    return [data for name in ("data", "train") if isinstance(data := getattr(options, name, None), str)]


def build_evaluators(config: Config, data: DataInProgress = DataInProgress()) -> dict[str, Any]:
    """Build and check every evaluator before the first step: a wrong option, path or first sample fails at once.

    Raises:
        OptionError: with the name of the evaluator.
    """
    evaluators = {}
    for name, evaluation in config.evaluators.items():
        try:
            with file_errors():
                evaluators[name] = EVALUATORS[evaluation.kind](evaluation.options)
                if not any(data.wait(path) for path in _data(evaluation.options)) and hasattr(evaluators[name], "preflight"):
                    evaluators[name].preflight()
        except MMPretrainError as error:
            raise OptionError(f"evaluators.{name}: {error}") from error
    return evaluators


class Evaluations:
    """The schedule of the evaluators, and their runs."""

    def __init__(
        self,
        config: Config,
        evaluators: dict[str, Any],
        accelerator: Accelerator,
        model: PretrainModel,
        teacher: Teacher | None,
        tracker: Tracker,
        data: DataInProgress = DataInProgress(),
    ) -> None:
        self.data = data
        self.config, self.evaluators, self.accelerator = config, evaluators, accelerator
        self.model, self.teacher, self.tracker = model, teacher, tracker

    def due(self, step: int) -> list[str]:
        """Return the evaluators that are due at `step`."""

        def now(e: EvaluationConfig) -> bool:
            return step == self.config.steps or (e.every > 0 and step % e.every == 0)

        return [name for name, e in self.config.evaluators.items() if now(e)]

    def missing(self, step: int) -> list[str]:
        """Return the evaluators due at a loaded checkpoint without a result: the run ended before they did."""
        lines = read_jsonl(Path(self.config.run_dir) / "results.jsonl")
        done = distributed.broadcast_object([line.get("name") for line in lines if line.get("step") == step])
        return [name for name in self.due(step) if name not in done]

    def run(self, names: Iterable[str], step: int, interrupts: Interrupts) -> str | None:
        """Run evaluators in order. Return why the rest were left out, if the run was interrupted."""
        for name in names:
            self._one(name, step)
            if reason := agreed(interrupts, self.accelerator.device):
                return reason
        return None

    def _one(self, name: str, step: int) -> None:
        evaluation: EvaluationConfig = self.config.evaluators[name]
        for path in _data(evaluation.options):
            if wait := self.data.wait(path):
                wait()
        towers = self.teacher.module if evaluation.weights == "teacher" and self.teacher is not None else self.model.towers
        precision = self.config.precision
        assert precision != "auto"  # resolved when the Accelerator was created
        with torch.random.fork_rng():  # an evaluator that draws random numbers does not change the run
            training = towers.training
            towers.eval()
            joint = any("features" in encode.outputs for encode in self.model.plan)
            model = TowerModel(towers, self.accelerator.device, precision, joint=joint)
            result = self.evaluators[name](model, self.accelerator)
            towers.train(training)
        line = result_line(evaluation.kind, name, evaluation.options, model, result)
        if self.accelerator.is_main_process:
            if baselines := evaluation.reference | result.baselines:
                line["baselines"] = baselines
            save_result_extras(Path(self.config.run_dir), name, step, result)
        self.tracker.result(step, line)


def agreed(interrupts: Interrupts, device: torch.device) -> str | None:
    """Return why to stop, on every rank where one has a reason; None to continue."""
    reason = interrupts.reason  # read once: a signal may come at any moment
    return (reason or "another process stopped") if distributed.any_rank([reason is not None], device)[0] else None
