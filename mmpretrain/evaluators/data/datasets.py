"""Data sets for evaluation: items with labels and class names, filtering and division, and a budget of unusable items."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from mmpretrain.data.decode import ImageLimits
from mmpretrain.data.folders import named_as_image
from mmpretrain.data.formats import read_text
from mmpretrain.data.holdout import in_part
from mmpretrain.data.schema import BadSampleBudgetError
from mmpretrain.data.shard_names import is_remote
from mmpretrain.data.shards import load_classes
from mmpretrain.data.source_config import SplitConfig
from mmpretrain.evaluators.base import OptionError
from mmpretrain.evaluators.data import class_names, items
from mmpretrain.evaluators.data.items import Item, settle_labels
from mmpretrain.rng import combine, permutation
from mmpretrain.types import Preprocess

logger = logging.getLogger(__name__)
Task = Literal["classification", "retrieval", "images"]
BRIEF_ROWS = 100  # of a table, for a check before a run
DEFAULT_HOLDOUT = 0.2  # share tested and not fitted, for probes without `train`, subsets and `split`


@dataclass
class EvalSplit(SplitConfig):
    """The part of the data to evaluate on."""

    part: str = "holdout"  # train or holdout: which part to evaluate on


@dataclass
class DataConfig:
    """The data options of every evaluator."""

    data: str  # class folder, CSV file, shards (globs, braces, or a folder of tars), or CLIP_benchmark folder
    subset: str | None = None  # subfolder (class folder, shards), or value of the column `split` (CSV); CLIP_benchmark: test
    image: str | None = None  # CSV column with the image file; in shards the member that is the image (png), default: the first there is
    label: str | None = None  # CSV column with the label; in shards a member (cls) or json:FIELD
    caption: str | None = None  # CSV column or template '{name}: {keywords}'; in shards a member (txt) or json:FIELD (a text or a list)
    classes: str | list[str] | dict[str, str] | None = None  # class names: imagenet, a .txt or .json file, a list, or a mapping label: name
    exclude: str | None = None  # regular expression: leave out classes whose name matches (retrieval: items all of whose captions do)
    include: str | None = None  # regular expression: keep only classes whose name matches (retrieval: items with a caption that does)
    split: EvalSplit | None = None  # evaluate on a part, divided as by a source's `split`; default of probes: holdout 0.2
    limit: int | None = None  # evaluate on this number of items, drawn by `seed`
    background: tuple[int, int, int] | None = None  # colour behind transparent images: red, green, blue, 0..255; default: the model's
    batch_size: int = 64  # images a forward, on each process
    threads: int = 4  # threads that read and decode ahead, on each process
    cache: str | None = None  # folder to keep features in, keyed by weights and data
    max_bad_fraction: float = 0.01  # fail when more than this fraction of the items cannot be used
    seed: int = 0  # what is drawn (limit, held-out parts, initial weights) depends on it alone

    @classmethod
    def upgraded(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Replace earlier spellings of options (`split=NAME`, `train_split=NAME`, `holdout=0.1 part=train`), with a warning."""
        options, written = dict(options), {}
        if not isinstance(options.get("split"), Mapping | SplitConfig | None):
            written["subset"] = options.pop("split")
        probe = "train_subset" in cls.__dataclass_fields__
        if probe and (train := options.pop("train_split", None)) is not None:
            written["train_subset"] = train
        holdout, part = options.pop("holdout", None), options.pop("part", None)
        holdout = yaml.safe_load(holdout) if isinstance(holdout, str) else holdout
        if holdout is not None or (probe and part == "train"):
            written["split"] = {"holdout": DEFAULT_HOLDOUT if holdout is None else holdout, "part": part or EvalSplit.part}
        if both := [name for name in written if options.get(name) is not None]:
            raise OptionError(f"{both[0]} is given twice, as {options[both[0]]!r} and in an earlier spelling as {written[both[0]]!r}")
        if written:
            logger.warning(
                "earlier spelling of options; write %s", yaml.safe_dump(written, default_flow_style=True, sort_keys=False).strip()[1:-1]
            )
        return options | written

    def __post_init__(self) -> None:
        for name in ("batch_size", "threads", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")


@dataclass
class EvalSet:
    """Items in a fixed order. `labels` index `classes`; for retrieval both are empty, and every item has captions."""

    name: str
    items: list[Item]
    labels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # [n]
    classes: list[str] = field(default_factory=list)
    templates: list[str] | None = None  # the data set's own prompts, if it has any
    background: tuple[int, int, int] | None = None  # behind transparent images; None: the model's
    skipped: list[dict[str, str]] = field(default_factory=list)  # {key, reason} of items that cannot be used

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        """Return a digest of the images without labels: features depend on the images alone."""
        digest = hashlib.sha256(repr(ImageLimits(background=self.background or "")).encode())
        for item in self.items:
            digest.update(f"{item.key}\0{item.size}\0{item.stamp}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def limits(self, preprocess: Preprocess | None = None) -> ImageLimits:
        """How its images are decoded, for a model of that preprocessing."""
        behind = self.background or (preprocess.opaque() if preprocess is not None else Preprocess.background)
        return ImageLimits(background=behind)

    def subset(self, rows: Tensor) -> EvalSet:
        """Return the items of `rows`, with the same classes."""
        picked = [self.items[i] for i in rows.tolist()]
        return replace(self, items=picked, labels=self.labels[rows] if len(self.labels) else self.labels)

    def drawn(self, limit: int | None, seed: int) -> EvalSet:
        """Return `limit` items drawn by `seed`; all where there are not more."""
        if limit is None or limit >= len(self):
            return self
        return self.subset(permutation(combine(seed, len(self)), len(self))[:limit].sort().values)

    def in_part(self, split: SplitConfig) -> Tensor:
        """Return which items belong to a part, bool [n], by the rule of training sources (mmpretrain.data.holdout.in_part)."""
        return torch.from_numpy(in_part([item.bare_key for item in self.items], split.holdout, split.part))


def kind_of(data: str) -> Literal["benchmark", "folder", "csv", "shards"]:
    """Recognise the kind of `data`. Raises OptionError for an unknown kind."""
    path = Path(data)
    if path.is_dir():
        if any(path.glob("*/nshards.txt")):
            return "benchmark"
        if any(path.glob("*.tar")) or (any(path.glob("*/*.tar")) and not any(named_as_image(file.name) for file in path.glob("*/*"))):
            return "shards"
        if any(p.is_dir() for p in path.iterdir()):
            return "folder"
        tables = sorted(p.name for p in path.glob("*.csv"))
        raise OptionError(
            f"data={data!r}: neither class folders nor .tar shards in it" + (f"; name its table {tables[0]}" if tables else "")
        )
    if path.suffix.lower() in (".csv", ".tsv"):
        if not path.is_file():
            raise OptionError(f"data={data!r}: no such file")
        return "csv"
    if re.search(r"\.tar\b|\*|\{.*\.\..*\}|::", data):
        return "shards"
    raise OptionError(f"data={data!r}: no such folder, .csv or .tsv file, or shards")


def open_dataset(config: DataConfig, task: Task, *, subset: str | None = None) -> EvalSet:
    """List the items of a data set.

    Args:
        config: data and filters.
        task: classification reads labels, retrieval captions, "images" the JSON metadata only.
        subset: instead of `config.subset`.

    Raises:
        OptionError: options and data do not fit.
        BadSampleBudgetError: too many items cannot be used.
    """
    subset = subset if subset is not None else config.subset
    skipped: list[dict[str, str]] = []

    def skip(key: str, reason: str) -> None:
        skipped.append({"key": key, "reason": reason})

    source, given, templates, subset = _source(config, task, subset, skip)
    items = list(source)
    check_budget(skipped, len(items) + len(skipped), config.max_bad_fraction, config.data)
    if not items:
        raise OptionError(f"data={config.data!r}: no items to evaluate (subset={subset})")
    if config.background is not None and not all(0 <= part <= 255 for part in config.background):
        raise OptionError(f"background={list(config.background)}: expected three numbers from 0 to 255, such as [255, 255, 255]")
    result = EvalSet(_name(config.data, subset), items, templates=templates, background=config.background, skipped=skipped)
    if task == "classification":
        if kind_of(config.data) != "folder":
            settle_labels(items)
        result.labels, names = class_names.resolve(_labels(items), given, config.data)
        result.labels, result.classes = class_names.merge_duplicates(result.labels, names)
    result = _filtered(result, config, task)
    if config.split is not None:
        result = _part(result, config.split)
    return result.drawn(config.limit, config.seed)


def first_items(config: DataConfig, task: Task, *, subset: str | None = None, max_items: int = 100) -> EvalSet:
    """List the first items, to check a data set before a run: of one shard, class folder or some rows, and never of remote data.

    Args:
        config: data and filters.
        task: see `open_dataset`.
        subset: instead of `config.subset`.
        max_items: greatest number of items.

    Raises:
        OptionError: options and data do not fit, as in `open_dataset`.
    """
    subset = subset if subset is not None else config.subset
    bad: list[tuple[str, str]] = []  # (key, reason)
    source, given, templates, subset = _source(config, task, subset, lambda key, reason: bad.append((key, reason)), brief=True)
    items = list(islice(source, max_items))
    result = EvalSet(_name(config.data, subset), items, templates=templates)
    if not items and not bad and not _remote(config.data):
        raise OptionError(f"data={config.data!r}: no items to evaluate (subset={subset})")
    if not items and 0 < len(bad) < BRIEF_ROWS and kind_of(config.data) == "csv":  # all rows were read
        key, reason = bad[0]
        raise OptionError(f"{config.data}, {key}: {reason.rstrip('.')}. None of the {len(bad)} rows can be used.")
    if items and task == "classification":
        if kind_of(config.data) != "folder":
            settle_labels(items)
        result.labels, result.classes = class_names.resolve(_labels(items), given, config.data)
    _patterns(config)
    return result


def _labels(listed: list[Item]) -> list[class_names.Label]:
    labels = [item.label for item in listed if item.label is not None]
    assert len(labels) == len(listed)  # for classification, `_source` leaves out items without a label
    return labels


def _remote(data: str) -> bool:
    return any(is_remote(part) for part in data.split("::"))


def _source(
    config: DataConfig, task: Task, subset: str | None, skip: items.Skip, brief: bool = False
) -> tuple[Iterator[Item], list[str] | dict[str, str] | None, list[str] | None, str | None]:
    """Return (items, class names, prompts, subset); items are listed lazily. `brief`: of the first shard or rows alone."""
    kind = kind_of(config.data)
    captions = task == "retrieval"
    if task == "images" and (config.include is not None or config.exclude is not None):
        raise OptionError("include= and exclude= choose by class name or caption, which this evaluator does not read: leave them out")
    root = Path(config.data)
    templates = None
    given = class_names.read_classes(config.classes)
    if kind == "folder":
        if captions:
            raise OptionError(f"data={config.data!r} is a class folder: it has no captions; use a CSV, shards, or a CLIP_benchmark folder")
        source = items.folder_items(root, subset, skip)
    elif kind == "csv":
        rows = BRIEF_ROWS if brief else None
        source = items.csv_items(root, subset, config.image, config.label, config.caption, captions, skip, rows)
    elif kind == "benchmark":
        subset = subset or "test"
        what = _line(root / "dataset_type.txt") or "classification"
        if what == "multilabel" or (what == "retrieval") != captions:
            raise OptionError(f"{root}: dataset_type.txt says {what}; it does not fit an evaluator for {task}")
        given, templates = _beside(root, given)
        source = items.benchmark_items(root, subset, config.image, config.label, captions, skip, brief)
    else:
        label = {"classification": config.label or "cls", "retrieval": None, "images": None}[task]
        paths = items.shard_paths(config.data, subset)
        given, templates = _beside(Path(paths[0]).parent, given)
        caption = (config.caption or "txt") if captions else None
        chosen = [name for name in paths[:1] if not is_remote(name)] if brief else paths
        source = items.shard_items(chosen, label, caption, skip, image=config.image, metadata=task == "images") if chosen else iter(())
    return source, given, templates, subset


def check_budget(skipped: list[dict[str, str]], total: int, max_fraction: float, where: str) -> None:
    """Raise BadSampleBudgetError, with counts and examples, where too many items are bad; else log what is left out."""
    if not skipped:
        return
    reasons: dict[str, int] = {}
    for entry in skipped:
        reason = entry["reason"].split(":")[0]
        reasons[reason] = reasons.get(reason, 0) + 1
    counted = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    examples = ", ".join(f"{entry['key']} ({entry['reason']})" for entry in skipped[:3])
    message = f"{where}: {len(skipped)} of {total} items cannot be used ({counted}), for example {examples}"
    if len(skipped) > max_fraction * total:
        raise BadSampleBudgetError(f"{message}; more than max_bad_fraction={max_fraction}: repair the data, or raise the budget")
    logger.warning("%s", message)


def _filtered(dataset: EvalSet, config: DataConfig, task: str) -> EvalSet:
    """Apply `include` and `exclude` to class names, or for retrieval to captions."""
    if config.include is None and config.exclude is None:
        return dataset
    patterns = _patterns(config)
    choices = [item.captions for item in dataset.items] if task == "retrieval" else [[name] for name in dataset.classes]
    what = "captions" if task == "retrieval" else "class names"
    kept = torch.ones(len(choices), dtype=torch.bool)
    if patterns["include"] is not None:
        kept &= torch.tensor([any(map(patterns["include"].search, texts)) for texts in choices])
        if not kept.any():
            raise OptionError(f"{dataset.name}: include={config.include!r} matches none of the {what}, such as {_some(choices)}")
    if patterns["exclude"] is not None:
        dropped = torch.tensor([all(map(patterns["exclude"].search, texts)) for texts in choices])
        if not dropped.any():
            logger.warning("%s: exclude=%r matches none of the %s, such as %s", dataset.name, config.exclude, what, _some(choices))
        kept &= ~dropped
    if task == "retrieval":
        result = dataset.subset(torch.nonzero(kept).flatten())
    else:
        position = torch.cumsum(kept, 0) - 1  # of a kept class among the kept
        result = dataset.subset(torch.nonzero(kept[dataset.labels]).flatten())
        result.labels = position[result.labels]
        result.classes = [name for name, keep in zip(dataset.classes, kept.tolist(), strict=True) if keep]
    if not len(result):
        raise OptionError(f"{dataset.name}: no items are left by include={config.include!r}, exclude={config.exclude!r}")
    return result


def _patterns(config: DataConfig) -> dict[str, re.Pattern | None]:
    patterns = {}
    for key in ("include", "exclude"):
        try:
            patterns[key] = re.compile(getattr(config, key)) if getattr(config, key) is not None else None
        except re.error as error:
            raise OptionError(f"{key}={getattr(config, key)!r} is not a regular expression: {error}") from None
    return patterns


def _some(choices: list[list[str]]) -> str:
    return ", ".join(repr(texts[0]) for texts in choices[:5])


def _part(dataset: EvalSet, split: SplitConfig) -> EvalSet:
    rows = torch.nonzero(dataset.in_part(split)).flatten()
    if not len(rows):
        raise OptionError(f"{dataset.name}: the {split.part} part of holdout={split.holdout} holds none of {len(dataset)} items")
    result = dataset.subset(rows)
    result.name = f"{dataset.name}:{split.part}"
    return result


def _beside(folder: Path, given: list[str] | dict[str, str] | None) -> tuple[list[str] | dict[str, str] | None, list[str] | None]:
    """Read class names, unless given, and prompts from the text files that CLIP_benchmark and `data_prep` put beside shards."""
    names, prompts = folder / "classnames.txt", folder / "zeroshot_classification_templates.txt"
    if given is None and names.is_file():
        given = [class_names.readable(name) for name in load_classes(str(names)) or []]  # as for the folders that they may come from
    return given, items.lines_of(prompts) if prompts.is_file() else None


def _line(path: Path) -> str | None:
    return read_text(path).strip() if path.is_file() else None


def _name(data: str, subset: str | None) -> str:
    return f"{data}:{subset}" if subset else data
