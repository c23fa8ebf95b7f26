"""The evaluator `binding`: whether images are closer to their caption than to one with swapped attributes. Chance is one half."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator
from torch.nn.functional import normalize

from mmpretrain.errors import UnsuitableModelError
from mmpretrain.evaluators.base import OptionError
from mmpretrain.evaluators.data.datasets import DataConfig, EvalSet, first_items, open_dataset
from mmpretrain.evaluators.features import NO_FEATURES, encode_images, encode_texts
from mmpretrain.types import Model, Result


@dataclass
class Config(DataConfig):
    """Options of `binding`."""


class Binding:
    """binding_acc over shards whose JSON member has `caption` and `swap`. A tie counts as wrong."""

    Config = Config

    def __init__(self, config: Config) -> None:
        self.config = config

    def preflight(self) -> None:
        """Check the first items."""
        self._check(first_items(self.config, "images"))

    @staticmethod
    def _check(dataset: EvalSet) -> None:
        lacking = [item.key for item in dataset.items if not {"caption", "swap"} <= item.metadata.keys()]
        if lacking:
            raise OptionError(f"{dataset.name}: {len(lacking)} samples have no `caption` and `swap` in their json, first {lacking[0]}")

    def __call__(self, model: Model, accelerator: Accelerator) -> Result:
        config = self.config
        dataset = open_dataset(config, "images")
        self._check(dataset)
        encoded = encode_images(model, dataset, accelerator, config)
        if "features" not in encoded.values:
            raise UnsuitableModelError(NO_FEATURES.format("binding"))
        used = [dataset.items[row] for row in encoded.rows.tolist()]
        texts = [str(item.metadata[name]) for item in used for name in ("caption", "swap")]
        text = encode_texts(model, texts, accelerator, config.batch_size * 4).unflatten(0, (len(used), 2))  # [n,2,E]
        cosine = (normalize(encoded.values["features"], dim=-1)[:, None] * text).sum(-1)
        right = cosine[:, 0] > cosine[:, 1]
        tables = {}
        if skipped := dataset.skipped + encoded.skipped:
            tables["skipped"] = skipped
        return Result({"binding_acc": right.double().mean().item()}, len(used), dataset.name, tables)
