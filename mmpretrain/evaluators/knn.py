"""Weighted nearest neighbours on frozen features (Wu 2018, section 3.4; the protocol DINO reports)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import normalize

from ..types import Model, Result
from .features import gather_rows, part
from .metrics import classification_metrics, confusion_tables, predictions
from .pairs import TrainDataConfig, encode_pair


@dataclass
class Config(TrainDataConfig):
    k: int = 20  # neighbours that vote
    temperature: float = 0.07  # a neighbour of cosine s votes with weight exp(s / temperature)
    features: Literal["pooled", "features", "both"] = "pooled"  # pooled (before the projection), features (after it), or both


class KNN:
    """acc1, acc5, mean_per_class_recall; with features=both, those of `features` carry the prefix `features_`."""

    Config = Config

    def __init__(self, config: Config) -> None:
        self.config = config

    def __call__(self, model: Model, accelerator: Accelerator) -> Result:
        config = self.config
        pair = encode_pair(model, accelerator, config)
        metrics: dict[str, float] = {}
        tables: dict[str, list[dict]] = {}
        for name, prefix, train, test in pair.feature_sets(config.features):
            mine = test[list(part(len(test)))].to(accelerator.device)
            votes = knn_votes(
                mine,
                train.to(accelerator.device),
                pair.train_labels.to(accelerator.device),
                len(pair.classes),
                config.k,
                config.temperature,
            )
            votes = gather_rows(votes).cpu()
            found = classification_metrics(votes, pair.test_labels, tie=1e-9)
            metrics |= {prefix + key: value for key, value in found.items()}
            predicted = predictions(votes, pair.test_labels, tie=1e-9)
            tables |= {
                key if not prefix else f"{name}_{key}": rows
                for key, rows in confusion_tables(pair.test_labels, predicted, pair.classes).items()
            }
        if pair.skipped:
            tables["skipped"] = pair.skipped
        return Result(metrics | {"chance": 1 / len(pair.classes)}, len(pair.test_labels), pair.name, tables)


def knn_votes(query: Tensor, train: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float, tile: int = 1024) -> Tensor:
    """query [n,D], train [m,D], labels int64 [m] -> float64 [n,C]: the weighted votes of each query's k nearest rows by cosine.

    Among equally near rows the earlier ones vote. Weights are taken relative to the nearest, which changes no ranking.
    """
    train = normalize(train, dim=-1)
    votes = torch.zeros(len(query), num_classes, dtype=torch.float64, device=query.device)
    for start in range(0, len(query), tile):
        cosine = normalize(query[start : start + tile], dim=-1) @ train.T  # [tile,m]
        near, index = cosine.sort(dim=1, descending=True, stable=True)
        near, index = near[:, :k].double(), index[:, :k]
        weights = ((near - near[:, :1]) / temperature).exp()
        votes[start : start + tile].scatter_add_(1, labels[index], weights)
    return votes
