"""The evaluator `finetune`: fine-tuning for classification, compared with the same budget from random weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmpretrain import distributed
from mmpretrain.data.schema import BadSampleBudgetError
from mmpretrain.data.views import ImageView
from mmpretrain.evaluators.base import OptionError
from mmpretrain.evaluators.baselines import BaselineConfig, measure
from mmpretrain.evaluators.data.datasets import EvalSet, check_budget
from mmpretrain.evaluators.data.train_test import TrainDataConfig, look_at_pair, open_pair
from mmpretrain.evaluators.features import center_view, gather_rows, images, part, render
from mmpretrain.evaluators.metrics import classification_metrics, confusion_tables, predictions
from mmpretrain.evaluators.models import autocast
from mmpretrain.optim import OptimConfig, build_optimizer, parameter_groups, set_learning_rate
from mmpretrain.rng import combine, permutation
from mmpretrain.types import Model, Result


@dataclass
class Config(BaselineConfig, TrainDataConfig):
    """Options of `finetune`."""

    mode: Literal["all", "last_n", "head"] = "all"  # what is trained beside the new head: all, last_n (blocks), or head (nothing else)
    n: int = 2  # how many of the last blocks mode=last_n trains
    lr: float = 1e-4  # peak learning rate of the tower's last layer
    head_lr: float = 10.0  # factor on lr for the new head
    layer_decay: float = 0.75  # a layer's rate is lr * layer_decay ** (layers above it); 1 for none
    weight_decay: float = 0.05  # AdamW, on matrices only
    epochs: float = 10.0  # passes over the training set
    steps: int | None = None  # updates, instead of epochs
    train_batch_size: int = 64  # images an update, over all processes
    warmup: float = 0.1  # fraction of the updates that the learning rate rises in, before it falls on a cosine
    min_scale: float = 0.35  # smallest area of the random crops, as a fraction of the image
    flip: float = 0.5  # probability of a horizontal flip
    random: bool = True  # also train from random weights with the same budget: random_acc1


class FineTune:
    """acc1, acc5, mean_per_class_recall on the test set after training, and with the prefix `random_` from random weights.

    Both trainings see the same images, crops and order. Results are deterministic for one kind of device and number of
    processes.

    Source: He et al. 2019, "Rethinking ImageNet pre-training", for the comparison with random weights.
    """

    Config = Config

    def __init__(self, config: Config) -> None:
        if config.train_batch_size % distributed.world_size():
            raise OptionError(f"train_batch_size={config.train_batch_size} does not divide by {distributed.world_size()} processes")
        self.config = config

    def preflight(self) -> None:
        """Check the first items of both sets."""
        look_at_pair(self.config)

    def __call__(self, model: Model, accelerator: Accelerator) -> Result:
        config = self.config
        train, test = open_pair(config)
        metrics: dict[str, float] = {}
        tables: dict[str, list[dict[str, Any]]] = {}
        n = 0
        for prefix, fresh in (("", False), ("random_", True))[: 1 + config.random]:
            devices = [accelerator.device] if accelerator.device.type == "cuda" else []
            with torch.random.fork_rng(devices), torch.enable_grad():
                torch.manual_seed(config.seed)
                classifier = Classifier(model.copy(random=fresh), len(train.classes)).to(accelerator.device)
                losses, skipped = train_classifier(classifier, train, model, accelerator, config)
            logits, labels, lost = classify(classifier, test, model, accelerator, config)
            metrics |= {prefix + key: value for key, value in classification_metrics(logits, labels).items()}
            tables[f"{prefix}loss"] = losses
            if not fresh:
                n = len(labels)
                tables |= confusion_tables(labels, predictions(logits, labels), test.classes)
                if all_skipped := train.skipped + test.skipped + skipped + lost:
                    tables["skipped"] = all_skipped
        baselines = measure(config.baselines, train, test, accelerator, config.threads)
        return Result(metrics | {"chance": 1 / len(test.classes)}, n, test.name, tables, baselines=baselines)


class Classifier(nn.Module):
    """An image tower with a linear head, initially zero, on its pooled output."""

    def __init__(self, tower: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.tower: Any = tower  # with the width and layer_ids of a Tower, as `Model.copy` gives it
        self.head = nn.Linear(self.tower.width, num_classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute logits [B, C] of images [B, 3, H, W]."""
        return self.head(self.tower(pixels, outputs=frozenset({"pooled"})).pooled)

    def freeze(self, mode: str, n: int) -> dict[str, int]:
        """Freeze all but what `mode` trains.

        Args:
            mode: "all", "last_n" (blocks) or "head".
            n: number of blocks of "last_n".

        Returns:
            Tower parameter name -> depth: embeddings 0, parameters after the blocks deepest.
        """
        depth = {f"tower.{name}": layer for name, layer in self.tower.layer_ids().items()}
        last = max(depth.values())
        if mode == "last_n" and not 0 < n < last:
            raise OptionError(f"n={n}: this tower has {last - 1} blocks; take 1 to {last - 1}, or mode=all or head")
        lowest = {"all": 0, "last_n": last - n, "head": last + 1}[mode]
        for name, parameter in self.tower.named_parameters(prefix="tower"):
            parameter.requires_grad_(depth[name] >= lowest)
        return depth


