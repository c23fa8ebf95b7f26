"""Images, and images with captions, under a model: its embeddings and its image-text similarity.

A model runs in the command's own process, in batches: it is large, wants the accelerator or all cores to itself, and is loaded once; only
reading and decoding are done ahead, by threads.
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
from mmpretrain.evaluators.data.items import Item
from mmpretrain.evaluators.features import NO_FEATURES, center_view, check_finite, cut
from mmpretrain.evaluators.models import load_model
from mmpretrain.types import Params

BATCH = 64
LIMITS = ImageLimits(min_side=1)  # a longer strip would grow beyond bounds when its short side is enlarged to the model's


class Batch(NamedTuple):
    """`pixels` uint8 [b,3,H,W] and captions of `samples`; `bad` ones are not among them."""

    samples: list[int]
    keys: list[str]
    pixels: Tensor
    params: Params
    captions: list[list[str]]
    bad: list[tuple[int, BadSample]]


class Encoder:
    """A model on the best device there is, and its own preprocessing."""

    def __init__(self, spec: str, batch_size: int = BATCH, threads: int | None = None) -> None:
        """`spec`: a run or open_clip folder, NAME:TAG of open_clip, timm:NAME or hf:FOLDER. Raises OptionError where it names nothing."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_model(spec, self.device, find_checkpoint=find_checkpoint)
        self.view = center_view(self.model)
        self._batch_size, self._threads = batch_size, threads or min(16, os.cpu_count() or 1)

    def batches(self, places: Iterable[Place], caption: str | None) -> Iterator[Batch]:
        """Samples grouped by shard -> batches in order, the next decoded while one is used; with captions where `caption` names them."""
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

    def _read(self, shard: Shard, at: int, caption: str | None) -> tuple[str, Tensor, Params, list[str]]:
        members = shard.index.members(at)
        image = image_member(members)
        if image is None:
            raise BadSample("missing_image", f"it has {', '.join(sorted(members))}")
        text = set() if caption is None else {member_of(caption)}
        record = shard.read(at, {image, *text})
        data = record.members[image]
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
        """[b,E] normalised, float32 on the CPU: the joint features; or, if not `joint` and there are none, the pooled ones.

        Raises TypeError for a model without joint features, RuntimeError where the model gives what is not finite.
        """
        params = {name: value.to(self.device) for name, value in batch.params.items()}
        encoded = self.model.images(self.view.render(batch.pixels.to(self.device), params).data)
        value = encoded.features if encoded.features is not None or joint else encoded.pooled
        if value is None:
            raise TypeError(NO_FEATURES.format("a similarity score"))
        value = normalize(value.float(), dim=-1).cpu()
        check_finite(value, lambda row: f"image {batch.keys[row]}", self.model)
        return value

    def similarities(self, batch: Batch) -> Tensor:
        """float32 [b]: the cosine of the image and its caption, the best of several, as DataComp scores pairs."""
        image = self.images(batch, joint=True)
        texts = [text for several in batch.captions for text in several]
        encoded = self.model.texts(texts)
        if encoded is None:
            raise TypeError("this model has no text tower, which a similarity score needs")
        text = normalize(encoded.float(), dim=-1).cpu()
        check_finite(text, lambda row: f"text {texts[row]!r:.80}", self.model)
        owner = torch.repeat_interleave(torch.arange(len(image)), torch.tensor([len(several) for several in batch.captions]))
        cosine = (image[owner] * text).sum(1)
        return torch.full((len(image),), -1.0).scatter_reduce(0, owner, cosine, "amax")
