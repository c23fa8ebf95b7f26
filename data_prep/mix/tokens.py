"""Tokens that the towers read of a source: counted for images, from a sample of the captions for texts."""

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

if TYPE_CHECKING:
    from mmpretrain.model import PretrainModel

SAMPLE = 512  # captions of a source whose tokens are counted


def tokens(model: PretrainModel, name: str, source: Source, rows: int | None) -> dict[str, Any]:
    """Tokens that the towers read of a source: an encode that several objectives share is one."""
    images, texts, known = 0, 0, True
    for encode in model.plan:
        if encode.source != name:
            continue
        if encode.view.modality == "text":
            texts += 1
            continue
        patch = model._tower(encode).patch_size
        known &= patch is not None
        patches = (encode.view.size // patch) ** 2 if patch else 0
        dropped = round(encode.mask.ratio * patches) if encode.mask is not None and encode.mask.mode == "drop" else 0
        images += patches - dropped
    found: dict[str, Any] = {
        "image_encodes": sum(e.source == name and e.view.modality == "image" for e in model.plan),
        "text_encodes": texts,
    }
    found["image_tokens_per_row"] = images if known else None
    found["text_tokens_per_row"] = 0.0
    if texts:
        view = next(e.view for e in model.plan if e.source == name and e.view.modality == "text")
        counts, found["unusable_captions"] = caption_tokens(source, view.tokenizer)
        cut = [min(n, view.context_length) for n in counts]
        found["captions_sampled"] = len(counts)
        found["over_context"] = sum(n > view.context_length for n in counts) / max(len(counts), 1)
        found["context_length"] = view.context_length
        found["text_tokens_per_row"] = texts * sum(cut) / len(cut) if cut else None
    for kind in ("image", "text"):
        each = found[f"{kind}_tokens_per_row"]
        found[f"{kind}_tokens"] = None if each is None or rows is None else round(each * rows)
    return found


def caption_tokens(source: Source, tokenizer: str, most: int = SAMPLE) -> tuple[list[int], int]:
    """Tokens (begin and end among them) of captions spread evenly over the source as it is dealt, and how many samples had none usable."""
    count = counter(tokenizer)
    found, bad = [], 0
    slots = np.unique(np.linspace(0, max(source.num_samples - 1, 0), most).astype(np.int64))
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
        found += [count(text) for text in texts]
    return found, bad


def counter(name: str) -> Any:
    """Text -> its tokens before any cut."""
    if name == "clip":
        return num_tokens
    tokenizer = get_tokenizer(name)

    def count(text: str) -> int:
        ids = tokenizer.encode([text], 1024)[0]
        if tokenizer.eot is not None and bool((ids == tokenizer.eot).any()):
            return int((ids == tokenizer.eot).int().argmax()) + 1
        return int((ids != 0).sum())

    return count
