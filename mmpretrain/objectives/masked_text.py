"""The objective `masked_text`: masked language modelling with bidirectional attention in the text tower (BERT)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpretrain import rng
from mmpretrain.config.build import Range
from mmpretrain.data.text import get_tokenizer
from mmpretrain.data.views import TextView
from mmpretrain.functional import exact
from mmpretrain.objectives.base import Context, Objective, ObjectiveConfig, require
from mmpretrain.types import Encode, Params, Requested, Sample, View


@dataclass
class MaskedTextConfig(ObjectiveConfig):
    """Options of `masked_text`; the defaults are the paper's."""

    mask_ratio: Annotated[float, Range(above=0, below=1)] = 0.15  # fraction of words chosen; at least one
    keep: Annotated[float, Range(0, 1)] = 0.1  # of the chosen: left unchanged
    replace: Annotated[float, Range(0, 1)] = 0.1  # of the chosen: replaced by a random word; the rest by the mask embedding


@dataclass(frozen=True)
class MaskedTextView(TextView):
    """A caption with corrupted words. `data` holds -1 in place of the mask embedding, `target` the true id, or -100 elsewhere."""

    masks_words: ClassVar[bool] = True
    mask_ratio: float = 0.15
    keep: float = 0.1
    replace: float = 0.1

    def draw(self, samples: Sequence[Sample], seeds: Tensor) -> Params:
        # Columns of one stream: the draws for a word do not depend on the length of the batch.
        fate = rng.uniform(seeds, (self, "fate"), self.context_length)
        return super().draw(samples, seeds) | {
            "order": rng.uniform(seeds, (self, "order"), self.context_length),
            "fate": fate,
            "word": rng.bits(seeds, (self, "word"), self.context_length),
        }

    def render(self, pixels: Tensor, params: Params) -> View:
        ids = super().render(pixels, params).data  # [B, L]
        tokenizer = get_tokenizer(self.tokenizer)
        length = ids.shape[1]
        ends = (ids == tokenizer.eot).cumsum(1)
        word = (ends == 0) & (ids != tokenizer.sot)  # neither start, end, nor padding
        count = (word.sum(1) * self.mask_ratio).round().clamp(min=1)  # [B]
        order = params["order"].to(ids.device)[:, :length].masked_fill(~word, 2.0)
        chosen = word & (order.argsort(1).argsort(1) < count[:, None])
        fate = params["fate"].to(ids.device)[:, :length]
        other = params["word"].to(ids.device)[:, :length].remainder(tokenizer.vocab_size)
        special = (other == tokenizer.sot) | (other == tokenizer.eot)  # a second end would move the pooled position
        other = torch.where(special, ids, other)
        data = torch.where(chosen & (fate >= self.keep), torch.where(fate < self.keep + self.replace, other, -1), ids)
        return View(data, ids.masked_fill(~chosen, -100))


class MaskedText(Objective):
    """Cross-entropy of the words hidden from a bidirectional text tower.

    Source: Devlin et al. 2019 (BERT), section 3.1, task 1. Departures: the output layer is a linear map of its own,
    where BERT adds a dense layer and shares the word embeddings; exactly round(mask_ratio * words) words of a caption
    are chosen, at least one; there is no next-sentence task. The mask embedding is the tower's.
    """

    Config = MaskedTextConfig
    per_row = True

    def __init__(self, config: MaskedTextConfig, context: Context) -> None:
        super().__init__()
        if config.keep + config.replace > 1:
            raise ValueError(f"keep {config.keep} and replace {config.replace} are shares of the chosen words: together at most 1")
        width = require(context.text_width, "a text tower", "masked_text")
        view = MaskedTextView(
            tokenizer=context.tokenizer,
            context_length=context.context_length,
            trim=True,  # with key padding, the length of the batch has no effect
            mask_ratio=config.mask_ratio,
            keep=config.keep,
            replace=config.replace,
        )
        self.needs = {"text": Encode(config.source, view, outputs=frozenset({"tokens"}), bidirectional=True)}
        self.decoder = nn.Linear(width, context.vocab_size)
        nn.init.normal_(self.decoder.weight, std=0.02)
        nn.init.zeros_(self.decoder.bias)

    def count(self, text: Requested) -> Tensor:  # type: ignore[override]
        return (text.view.target != -100).sum()

    def forward(self, text: Requested) -> dict[str, Tensor]:  # type: ignore[override]
        target = text.view.target
        assert target is not None  # MaskedTextView always sets it
        chosen = target != -100
        logits = exact(self.decoder(text.tokens[chosen]))  # [chosen words, V]
        words = target[chosen]
        loss = F.cross_entropy(logits, words, reduction="sum") / max(1, len(words))  # without a word to predict: zero, with a gradient
        return {"loss": loss, "accuracy": (logits.argmax(1) == words).float().sum().detach() / max(1, len(words))}
