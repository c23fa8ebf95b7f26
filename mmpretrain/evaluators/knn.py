"""The evaluator `knn`: weighted nearest neighbours on frozen features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import normalize

from mmpretrain.evaluators.base import OptionError
from mmpretrain.evaluators.data.train_test import look_at_pair
from mmpretrain.evaluators.features import gather_rows, part
from mmpretrain.evaluators.probe import EncodedPair, FrozenConfig, evaluate_frozen
from mmpretrain.types import Model, Result


@dataclass
class Config(FrozenConfig):
    """Options of `knn`."""

    k: int = 20  # neighbours that vote
    temperature: float = 0.07  # a neighbour of cosine s votes with weight exp(s / temperature)


class KNN:
    """acc1, acc5, mean_per_class_recall; with features=both, those of `features` carry the prefix `features_`.

    Source: Wu et al. 2018, section 3.4; the protocol of DINO.
    """

    Config = Config

    def __init__(self, config: Config) -> None:
        if config.k < 1 or config.temperature <= 0:
            raise OptionError(f"k={config.k}, temperature={config.temperature}: expected at least one neighbour and a positive temperature")
        self.config = config

    def preflight(self) -> None:
        """Check the first items of both sets."""
        look_at_pair(self.config)

    def __call__(self, model: Model, accelerator: Accelerator) -> Result:
        config, device = self.config, accelerator.device

        def votes(pair: EncodedPair, name: str, train: Tensor, test: Tensor) -> Tensor:
            mine, labels = test[list(part(len(test)))].to(device), pair.train_labels.to(device)
            scores = knn_votes(mine, train.to(device), labels, len(pair.classes), config.k, config.temperature)
            return gather_rows(scores).cpu()

        return evaluate_frozen(model, accelerator, config, votes, tie=1e-9)


def knn_votes(query: Tensor, train: Tensor, labels: Tensor, num_classes: int, k: int, temperature: float, tile: int = 2048) -> Tensor:
    """Compute the weighted votes of each query's k nearest rows by cosine.

    Of equally near rows the earlier ones vote. Weights are relative to that of the nearest row, which changes no
    ranking. Memory grows with tile * (tile + k), not with m.

    Args:
        query: [n, D].
        train: [m, D].
        labels: int64 [m].
        num_classes: C.
        k: neighbours that vote.
        temperature: a neighbour of cosine s has weight exp(s / temperature).
        tile: rows compared at once.

    Returns:
        float64 [n, C].
    """
    train = normalize(train, dim=-1)
    votes = torch.zeros(len(query), num_classes, dtype=torch.float64, device=query.device)
    for start in range(0, len(query), tile):
        rows = normalize(query[start : start + tile], dim=-1)
        near, voters = rows.new_empty(len(rows), 0), labels.new_empty(len(rows), 0)  # the nearest so far, [tile,<=k]
        for low in range(0, len(train), tile):
            near = torch.cat([near, rows @ train[low : low + tile].T], 1)
            voters = torch.cat([voters, labels[low : low + tile].expand(len(rows), -1)], 1)
            # A stable sort, since top-k does not specify its choice among equals; rows of earlier tiles come first.
            near, order = near.sort(dim=1, descending=True, stable=True)
            near, voters = near[:, :k], voters.gather(1, order[:, :k])
        weights = ((near.double() - near[:, :1].double()) / temperature).exp()
        votes[start : start + tile].scatter_add_(1, voters, weights)
    return votes
