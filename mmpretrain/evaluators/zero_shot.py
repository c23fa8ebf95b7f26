"""The evaluator `zero_shot`: classification by the class whose prompts are closest to the image."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import normalize

from mmpretrain.data.decode import decode_image
from mmpretrain.data.thumbnails import thumbnail
from mmpretrain.errors import UnsuitableModelError
from mmpretrain.evaluators.base import OptionError
from mmpretrain.evaluators.baselines import BaselineConfig, measure
from mmpretrain.evaluators.data.datasets import DataConfig, EvalSet, first_items, kind_of, open_dataset
from mmpretrain.evaluators.data.items import lines_of
from mmpretrain.evaluators.features import NO_FEATURES, encode_images, encode_texts
from mmpretrain.evaluators.metrics import classification_metrics, confusion_tables, predictions
from mmpretrain.types import Model, Result

THUMBNAIL_SIDE = 96  # pixels


@dataclass
class Config(BaselineConfig, DataConfig):
    """Options of `zero_shot`."""

    train: str | None = None  # labelled data, whose images are the neighbours of `baselines`; default: the other images of the same data
    templates: str | list[str] | None = (
        None  # openai, simple, a file, or a list of prompts with {} or {c}; default: the data's own or simple
    )
    examples: int = 8  # right and wrong predictions to show in the report, of each


class ZeroShot:
    """acc1, acc5, mean_per_class_recall. Classes of the same name count as one; ties count against the model.

    Source: Radford et al. 2021 (CLIP), section 3.1.
    """

    Config = Config

    def __init__(self, config: Config) -> None:
        self.config = config

    def preflight(self) -> None:
        """Check the first items and the prompts."""
        self._prompts(first_items(self.config, "classification"), sure=kind_of(self.config.data) != "folder")
        if self.config.train is not None:
            first_items(self._train_config(), "classification")

    def _train_config(self) -> Config:
        assert self.config.train is not None
        return replace(self.config, data=self.config.train, subset=None, split=None, limit=None)

    def _prompts(self, dataset: EvalSet, sure: bool = True) -> list[str]:
        """Return the prompts. Raises OptionError where all class names are numbers, if `sure` that these are the class names."""
        if sure and dataset.classes and self.config.classes is None and all(name.isdigit() for name in dataset.classes):
            raise OptionError(f"{dataset.name}: labels are numbers, and zero-shot needs names: add classes=FILE (one name a line)")
        return read_templates(self.config.templates, dataset.templates)

    def __call__(self, model: Model, accelerator: Accelerator) -> Result:
        config = self.config
        dataset = open_dataset(config, "classification")
        prompts = self._prompts(dataset)
        encoded = encode_images(model, dataset, accelerator, config)
        if "features" not in encoded.values:
            raise UnsuitableModelError(NO_FEATURES.format("zero_shot"))
        weights = class_embeddings(model, dataset.classes, prompts, accelerator, config.batch_size * 4)
        scores = normalize(encoded.values["features"], dim=-1) @ weights.T  # [m,C]
        labels = dataset.labels[encoded.rows]
        predicted = predictions(scores, labels)
        tables = confusion_tables(labels, predicted, dataset.classes)
        if accelerator.is_main_process and config.examples:
            tables["predictions"] = example_rows(dataset, encoded.rows, labels, predicted, scores, config.examples)
        if skipped := dataset.skipped + encoded.skipped:
            tables["skipped"] = skipped
        baselines: dict[str, float] = {}
        if config.baselines:
            train = None if config.train is None else open_dataset(self._train_config(), "classification")
            baselines = measure(config.baselines, train, dataset, accelerator, config.threads)
        metrics = classification_metrics(scores, labels) | {"chance": 1 / len(dataset.classes)}
        return Result(metrics, len(labels), dataset.name, tables, baselines=baselines)


def read_templates(chosen: str | Sequence[str] | None, own: list[str] | None = None) -> list[str]:
    """Return prompts with exactly one placeholder, `{}`.

    Args:
        chosen: "openai", "simple", a file, or prompts with `{}` or `{c}`; None: `own`, else simple.
        own: the data set's prompts.

    Raises:
        OptionError: a prompt without a placeholder, or with several.
    """
    if chosen is None and own:
        prompts = list(own)
    elif chosen in (None, "openai", "simple"):
        import open_clip

        functions = open_clip.OPENAI_IMAGENET_TEMPLATES if chosen == "openai" else open_clip.SIMPLE_IMAGENET_TEMPLATES
        prompts = [function("{c}") for function in functions]
    elif isinstance(chosen, str) and "{" not in chosen:
        if not Path(chosen).is_file():
            raise OptionError(f"templates={chosen!r}: expected openai, simple, a file, or prompts with {{c}}")
        prompts = lines_of(Path(chosen))
    else:
        prompts = [chosen] if isinstance(chosen, str) else [str(prompt) for prompt in chosen]
    wrong = [prompt for prompt in prompts if prompt.count("{}") + prompt.count("{c}") != 1]
    if wrong or not prompts:
        raise OptionError(f"templates: expected one {{}} or {{c}} in each prompt, found {wrong[0] if wrong else 'no prompt'!r}")
    return [prompt.replace("{c}", "{}") for prompt in prompts]


def class_embeddings(model: Model, classes: list[str], prompts: list[str], accelerator: Accelerator, batch_size: int) -> Tensor:
    """Average each class's normalised prompt embeddings, and normalise again: [C, E]. Radford et al. 2021, section 3.1.4."""
    texts = [prompt.replace("{}", name) for name in classes for prompt in prompts]
    embedded = encode_texts(model, texts, accelerator, batch_size)  # [C*P,E]
    return normalize(embedded.unflatten(0, (len(classes), len(prompts))).mean(1), dim=-1)


def example_rows(dataset: EvalSet, rows: Tensor, labels: Tensor, predicted: Tensor, scores: Tensor, count: int) -> list[dict[str, Any]]:
    """Choose right and wrong predictions, `count` of each, evenly spaced over the data set: every run shows the same items."""
    shown = []
    for right in (True, False):
        where = torch.nonzero((labels == predicted) == right).flatten()
        for i in where[torch.linspace(0, len(where) - 1, min(count, len(where))).long()].tolist():
            item = dataset.items[rows[i]]
            pixels = decode_image(item.read(), dataset.limits()).permute(1, 2, 0).numpy()
            shown.append(
                {
                    "thumbnail": base64.b64encode(thumbnail(pixels, THUMBNAIL_SIDE, "PNG")).decode(),
                    "key": item.key,
                    "truth": dataset.classes[labels[i]],
                    "predicted": dataset.classes[predicted[i]],
                    "score": scores[i, predicted[i]].item(),
                    "correct": right,
                }
            )
    return shown
