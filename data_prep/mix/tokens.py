"""Tokens per source that the towers process: exact for images, estimated from sampled captions for texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.captions import num_tokens
from data_prep.records import Record
from data_prep.shards.read import captions
from mmpretrain.data.fields import member_of
from mmpretrain.data.schema import BadSample
from mmpretrain.data.source import Source
from mmpretrain.data.text import get_tokenizer
from mmpretrain.types import is_image, is_text

if TYPE_CHECKING:
    from mmpretrain.model import PretrainModel

SAMPLE = 512  # captions of a source whose tokens are counted


def tokens(model: PretrainModel, name: str, source: Source, rows: int | None) -> dict[str, Any]:
    """Counts the tokens of a source that the towers process; an encode shared by objectives counts once.

    Args:
        model: the built model, without weights.
        name: of the source.
        source: the source.
        rows: rows of the source in the whole run; None: unknown.

    Returns:
        Encodes, tokens per row and in total, by modality, and statistics of the sampled captions.
    """
    images, texts, known = 0, 0, True
    for encode in model.plan:
        if encode.source != name:
            continue
        view = encode.view
        if not is_image(view):
            texts += 1
            continue
        patch = model._tower(encode).patch_size
        known &= patch is not None
        patches = (view.size // patch) ** 2 if patch else 0
        dropped = round(encode.mask.ratio * patches) if encode.mask is not None and encode.mask.mode == "drop" else 0
        images += patches - dropped
    result: dict[str, Any] = {
        "image_encodes": sum(e.source == name and e.view.modality == "image" for e in model.plan),
        "text_encodes": texts,
    }
    result["image_tokens_per_row"] = images if known else None
    result["text_tokens_per_row"] = 0.0
    if texts:
        text = next(e.view for e in model.plan if e.source == name and is_text(e.view))
        counts, result["unusable_captions"] = caption_tokens(source, text.tokenizer)
        cut = [min(n, text.context_length) for n in counts]
        result["captions_sampled"] = len(counts)
        result["over_context"] = sum(n > text.context_length for n in counts) / max(len(counts), 1)
        result["context_length"] = text.context_length
        result["text_tokens_per_row"] = texts * sum(cut) / len(cut) if cut else None
    for kind in ("image", "text"):
        each = result[f"{kind}_tokens_per_row"]
        result[f"{kind}_tokens"] = None if each is None or rows is None else round(each * rows)
    return result


def caption_tokens(source: Source, tokenizer: str, max_samples: int = SAMPLE) -> tuple[list[int], int]:
    """Counts the tokens of sampled captions.

    Args:
        source: captions are spread evenly over its order.
        tokenizer: its name, see `counter`.
        max_samples: samples to read.

    Returns:
        (tokens of each caption, with begin and end; number of samples without a usable caption).
    """
    count = counter(tokenizer)
    counts, bad = [], 0
    slots = np.unique(np.linspace(0, max(source.num_samples - 1, 0), max_samples).astype(np.int64))
    component, own = source._blend.locate(slots)
    for c, slot in zip(component.tolist(), own.tolist()):
        place = source._orders[c].locate(np.array([slot]))
        shards = source.shard_sets[c]
        key, members, opened = shards.members(int(place.shard[0]), int(place.sample[0]))
        extension = member_of(source.config.caption)
        try:
            texts = captions(Record(key, {e: shards.read(opened, m) for e, m in members.items() if e == extension}), source.config.caption)
        except BadSample:
            bad += 1
            continue
        counts += [count(text) for text in texts]
    return counts, bad


def counter(name: str) -> Any:
    """Returns the function that counts a text's tokens before truncation, for a named tokenizer."""
    if name == "clip":
        return num_tokens
    tokenizer = get_tokenizer(name)

    def count(text: str) -> int:
        ids = tokenizer.encode([text], 1024)[0]
        if tokenizer.eot is not None and bool((ids == tokenizer.eot).any()):
            return int((ids == tokenizer.eot).int().argmax()) + 1
        return int((ids != 0).sum())

    return count
