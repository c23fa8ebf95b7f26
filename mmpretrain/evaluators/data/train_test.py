"""Pairs of a training and a test set with the same classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mmpretrain.evaluators.base import OptionError
from mmpretrain.evaluators.data.datasets import DEFAULT_HOLDOUT, DataConfig, EvalSet, EvalSplit, first_items, kind_of, open_dataset


@dataclass
class TrainDataConfig(DataConfig):
    """The data options of evaluators that fit a classifier."""

    train: str | None = None  # data to fit on; default: the same data, another subset or a held-out part
    train_subset: str | None = None  # subset to fit on; default: train, where `subset` is given or the data has one


def open_pair(config: TrainDataConfig) -> tuple[EvalSet, EvalSet]:
    """Open (train, test) with one list of classes, matched by name. Raises OptionError for a test class without training data."""
    (train_config, train_subset), *tested = _sides(config)
    train = open_dataset(train_config, "classification", subset=train_subset)
    if not tested:
        return _held_out(train, config)
    test = open_dataset(tested[0][0], "classification", subset=tested[0][1])
    occurring = {test.classes[label] for label in test.labels.tolist()}
    unseen = sorted(occurring - set(train.classes))
    if unseen:
        raise OptionError(f"{test.name}: {len(unseen)} classes are not in {train.name}, first {unseen[0]!r}; its first {train.classes[:5]}")
    position = {name: i for i, name in enumerate(train.classes)}
    table = torch.tensor([position.get(name, -1) for name in test.classes])  # -1: a name that no item has
    test.labels, test.classes = table[test.labels], train.classes
    return train, test


def look_at_pair(config: TrainDataConfig) -> None:
    """Check the first items of both sets. Raises OptionError as `open_pair` would."""
    for side, subset in _sides(config):
        first_items(side, "classification", subset=subset)


def _sides(config: TrainDataConfig) -> list[tuple[TrainDataConfig, str | None]]:
    """Return the data to fit on and to test on, each with its subset; only one entry where it is to be divided."""
    whole = replace(config, limit=None, split=None)
    if config.train is None and config.train_subset is None and config.subset is None and not _has_subset(config):
        return [(whole, None)]
    test_subset = config.subset or (None if config.train is not None else "test")
    train_config = replace(whole, data=config.train or config.data)
    train_subset = config.train_subset or (None if config.train is not None and config.subset is None else "train")
    if (train_config.data, train_subset) == (config.data, test_subset):
        raise OptionError(f"the same data would be fitted and tested ({config.data}, subset {test_subset}): give train= or train_subset=")
    return [(train_config, train_subset), (config, test_subset)]


def _has_subset(config: TrainDataConfig) -> bool:
    root = Path(config.data)
    return kind_of(config.data) == "benchmark" or all((root / name).is_dir() for name in ("train", "test"))


def _held_out(everything: EvalSet, config: TrainDataConfig) -> tuple[EvalSet, EvalSet]:
    """Divide by the hash of the key, so that an item stays in its part when others are added or removed."""
    split = config.split or EvalSplit(DEFAULT_HOLDOUT)
    tested = everything.in_part(split)
    if tested.all() or not tested.any():
        raise OptionError(f"{everything.name}: holdout={split.holdout} of {len(everything)} items leaves one side empty")
    train, test = everything.subset(torch.nonzero(~tested).flatten()), everything.subset(torch.nonzero(tested).flatten())
    test.name = f"{everything.name}:{split.part}"
    test.skipped = []  # counted once, with the training part
    return train, test.drawn(config.limit, config.seed)
