"""Two data sets, one to fit on and one to test on, whose labels mean the same classes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mmpretrain.evaluators.base import OptionError
from mmpretrain.evaluators.data.datasets import DataConfig, EvalSet, first_items, kind_of, open_dataset

HOLDOUT = 0.2  # what is tested on and not fitted, without `train`, splits and `holdout`


@dataclass
class TrainDataConfig(DataConfig):
    train: str | None = None  # data to fit on; default: the same data, another split or a held-out part
    train_split: str | None = None  # split to fit on; default: train, where `split` is given or the data has one


def open_pair(config: TrainDataConfig) -> tuple[EvalSet, EvalSet]:
    """(train, test) over one list of classes, matched by name. Raises OptionError where the test set has a class never fitted."""
    (train_config, train_split), *tested = _sides(config)
    train = open_dataset(train_config, "classification", split=train_split)
    if not tested:
        return _held_out(train, config)
    test = open_dataset(tested[0][0], "classification", split=tested[0][1])
    occurring = {test.classes[label] for label in test.labels.tolist()}
    unseen = sorted(occurring - set(train.classes))
    if unseen:
        raise OptionError(f"{test.name}: {len(unseen)} classes are not in {train.name}, first {unseen[0]!r}; its first {train.classes[:5]}")
    position = {name: i for i, name in enumerate(train.classes)}
    table = torch.tensor([position.get(name, -1) for name in test.classes])  # -1: a name that no item has
    test.labels, test.classes = table[test.labels], train.classes
    return train, test


def look_at_pair(config: TrainDataConfig) -> None:
    """Raise OptionError where the first items of either set show that `open_pair` would."""
    for side, split in _sides(config):
        first_items(side, "classification", split=split)


def _sides(config: TrainDataConfig) -> list[tuple[TrainDataConfig, str | None]]:
    """What is opened, with its split: the data to fit on, then those to test on; one alone that is to be divided."""
    whole = replace(config, limit=None, holdout=None)
    if config.train is None and config.train_split is None and config.split is None and not _has_split(config):
        return [(whole, None)]
    test_split = config.split or (None if config.train is not None else "test")
    train_config = replace(whole, data=config.train or config.data)
    train_split = config.train_split or (None if config.train is not None and config.split is None else "train")
    if (train_config.data, train_split) == (config.data, test_split):
        raise OptionError(f"the same data would be fitted and tested ({config.data}, split {test_split}): give train= or train_split=")
    return [(train_config, train_split), (config, test_split)]


def _has_split(config: TrainDataConfig) -> bool:
    root = Path(config.data)
    return kind_of(config.data) == "benchmark" or all((root / name).is_dir() for name in ("train", "test"))


def _held_out(everything: EvalSet, config: TrainDataConfig) -> tuple[EvalSet, EvalSet]:
    """Divide by the hash of the key: an item stays on its side when others come or go."""
    holdout = HOLDOUT if config.holdout is None else config.holdout
    if not 0 < holdout < 1:
        raise OptionError(f"holdout={holdout}: expected a share between 0 and 1")
    tested = everything.in_part(holdout, config.part)
    if tested.all() or not tested.any():
        raise OptionError(f"{everything.name}: holdout={holdout} of {len(everything)} items leaves one side empty")
    train, test = everything.subset(torch.nonzero(~tested).flatten()), everything.subset(torch.nonzero(tested).flatten())
    test.name = f"{everything.name}:{config.part}"
    test.skipped = []  # counted once, with the training part
    return train, test.drawn(config.limit, config.seed)
