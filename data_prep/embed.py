"""Embeddings of images and image-text similarities of samples, under a model.

The model runs in the process of the command, in batches: it is large, needs the accelerator or all cores to itself, and
is loaded once. Threads read and decode ahead.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from data_prep.shards.read import Place, Shard, captions, image_member
from mmpretrain.checkpoint import find_checkpoint
from mmpretrain.data.decode import ImageLimits
from mmpretrain.data.fields import member_of
from mmpretrain.data.schema import BadSample
from mmpretrain.errors import UnsuitableModelError
from mmpretrain.evaluators.data.items import Item
from mmpretrain.evaluators.features import NO_FEATURES, center_view, check_finite, cut
from mmpretrain.evaluators.models import load_model
from mmpretrain.types import Params

BATCH = 64
LIMITS = ImageLimits(min_side=1)  # the aspect limit stays: a long strip, enlarged to the model's size, would exhaust memory


class Batch(NamedTuple):
    """Decoded samples: `pixels` uint8 [b,3,H,W], their captions, and separately the samples that could not be decoded."""

    samples: list[int]
    keys: list[str]
    pixels: Tensor
    params: Params
    captions: list[list[str]]
    bad: list[tuple[int, BadSample]]


class Encoder:
    """A model on the best available device, with its own preprocessing."""

    def __init__(self, spec: str, batch_size: int = BATCH, threads: int | None = None) -> None:
        """Loads the model.

        Args:
            spec: a run or open_clip folder, NAME:TAG of open_clip, timm:NAME or hf:FOLDER.
            batch_size: images per forward pass.
            threads: decoding threads; by default one per core, at most 16.

        Raises:
            OptionError: `spec` does not name a model.
        """
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(spec, self.device, find_checkpoint=find_checkpoint)
        self.view = center_view(self.model)
        self._batch_size, self._threads = batch_size, threads or min(16, os.cpu_count() or 1)

    def batches(self, places: Iterable[Place], caption: str | None) -> Iterator[Batch]:
        """Yields batches in order, and decodes the next while one is used.

        Args:
            places: samples, grouped by shard.
            caption: the member or json:FIELD with the caption; None: without captions.
        """
        with ThreadPoolExecutor(self._threads, thread_name_prefix="decode") as pool:
            waiting: list[tuple[list[Place], list[Future]]] = []
            for name, group in groupby(places, key=lambda place: place.shard):
                with Shard(name) as shard:
                    todo = list(group)
                    for start in range(0, len(todo), self._batch_size):
                        chunk = todo[start : start + self._batch_size]
                        waiting.append((chunk, [pool.submit(self._read, shard, place.index, caption) for place in chunk]))
                        if len(waiting) > 1:
                            yield self._collect(*waiting.pop(0))
                    while waiting:  # before the shard is closed
                        yield self._collect(*waiting.pop(0))

    def _read(self, shard: Shard, index: int, caption: str | None) -> tuple[str, Tensor, Params, list[str]]:
        members = shard.index.members(index)
        extension = image_member(members)
        if extension is None:
            raise BadSample("missing_image", f"it has {', '.join(sorted(members))}")
        text = set() if caption is None else {member_of(caption)}
        record = shard.read(index, {extension, *text})
        data = record.members[extension]
        pixels, params = cut(Item(record.key, lambda: data), self.view, torch.zeros((), dtype=torch.int64), LIMITS)
        return record.key, pixels, params, [] if caption is None else captions(record, caption)

    @staticmethod
    def _collect(chunk: list[Place], futures: list[Future]) -> Batch:
        good, bad = [], []
        for place, future in zip(chunk, futures, strict=True):
            try:
                good.append((place.sample, *future.result()))
            except BadSample as error:
                bad.append((place.sample, error))
        pixels = torch.stack([row[2] for row in good]) if good else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
        params = {name: torch.cat([row[3][name] for row in good]) for name in good[0][3]} if good else {}
        return Batch([row[0] for row in good], [row[1] for row in good], pixels, params, [row[4] for row in good], bad)

    def images(self, batch: Batch, joint: bool) -> Tensor:
        """Embeds the images of a batch.

        Args:
            batch: decoded samples.
            joint: require the joint image-text features; else pooled features serve where there are none.

        Returns:
            float32 [b,E], normalised, on the CPU.

        Raises:
            UnsuitableModelError: the model has no features of the kind asked for.
            NotFiniteError: an output is not finite.
        """
        params = {name: value.to(self.device) for name, value in batch.params.items()}
        encoded = self.model.images(self.view.render(batch.pixels.to(self.device), params).data)
        value = encoded.features if encoded.features is not None or joint else encoded.pooled
        if value is None:
            raise UnsuitableModelError(NO_FEATURES.format("a similarity score"))
        value = normalize(value.float(), dim=-1).cpu()
        check_finite(value, lambda row: f"image {batch.keys[row]}", self.model)
        return value

    def similarities(self, batch: Batch) -> Tensor:
        """Computes the cosine of each image and its caption, the best of several captions.

        Returns:
            float32 [b].

        Raises:
            UnsuitableModelError: the model has no joint features or no text tower.
            NotFiniteError: an output is not finite.

        Source: DataComp (Gadre et al., 2023), CLIP score filtering.
        """
        image = self.images(batch, joint=True)
        texts = [text for several in batch.captions for text in several]
        encoded = self.model.texts(texts)
        if encoded is None:
            raise UnsuitableModelError("this model has no text tower, which a similarity score needs")
        text = normalize(encoded.float(), dim=-1).cpu()
        check_finite(text, lambda row: f"text {texts[row]!r:.80}", self.model)
        owner = torch.repeat_interleave(torch.arange(len(image)), torch.tensor([len(several) for several in batch.captions]))
        cosine = (image[owner] * text).sum(1)
        return torch.full((len(image),), -1.0).scatter_reduce(0, owner, cosine, "amax")
