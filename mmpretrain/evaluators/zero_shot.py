"""Zero-shot classification (Radford 2021, section 3.1): an image belongs to the class whose prompts it is closest to."""

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
from torchvision.io import encode_png
from torchvision.transforms.v2.functional import resize

from mmpretrain.data.decode import ImageLimits, decode_image
from mmpretrain.errors import UnsuitableModelError
from mmpretrain.evaluators.base import OptionError
from mmpretrain.evaluators.baselines import BaselineConfig, measure
from mmpretrain.evaluators.data.datasets import DataConfig, EvalSet, first_items, kind_of, open_dataset
from mmpretrain.evaluators.data.items import Item, lines_of
from mmpretrain.evaluators.features import NO_FEATURES, encode_images, encode_texts
from mmpretrain.evaluators.metrics import classification_metrics, confusion_tables, predictions
from mmpretrain.types import Model, Result


@dataclass
class Config(BaselineConfig, DataConfig):
    train: str | None = None  # labelled data whose images `baselines` find neighbours among; default: the other images of the same data
    templates: str | list[str] | None = (
        None  # openai, simple, a file, or a list of prompts with {} or {c}; default: the data's own or simple
    )
    examples: int = 8  # right and wrong predictions to show in the report, of each


class ZeroShot:
    """acc1, acc5, mean_per_class_recall. Classes of the same name count as one; ties count against the model."""

    Config = Config

    def __init__(self, config: Config) -> None:
        self.config = config

    def preflight(self) -> None:
        self._prompts(first_items(self.config, "classification"), sure=kind_of(self.config.data) != "folder")
        if self.config.train is not None:
            first_items(self._train_config(), "classification")

    def _train_config(self) -> Config:
        assert self.config.train is not None
        return replace(self.config, data=self.config.train, subset=None, split=None, limit=None)

    def _prompts(self, dataset: EvalSet, sure: bool = True) -> list[str]:
        """`sure`: whether the data set's classes are known well enough to tell that all are numbers."""
        if sure and dataset.classes and self.config.classes is None and all(name.isdigit() for name in dataset.classes):
            raise OptionError(f"{dataset.name}: labels are numbers, and zero-shot needs names: add classes=FILE (one name a line)")
        return read_templates(self.config.templates, dataset.templates)

    def __call__(self, model: Model, accelerator: Accelerator) -> Result:
        config = self.config
        dataset = open_dataset(config, "classification")
        prompts = self._prompts(dataset)
        found = encode_images(model, dataset, accelerator, config)
        if "features" not in found.values:
            raise UnsuitableModelError(NO_FEATURES.format("zero_shot"))
        weights = class_embeddings(model, dataset.classes, prompts, accelerator, config.batch_size * 4)
        scores = normalize(found.values["features"], dim=-1) @ weights.T  # [m,C]
        labels = dataset.labels[found.rows]
        predicted = predictions(scores, labels)
        tables = confusion_tables(labels, predicted, dataset.classes)
        if accelerator.is_main_process and config.examples:
            tables["predictions"] = example_rows(dataset, found.rows, labels, predicted, scores, config.examples)
        if skipped := dataset.skipped + found.skipped:
            tables["skipped"] = skipped
        baselines: dict[str, float] = {}
        if config.baselines:
            train = None if config.train is None else open_dataset(self._train_config(), "classification")
            baselines = measure(config.baselines, train, dataset, accelerator, config.threads)
        metrics = classification_metrics(scores, labels) | {"chance": 1 / len(dataset.classes)}
        return Result(metrics, len(labels), dataset.name, tables, baselines=baselines)


def read_templates(chosen: str | Sequence[str] | None, own: list[str] | None = None) -> list[str]:
    """Prompts with exactly one placeholder `{}` or `{c}`, as format strings with `{}`. Raises OptionError."""
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
    """[C,E]: the mean of a class's normalised prompt embeddings, normalised again (Radford 2021, section 3.1.4)."""
    texts = [prompt.replace("{}", name) for name in classes for prompt in prompts]
    embedded = encode_texts(model, texts, accelerator, batch_size)  # [C*P,E]
    return normalize(embedded.unflatten(0, (len(classes), len(prompts))).mean(1), dim=-1)


def example_rows(dataset: EvalSet, rows: Tensor, labels: Tensor, predicted: Tensor, scores: Tensor, count: int) -> list[dict[str, Any]]:
    """Right and wrong predictions, `count` of each, evenly spaced over the data set so that every run shows the same."""
    shown = []
    for right in (True, False):
        where = torch.nonzero((labels == predicted) == right).flatten()
        for i in where[torch.linspace(0, len(where) - 1, min(count, len(where))).long()].tolist():
            item = dataset.items[rows[i]]
            shown.append(
                {
                    "thumbnail": base64.b64encode(thumbnail(item, dataset.limits)).decode(),
                    "key": item.key,
                    "truth": dataset.classes[labels[i]],
                    "predicted": dataset.classes[predicted[i]],
                    "score": scores[i, predicted[i]].item(),
                    "correct": right,
                }
            )
    return shown


def thumbnail(item: Item, limits: ImageLimits, side: int = 96) -> bytes:
    """PNG bytes of the image, its longer side at most `side` pixels."""
    image = decode_image(item.read(), limits)
    height, width = image.shape[1:]
    scale = min(1.0, side / max(height, width))
    return bytes(encode_png(resize(image, [max(1, round(height * scale)), max(1, round(width * scale))], antialias=True)).numpy())
