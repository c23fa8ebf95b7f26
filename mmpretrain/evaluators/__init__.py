"""The evaluators, by kind: model in, result out. Importing a class and listing it here registers it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mmpretrain.evaluators.base import Evaluator, OptionError, make_config
from mmpretrain.evaluators.binding import Binding
from mmpretrain.evaluators.finetune import FineTune
from mmpretrain.evaluators.knn import KNN
from mmpretrain.evaluators.linear_probe import LinearProbe
from mmpretrain.evaluators.retrieval import Retrieval
from mmpretrain.evaluators.zero_shot import ZeroShot
from mmpretrain.plugins import Kinds

_KNOWN: dict[str, type] = {
    "zero_shot": ZeroShot,
    "retrieval": Retrieval,
    "knn": KNN,
    "linear_probe": LinearProbe,
    "finetune": FineTune,
    "binding": Binding,
}
EVALUATORS = Kinds(_KNOWN, "mmpretrain.evaluators", "evaluator")


def build_evaluator(kind: str, options: Iterable[str] | Mapping[str, Any]) -> Evaluator:
    """Build an evaluator from its kind and options (`key=value` texts, or a mapping).

    Raises:
        OptionError: with the nearest known name.
    """
    if kind not in EVALUATORS:
        raise OptionError(EVALUATORS.refusal(kind))
    evaluator = EVALUATORS[kind]
    return evaluator(make_config(evaluator.Config, options))


__all__ = ["EVALUATORS", "Evaluator", "OptionError", "build_evaluator", "make_config"]