@dataclass
class _Order:
    """The order of training rows, a pure function of (seed, step): permuted epochs in sequence, cut into full batches."""

    n: int
    batch_size: int
    seed: int
    epochs: dict[int, Tensor] = field(default_factory=dict)

    def batch(self, step: int) -> list[int]:
        """Return the rows of one step."""
        rows = []
        for slot in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch = slot // self.n
            if epoch not in self.epochs:
                self.epochs = {e: order for e, order in self.epochs.items() if e >= epoch - 1}
                self.epochs[epoch] = permutation(combine(self.seed, epoch), self.n)
            rows.append(int(self.epochs[epoch][slot % self.n]))
        return rows


def train_classifier(
    classifier: Classifier, dataset: EvalSet, model: Model, accelerator: Accelerator, config: Config
) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """Train the classifier in place; every process takes its part of each batch.

    Returns:
        (loss curve, items that could not be used).
    """
    device, world, rank = accelerator.device, distributed.world_size(), distributed.rank()
    steps = config.steps or math.ceil(config.epochs * len(dataset) / config.train_batch_size)
    p = model.preprocess
    view = ImageView(size=p.size, mean=p.mean, std=p.std, scale=(config.min_scale, 1.0), flip=config.flip)
    depth = classifier.freeze(config.mode, config.n)
    trainable = [(name, parameter) for name, parameter in classifier.named_parameters() if parameter.requires_grad]
    optim = OptimConfig(
        lr=config.lr,
        weight_decay=config.weight_decay,
        betas=(0.9, 0.999),
        eps=1e-8,
        warmup_steps=round(config.warmup * steps),
        layer_decay=config.layer_decay,
        head_lr=config.head_lr,
    )
    undecayed = {f"tower.{name}" for name in classifier.tower.no_weight_decay()}
    optimizer = build_optimizer(parameter_groups(trainable, optim, depth, undecayed), optim)
    order = _Order(len(dataset), config.train_batch_size, config.seed)
    mine = config.train_batch_size // world

    def plan() -> Iterator[list[int]]:
        for step in range(steps):
            yield order.batch(step)[rank * mine : (rank + 1) * mine]

    classifier.train()
    if config.mode == "head":
        classifier.tower.eval()  # frozen features, batch statistics included
    losses: list[dict[str, float]] = []
    bad: dict[int, str] = {}
    shown = max(1, steps // 100)
    for step, batch in enumerate(images(dataset, plan(), view, config.threads, config.seed, p)):
        bad |= dict(batch.bad)
        count = distributed.all_reduce_sum(torch.tensor(float(len(batch.rows)), device=device))
        if not batch.rows:
            raise BadSampleBudgetError(
                f"{dataset.name}: no image of an update's part can be used, first {dataset.items[batch.bad[0][0]].key}"
            )
        set_learning_rate(optimizer, optim, step, steps)
        pixels, labels = render(view, batch, device), dataset.labels[batch.rows].to(device)
        with autocast(model, device):
            logits = classifier(pixels)
        loss = cross_entropy(logits.float(), labels, reduction="sum") * (world / count)
        optimizer.zero_grad()
        loss.backward()
        distributed.average_gradients([parameter for _, parameter in trainable])
        nn.utils.clip_grad_norm_([parameter for _, parameter in trainable], 1.0)
        optimizer.step()
        if step % shown == 0 or step == steps - 1:
            losses.append({"step": step + 1, "loss": distributed.average({"loss": loss})["loss"]})
    for buffer in classifier.buffers():  # running statistics of BatchNorm differ between processes
        if buffer.is_floating_point():
            buffer.copy_(distributed.all_reduce_sum(buffer) / world)
    skipped = [{"key": key, "reason": reason} for key, reason in dict(distributed.gather_lists(_named(dataset, bad))).items()]
    check_budget(skipped, len(dataset), config.max_bad_fraction, dataset.name)
    return losses, skipped


def _named(dataset: EvalSet, bad: dict[int, str]) -> list[tuple[str, str]]:
    return [(dataset.items[row].key, reason) for row, reason in sorted(bad.items())]


@torch.no_grad()
def classify(
    classifier: Classifier, dataset: EvalSet, model: Model, accelerator: Accelerator, config: Config
) -> tuple[Tensor, Tensor, list[dict[str, str]]]:
    """Classify the data set; the same on every process.

    Returns:
        (logits [m, C], labels [m], items that could not be used), in order.
    """
    device, view, mine = accelerator.device, center_view(model), part(len(dataset))
    classifier.eval()
    rows: list[int] = []
    bad: dict[int, str] = {}
    logits = [torch.empty(0, classifier.head.out_features, device=device)]
    plan = [list(mine[i : i + config.batch_size]) for i in range(0, len(mine), config.batch_size)]
    for batch in images(dataset, plan, view, config.threads, preprocess=model.preprocess):
        bad |= dict(batch.bad)
        if batch.rows:
            rows += batch.rows
            with autocast(model, device):
                logits.append(classifier(render(view, batch, device)).float())
    order = gather_rows(torch.tensor(rows, dtype=torch.int64, device=device)).cpu()
    skipped = [{"key": key, "reason": reason} for key, reason in distributed.gather_lists(_named(dataset, bad))]
    check_budget(skipped, len(dataset), config.max_bad_fraction, dataset.name)
    return gather_rows(torch.cat(logits)).cpu(), dataset.labels[order], skipped
