"""Class names and indices of labels: reading class lists, matching labels by name, merging duplicate names.

The order of classes is deterministic: that of a list, that of a mapping label -> name, or without either that of the
sorted labels (integers by value, text by code point).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmpretrain.config.build import hint
from mmpretrain.data.formats import read_json
from mmpretrain.data.shards import load_classes
from mmpretrain.evaluators.base import OptionError

Label = str | int
logger = logging.getLogger(__name__)


def read_classes(option: str | Sequence[str] | dict | None) -> list[str] | dict[str, str] | None:
    """Read class names: `imagenet`, a text file (one name per line), a JSON file (a list, or a mapping label -> name), or the names.

    Raises:
        OptionError: there is no such file.
    """
    if option is None or isinstance(option, dict):
        return option if option is None else {str(k): str(v) for k, v in option.items()}
    if not isinstance(option, str):
        return [str(name) for name in option]
    if option == "imagenet":
        from open_clip import IMAGENET_CLASSNAMES
        from timm.data import ImageNetInfo

        # Folders of ImageNet are named by WordNet id, so the ids travel with the names.
        return dict(zip(ImageNetInfo("imagenet-1k").label_names(), IMAGENET_CLASSNAMES, strict=True))
    path = Path(option)
    if not path.is_file():
        raise OptionError(f"classes={option!r}: no such file; give `imagenet`, a .txt (a name a line), a .json, or a list of names")
    if path.suffix == ".json":
        return read_classes(read_json(path))
    return load_classes(option)


def resolve(labels: Sequence[Label], classes: list[str] | dict[str, str] | None, where: str) -> tuple[Tensor, list[str]]:
    """Match labels to class names.

    Args:
        labels: as on disk; integers index `classes`, texts are matched by name.
        classes: names, or label -> name; None: the labels themselves.
        where: the data, for messages.

    Returns:
        (int64 [n] indices, class names).

    Raises:
        OptionError: a label has no class.
    """
    numeric = all(isinstance(label, int) for label in labels)
    if classes is None:
        distinct = sorted(set(labels)) if numeric else sorted({str(label) for label in labels})
        index = {label: i for i, label in enumerate(distinct)}
        names = [str(label) if numeric else readable(str(label)) for label in distinct]
        return _indices([label if numeric else str(label) for label in labels], index), names
    names = list(classes.values()) if isinstance(classes, dict) else list(classes)
    if numeric:
        numbers = [int(label) for label in labels]
        largest, smallest = max(numbers, default=0), min(numbers, default=0)
        if isinstance(classes, dict) and all(key.lstrip("-").isdigit() for key in classes):
            index = {int(key): i for i, key in enumerate(classes)}
        elif smallest < 0 or largest >= len(names):
            raise OptionError(f"{where}: labels run from {smallest} to {largest}, but there are {len(names)} class names")
        else:
            index = {i: i for i in range(len(names))}
    else:
        keys = list(classes) if isinstance(classes, dict) else [readable(name) for name in names]
        index = {key: i for i, key in reversed(list(enumerate(keys)))}  # the first of equal names
        labels = [str(label) if isinstance(classes, dict) else readable(str(label)) for label in labels]
    unknown = sorted({str(label) for label in labels if label not in index})
    if unknown:
        raise OptionError(
            f"{where}: {len(unknown)} labels have no class name, first {unknown[0]!r}{hint(unknown[0], map(str, index))}"
            + '; class names are matched by name, not by position: give classes=FILE.json with {"label": "name", ...}'
        )
    return _indices(labels, index), names


def merge_duplicates(labels: Tensor, names: list[str]) -> tuple[Tensor, list[str]]:
    """Merge classes of the same name, which cannot be distinguished by name.

    (ImageNet has two "missile" and two "sunglasses".) Names that differ only in letter case or spaces are kept apart.
    """
    first = {name: i for i, name in reversed(list(enumerate(names)))}
    if len(first) == len(names):
        return labels, names
    kept = sorted(first.values())
    position = {old: new for new, old in enumerate(kept)}
    table = torch.tensor([position[first[name]] for name in names])
    twice = sorted({name for name in names if names.count(name) > 1}) if len(names) <= 10000 else []
    logger.warning(
        "%d class names occur more than once and are evaluated as one class each: %s",
        len(names) - len(first),
        ", ".join(twice[:10]),
    )
    return table[labels], [names[i] for i in kept]


def readable(name: str) -> str:
    """Convert a folder name to words: `traffic_light` -> `traffic light`."""
    return re.sub(r"[\s_]+", " ", name).strip()


def _indices(labels: Sequence[Label], index: dict) -> Tensor:
    return torch.tensor([index.get(label, -1) for label in labels], dtype=torch.int64)
