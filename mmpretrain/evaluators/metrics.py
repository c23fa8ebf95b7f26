"""Ranks and what follows from them. Ties count against the model, within the rounding of float32 dot products; so does a NaN."""

from __future__ import annotations

import torch
from torch import Tensor

TIE = 1e-6  # unit vectors' dot products are exact to about 1e-7 in float32: closer scores are equal


def rank_of_label(scores: Tensor, labels: Tensor, tie: float = TIE) -> Tensor:
    """scores [n,C], labels int64 [n] -> int64 [n]: how many other classes do not score lower (0 = right)."""
    own = scores.gather(1, labels[:, None])
    return (~(scores < own - tie)).sum(1) - 1  # not `>=`, which a NaN never is


def predictions(scores: Tensor, labels: Tensor, tie: float = TIE) -> Tensor:
    """int64 [n]: the best class; where the label only ties for the best, the other class (so that it agrees with acc1)."""
    if scores.shape[1] == 1:
        return labels.clone()
    others = scores.scatter(1, labels[:, None], float("-inf")).argmax(1)
    return torch.where(rank_of_label(scores, labels, tie) == 0, labels, others)


def accuracy(ranks: Tensor, k: int) -> float:
    """Fraction of rows whose label is among the best k; 1.0 where there are no more than k classes."""
    return (ranks < k).double().mean().item()


def confusion_matrix(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """int64 [C,C]: rows are labels, columns predictions."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_per_class_recall(labels: Tensor, predicted: Tensor) -> float:
    """Mean over the classes that occur in `labels` of the fraction of their rows predicted right."""
    count = torch.bincount(labels)
    right = torch.bincount(labels[labels == predicted], minlength=len(count))
    present = count > 0
    return (right[present] / count[present].double()).mean().item()


def classification_metrics(scores: Tensor, labels: Tensor, tie: float = TIE) -> dict[str, float]:
    """acc1, acc5, mean_per_class_recall under CLIP_benchmark's names."""
    ranks = rank_of_label(scores, labels, tie)
    return {
        "acc1": accuracy(ranks, 1),
        "acc5": accuracy(ranks, 5),
        "mean_per_class_recall": mean_per_class_recall(labels, predictions(scores, labels, tie)),
    }


def confusion_tables(labels: Tensor, predicted: Tensor, classes: list[str], largest: int = 20) -> dict[str, list[dict]]:
    """Per-class recall and the most frequent confusions; the whole matrix only up to 100 classes."""
    C = len(classes)
    pairs, counts = torch.unique(labels * C + predicted, return_counts=True)
    total = torch.bincount(labels, minlength=C)
    right = torch.bincount(labels[labels == predicted], minlength=C)
    wrong = [(-count, pair // C, pair % C) for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True) if pair // C != pair % C]
    confusions = [
        {"true": classes[a], "predicted": classes[b], "count": -count, "fraction": -count / total[a].item()}
        for count, a, b in sorted(wrong)[:largest]
    ]
    present = [c for c in range(C) if total[c] > 0]
    per_class = [{"class": classes[c], "n": total[c].item(), "recall": (right[c] / total[c]).item()} for c in present]
    if len(per_class) > 100:
        per_class = sorted(per_class, key=lambda row: (row["recall"], row["class"]))[:largest]
    tables = {"per_class": per_class, "confusions": confusions}
    if C <= 100:
        matrix = confusion_matrix(labels, predicted, C)
        tables["confusion_matrix"] = [
            {"true class": name, **dict(zip(classes, row, strict=True))} for name, row in zip(classes, matrix.tolist(), strict=True)
        ]
    return tables
