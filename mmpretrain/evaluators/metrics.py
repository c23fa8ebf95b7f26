"""Metrics of classification. Ties within the rounding of float32 dot products count against the model, and so does a NaN."""

from __future__ import annotations

import torch
from torch import Tensor

TIE = 1e-6  # unit vectors' dot products are exact to about 1e-7 in float32: closer scores are equal


def rank_of_label(scores: Tensor, labels: Tensor, tie: float = TIE) -> Tensor:
    """Count, for each row, the other classes that do not score lower than the label (0 = correct).

    Args:
        scores: [n, C].
        labels: int64 [n].
        tie: scores closer than this are equal.

    Returns:
        int64 [n].
    """
    own = scores.gather(1, labels[:, None])
    return (~(scores < own - tie)).sum(1) - 1  # not `>=`, which a NaN never is


def predictions(scores: Tensor, labels: Tensor, tie: float = TIE) -> Tensor:
    """Return the best class of each row, int64 [n]; where the label ties for the best, another class, in accordance with acc1."""
    if scores.shape[1] == 1:
        return labels.clone()
    others = scores.scatter(1, labels[:, None], float("-inf")).argmax(1)
    return torch.where(rank_of_label(scores, labels, tie) == 0, labels, others)


def accuracy(ranks: Tensor, k: int) -> float:
    """Return the fraction of rows whose label is among the best k; 1.0 where there are at most k classes."""
    return (ranks < k).double().mean().item()


def confusion_matrix(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Count int64 [C, C]: rows are labels, columns predictions."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def mean_per_class_recall(labels: Tensor, predicted: Tensor) -> float:
    """Average the recall of the classes that occur in `labels`."""
    count = torch.bincount(labels)
    right = torch.bincount(labels[labels == predicted], minlength=len(count))
    present = count > 0
    return (right[present] / count[present].double()).mean().item()


def classification_metrics(scores: Tensor, labels: Tensor, tie: float = TIE) -> dict[str, float]:
    """Compute acc1, acc5 and mean_per_class_recall, named as in CLIP_benchmark."""
    ranks = rank_of_label(scores, labels, tie)
    return {
        "acc1": accuracy(ranks, 1),
        "acc5": accuracy(ranks, 5),
        "mean_per_class_recall": mean_per_class_recall(labels, predictions(scores, labels, tie)),
    }


def confusion_tables(labels: Tensor, predicted: Tensor, classes: list[str], largest: int = 20) -> dict[str, list[dict]]:
    """Tabulate per-class recall and the most frequent confusions; with up to 100 classes, also the whole matrix.

    Args:
        labels: int64 [n].
        predicted: int64 [n].
        classes: names.
        largest: greatest number of confusions, and of classes where there are over 100.
    """
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
