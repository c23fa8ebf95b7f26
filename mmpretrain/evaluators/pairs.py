"""Two data sets, one to fit on and one to test on, whose labels mean the same classes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from ..types import Model
from .base import OptionError
from .datasets import DataConfig, EvalSet, kind_of, open_dataset
from .features import encode_images


@dataclass
class TrainDataConfig(DataConfig):
    train: str | None = None  # data to fit on; default: the same data, another split or a held-out part
    train_split: str | None = None  # split to fit on; default: train, where `split` is given or the data has one
    holdout: float = 0.2  # without `train` and splits: the fraction of items, by key hash, that is tested on and not fitted


@dataclass
class EncodedPair:
    """Features on the CPU, on every process, of both sets."""

    name: str
    classes: list[str]
    train: dict[str, Tensor]  # "pooled" [m,D], "features" [m,E]
    train_labels: Tensor
    test: dict[str, Tensor]
    test_labels: Tensor
    skipped: list[dict[str, str]]

    def feature_sets(self, wanted: str) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        """(name, metric prefix, train, test) for `pooled`, `features`, or `both` of them where the model gives both."""
        names = [name for name in ("pooled", "features") if name in self.train] if wanted == "both" else [wanted]
        if missing := [name for name in names if name not in self.train]:
            raise OptionError(f"features={missing[0]}: this model gives only {', '.join(self.train)}")
        for name in names:
            yield name, "features_" if wanted == "both" and name == "features" else "", self.train[name], self.test[name]


def open_pair(config: TrainDataConfig) -> tuple[EvalSet, EvalSet]:
    """(train, test) over one list of classes, matched by name. Raises OptionError where the test set has a class never fitted."""
    if config.train is None and config.train_split is None and config.split is None and not _has_split(config):
        return _held_out(open_dataset(replace(config, limit=None), "classification"), config)
    test_split = config.split or (None if config.train is not None else "test")
    train_config = replace(config, data=config.train or config.data, limit=None)
    train_split = config.train_split or (None if config.train is not None and config.split is None else "train")
    if (train_config.data, train_split) == (config.data, test_split):
        raise OptionError(f"the same data would be fitted and tested ({config.data}, split {test_split}): give train= or train_split=")
    train = open_dataset(train_config, "classification", split=train_split)
    test = open_dataset(config, "classification", split=test_split)
    unseen = [name for name in test.classes if name not in train.classes]
    if unseen:
        raise OptionError(f"{test.name}: {len(unseen)} classes are not in {train.name}, first {unseen[0]!r}; its first {train.classes[:5]}")
    table = torch.tensor([train.classes.index(name) for name in test.classes])
    test.labels, test.classes = table[test.labels], train.classes
    return train, test


def _has_split(config: TrainDataConfig) -> bool:
    root = Path(config.data)
    return kind_of(config.data) == "benchmark" or all((root / name).is_dir() for name in ("train", "test"))


def _held_out(everything: EvalSet, config: TrainDataConfig) -> tuple[EvalSet, EvalSet]:
    """Divide by the hash of the key: an item stays on its side when others come or go."""
    draws = [
        int.from_bytes(hashlib.blake2b(item.key.encode("utf-8", "surrogateescape"), digest_size=6).digest(), "big")
        for item in everything.items
    ]
    tested = torch.tensor(draws, dtype=torch.float64) / 2**48 < config.holdout
    if tested.all() or not tested.any():
        raise OptionError(f"{everything.name}: holdout={config.holdout} of {len(everything)} items leaves one side empty")
    train, test = everything.subset(torch.nonzero(~tested).flatten()), everything.subset(torch.nonzero(tested).flatten())
    test.name = f"{everything.name}:holdout"
    test.skipped = []  # counted once, with the training part
    if config.limit is not None:
        test = test.subset(torch.arange(min(config.limit, len(test))))
    return train, test


def encode_pair(model: Model, accelerator: Accelerator, config: TrainDataConfig) -> EncodedPair:
    train, test = open_pair(config)
    fitted = encode_images(model, train, accelerator, config)
    tested = encode_images(model, test, accelerator, config)
    return EncodedPair(
        name=test.name,
        classes=train.classes,
        train=fitted.values,
        train_labels=train.labels[fitted.rows],
        test=tested.values,
        test_labels=test.labels[tested.rows],
        skipped=train.skipped + test.skipped + fitted.skipped + tested.skipped,
    )
