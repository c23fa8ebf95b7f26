"""Class names travel with labels: from what is written on disk to (index, name), never by position in two lists alone.

The order is stated and deterministic. With `classes` a list, its order; with a mapping label -> name, the mapping's order;
otherwise the labels found, sorted (integers by value, text by code point).
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmpretrain.data.formats import read_json
from mmpretrain.data.shards import load_classes
from mmpretrain.evaluators.base import OptionError

Label = str | int
logger = logging.getLogger(__name__)


def read_classes(option: str | Sequence[str] | dict | None) -> list[str] | dict[str, str] | None:
    """`imagenet`, a text file (one name a line), a JSON file (a list, or a mapping label -> name), or the names themselves."""
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
    """Labels as found on disk -> (int64 [n] indices, class names).

    Integer labels index `classes`; text labels are looked up by name. Raises OptionError where a label has no class.
    """
    numeric = all(isinstance(label, int) for label in labels)
    if classes is None:
        found = sorted(set(labels)) if numeric else sorted({str(label) for label in labels})
        index = {label: i for i, label in enumerate(found)}
        names = [str(label) if numeric else readable(str(label)) for label in found]
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
        near = difflib.get_close_matches(unknown[0], [str(key) for key in index], n=1)
        raise OptionError(
            f"{where}: {len(unknown)} labels have no class name, first {unknown[0]!r}"
            + (f" (nearest name {near[0]!r})" if near else "")
            + '; class names are matched by name, not by position: give classes=FILE.json with {"label": "name", ...}'
        )
    return _indices(labels, index), names


def merge_duplicates(labels: Tensor, names: list[str]) -> tuple[Tensor, list[str]]:
    """One class for each distinct name: two classes called the same cannot be told apart by name, so they are one.

    (ImageNet has two "missile" and two "sunglasses".) Names differing only in letter case or spaces stay apart.
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
    """A folder name as words: `traffic_light` -> `traffic light`."""
    return re.sub(r"[\s_]+", " ", name).strip()


def _indices(labels: Sequence[Label], index: dict) -> Tensor:
    return torch.tensor([index.get(label, -1) for label in labels], dtype=torch.int64)
