"""The evaluator `linear_probe`: logistic regression on frozen features, with regularisation chosen on held-out training data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from mmpretrain.evaluators.base import OptionError
from mmpretrain.evaluators.data.train_test import look_at_pair
from mmpretrain.evaluators.metrics import TIE
from mmpretrain.evaluators.probe import EncodedPair, FrozenConfig, evaluate_frozen
from mmpretrain.rng import combine, permutation
from mmpretrain.types import Model, Result


@dataclass
class Config(FrozenConfig):
    """Options of `linear_probe`."""

    features: Literal["pooled", "features", "both"] = "both"  # pooled (before the projection), features (after it), or both
    c: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0, 10.0, 100.0])  # candidates for C, the inverse L2 strength
    validation: float = 0.2  # fraction of the training set that C is chosen on; the probe is then fitted on all of it
    max_iter: int = 300  # L-BFGS iterations at most


class LinearProbe:
    """acc1, acc5, mean_per_class_recall of a probe on `pooled`; with features=both, those of `features` have the prefix `features_`.

    Features are standardised by the training set's mean and deviation. The solver is L-BFGS over the whole set.

    Source: Radford et al. 2021 (CLIP), appendix A.3.
    """

    Config = Config

    def __init__(self, config: Config) -> None:
        if not config.c or any(c <= 0 for c in config.c):
            raise OptionError(f"c={config.c}: expected positive numbers")
        self.config = config

    def preflight(self) -> None:
        """Check the first items of both sets."""
        look_at_pair(self.config)

    def __call__(self, model: Model, accelerator: Accelerator) -> Result:
        config, device = self.config, accelerator.device
        tried: list[dict[str, Any]] = []

        def logits(pair: EncodedPair, name: str, train: Tensor, test: Tensor) -> Tensor:
            mean, std = train.mean(0), train.std(0, correction=0).clamp_min(1e-6)
            x, x_test = ((train - mean) / std).to(device), ((test - mean) / std).to(device)
            labels, num_classes = pair.train_labels.to(device), len(pair.classes)
            best, scores = choose_c(x, labels, num_classes, config)
            tried.extend({"features": name, "c": c, "validation acc1": acc, "chosen": c == best} for c, acc in scores)
            weight, bias = fit(x, labels, num_classes, best, config.max_iter)
            return (x_test @ weight.T + bias).cpu()

        result = evaluate_frozen(model, accelerator, config, logits, TIE)
        result.tables["c"] = tried
        return result


def choose_c(x: Tensor, labels: Tensor, num_classes: int, config: Config) -> tuple[float, list[tuple[float, float]]]:
    """Choose the C of best accuracy on held-out rows, the smallest among equals.

    Args:
        x: standardised features [m, D].
        labels: int64 [m].
        num_classes: number of classes.
        config: candidates and held-out share.

    Returns:
        (C, (C, accuracy) of each candidate).
    """
    candidates = sorted(float(c) for c in config.c)
    held = round(len(x) * config.validation)
    if len(candidates) == 1 or held == 0:
        return candidates[0], []
    order = permutation(combine(config.seed, len(x)), len(x)).to(x.device)
    fitted, tested = order[held:], order[:held]
    tried = []
    start = None
    for c in candidates:
        start = fit(x[fitted], labels[fitted], num_classes, c, config.max_iter, start)
        right = (x[tested] @ start[0].T + start[1]).argmax(1) == labels[tested]
        tried.append((c, right.double().mean().item()))
    return max(tried, key=lambda pair: (pair[1], -pair[0]))[0], tried


def fit(
    x: Tensor, labels: Tensor, num_classes: int, c: float, max_iter: int = 300, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Minimise C * sum of cross-entropies + |W|^2 / 2, as scikit-learn's LogisticRegression does; the bias is not regularised.

    Args:
        x: [m, D].
        labels: int64 [m].
        num_classes: number of classes K.
        c: the inverse strength of regularisation.
        max_iter: greatest number of L-BFGS iterations.
        start: initial (W, b); None: zeros.

    Returns:
        (W [K, D], b [K]).
    """
    with torch.enable_grad():
        weight = (torch.zeros(num_classes, x.shape[1], device=x.device) if start is None else start[0].clone()).requires_grad_()
        bias = (torch.zeros(num_classes, device=x.device) if start is None else start[1].clone()).requires_grad_()
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=max_iter, tolerance_grad=1e-6, tolerance_change=1e-9, history_size=20, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            solver.zero_grad()
            loss = cross_entropy(x @ weight.T + bias, labels) + weight.square().sum() / (2 * c * len(x))
            loss.backward()
            return loss

        solver.step(closure)
    return weight.detach(), bias.detach()
