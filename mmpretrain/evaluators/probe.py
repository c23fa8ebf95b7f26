"""Classification on frozen features, for k-NN and linear probe: before and after the projection, and with random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from accelerate import Accelerator
from torch import Tensor

from mmpretrain.evaluators.base import OptionError
from mmpretrain.evaluators.baselines import BaselineConfig, measure
from mmpretrain.evaluators.data.datasets import EvalSet
from mmpretrain.evaluators.data.train_test import TrainDataConfig, open_pair
from mmpretrain.evaluators.features import encode_images
from mmpretrain.evaluators.metrics import classification_metrics, confusion_tables, predictions
from mmpretrain.evaluators.models import Untrained
from mmpretrain.types import Model, Result


@dataclass
class FrozenConfig(BaselineConfig, TrainDataConfig):
    """Options of evaluators on frozen features."""

    features: Literal["pooled", "features", "both"] = "pooled"  # pooled (before the projection), features (after it), or both
    random: bool = False  # also the same architecture with random weights: random_acc1


@dataclass
class EncodedPair:
    """The training and test sets, and their features on the CPU, on every process."""

    sets: tuple[EvalSet, EvalSet]  # to fit on, to test on
    name: str
    classes: list[str]
    train: dict[str, Tensor]  # "pooled" [m,D], "features" [m,E]
    train_labels: Tensor
    test: dict[str, Tensor]
    test_labels: Tensor
    skipped: list[dict[str, str]]

    def feature_sets(self, wanted: str) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """Yield (name, metric prefix, train, test) for `pooled`, `features`, or `both`, as far as the model returns them."""
        names = [name for name in ("pooled", "features") if name in self.train] if wanted == "both" else [wanted]
        if missing := [name for name in names if name not in self.train]:
            raise OptionError(f"features={missing[0]}: this model gives only {', '.join(self.train)}")
        for name in names:
            yield name, "features_" if wanted == "both" and name == "features" else "", self.train[name], self.test[name]


def encode_pairs(model: Model, accelerator: Accelerator, config: FrozenConfig) -> Iterator[tuple[str, EncodedPair]]:
    """Yield (metric prefix, features) of the model and, with `random`, of its architecture with random weights."""
    yield "", encode_pair(model, accelerator, config)
    if config.random:
        yield "random_", encode_pair(Untrained(model, config.seed), accelerator, config)


def encode_pair(model: Model, accelerator: Accelerator, config: FrozenConfig) -> EncodedPair:
    """Open both sets and encode their images."""
    train, test = open_pair(config)
    fitted = encode_images(model, train, accelerator, config)
    tested = encode_images(model, test, accelerator, config)
    return EncodedPair(
        sets=(train, test),
        name=test.name,
        classes=train.classes,
        train=fitted.values,
        train_labels=train.labels[fitted.rows],
        test=tested.values,
        test_labels=test.labels[tested.rows],
        skipped=train.skipped + test.skipped + fitted.skipped + tested.skipped,
    )


def evaluate_frozen(
    model: Model, accelerator: Accelerator, config: FrozenConfig, score: Callable[[EncodedPair, str, Tensor, Tensor], Tensor], tie: float
) -> Result:
    """Compute the metrics of a classifier on each kind of features.

    With features=both, those of `features` have the prefix `features_`; those of random weights have `random_` before
    it.

    Args:
        model: to encode with.
        accelerator: of this process.
        config: data and features.
        score: (pair, name, train [m, D], test [n, D]) -> scores [n, C].
        tie: scores closer than this are equal.
    """
    metrics: dict[str, float] = {}
    tables: dict[str, list[dict]] = {}
    n, dataset = 0, ""
    baselines: dict[str, float] = {}
    for beside, pair in encode_pairs(model, accelerator, config):
        for name, prefix, train, test in pair.feature_sets(config.features):
            scores = score(pair, beside + name, train, test)
            values = classification_metrics(scores, pair.test_labels, tie)
            metrics |= {beside + prefix + key: value for key, value in values.items()}
            if not beside:
                predicted = predictions(scores, pair.test_labels, tie)
                tables |= {prefix + key: rows for key, rows in confusion_tables(pair.test_labels, predicted, pair.classes).items()}
        if not beside:
            n, dataset = len(pair.test_labels), pair.name
            metrics["chance"] = 1 / len(pair.classes)
            baselines = measure(config.baselines, *pair.sets, accelerator, config.threads)
            if pair.skipped:
                tables["skipped"] = pair.skipped
    return Result(metrics, n, dataset, tables, baselines=baselines)
