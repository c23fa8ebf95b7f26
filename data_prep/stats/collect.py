"""Collection of the summary of one shard; every sample is counted, as usable or with the reason why not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from data_prep.captions import can_tell_languages, language_of, num_tokens
from data_prep.perceptual import THUMBNAIL, signature
from data_prep.shards.read import Shard, captions, image_member, pixels
from data_prep.stats.summary import Names, Ref, Summary, hashed
from data_prep.stats.text import script, words
from mmpretrain.data import raster
from mmpretrain.data.fields import FieldName, decode_json, label_from, member_of
from mmpretrain.data.formats import sniff
from mmpretrain.data.schema import BadSample, ShardError

ASPECT_STEPS = 16  # bins per doubling of width / height
BYTE_STEPS = 4  # bins per doubling of an image's bytes
BLANK = 2.0  # standard deviation of the grey values, 0..255, below which an image counts as blank
EXTENSIONS = {"jpg": "jpeg", "tif": "tiff", "pgm": "ppm", "pbm": "ppm"}  # where the name differs from the format
MAX_SIDE = 1 << 16  # pixels; longer sides are counted as this, so that hostile headers cannot exhaust memory


def rank_of(key: str, sizes: dict[str, int]) -> int:
    """Hashes the key and the sizes of members: keys alone coincide where each shard counts from 0."""
    return hashed(f"{key} {sorted(sizes.items())}")


@dataclass(frozen=True)
class Stage:
    """The task of a worker: summarises a shard. Reads and decodes `share` of its samples, chosen by `rank_of`."""

    caption: str = "txt"
    label: str | None = "cls"
    share: float = 1.0

    def __call__(self, name: str) -> Summary:
        summary = Summary(shards=1)
        try:
            shard = Shard(name)
        except (ShardError, OSError) as error:
            summary.unreadable.offer((hashed(name),), (name, "unreadable shard", str(error)))
            summary.problems["shard: unreadable"] += 1
            return summary
        try:
            self._index(summary, shard)
            for i in range(len(shard)):
                key, members = shard.key(i), shard.index.members(i)
                rank = rank_of(key, {extension: member.size for extension, member in members.items()})
                if rank < self.share * 2.0**64:
                    self._sample(summary, shard, i, Ref(name, i, key), rank)
        finally:
            shard.close()
        return summary

    def _index(self, summary: Summary, shard: Shard) -> None:
        index = shard.index
        summary.samples, summary.tar_bytes, summary.repeated_keys = len(index), index.tar_bytes, index.duplicates
        summary.members.update(index.counts())
        for number, extension in enumerate(index.extensions):
            summary.member_bytes[extension] += int(index.size[index.extension == number].sum())
        for damage in index.damage:
            summary.lost += damage.lost
            summary.problems[f"shard: {damage.reason}"] += 1
            rank = (hashed(f"{shard.name}:{damage.offset}"),)
            summary.unreadable.offer(
                rank, (shard.name, damage.reason, f"byte {damage.offset}: {damage.detail}; about {damage.lost} samples lost")
            )
        for member in index.left_out or ():
            summary.lost += member.lost
            summary.problems[f"shard: {member.reason}"] += 1
            rank = (hashed(f"{shard.name}:{member.offset}"),)
            summary.unreadable.offer(rank, (shard.name, member.reason, f"byte {member.offset}: {member}"))

    def _sample(self, summary: Summary, shard: Shard, i: int, ref: Ref, rank: int) -> None:
        summary.looked_at += 1

        def bad(what: str, error: BadSample) -> None:
            summary.problems[f"{what}: {error.reason}"] += 1
            summary.bad.offer((rank, hashed(what)), (ref, what, error.reason, error.detail))

        try:
            record = shard.read(i)
        except BadSample as error:
            bad("sample", error)
            return
        texts: list[str] = []
        member = member_of(self.caption)
        if member in record.members:
            try:
                texts = captions(record, self.caption)
                self._captions(summary, texts, ref, rank)
            except BadSample as error:
                bad("caption", error)
        if self.caption == "txt" and b'"captions"' in record.members.get("json", b""):
            summary.json_captions += 1
        label = None
        try:
            label = self._label(record.members)
        except BadSample as error:
            bad("label", error)
        if label is not None:
            summary.labelled += 1
            summary.labels.add(label, rank)
        extension = image_member(record.members)
        if extension is not None:
            try:
                self._image(summary, extension, record.members[extension], ref, rank)
            except BadSample as error:
                bad("image", error)
                return
        summary.examples.offer((rank,), (ref, texts[0][:300] if texts else "", label))

    def _label(self, members: dict[str, bytes]) -> str | None:
        if self.label is None:
            return None
        field = FieldName.parse(self.label)
        if field.member not in members:
            return None
        value: Any = members[field.member]
        if field.key is not None:
            value = decode_json(value).get(field.key)
            if isinstance(value, str):
                return value[:200]
        try:
            return str(label_from(value, None, self.label))
        except BadSample:
            text = value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else ""
            if not text:
                raise
            return text[:200]  # a class name

    def _captions(self, summary: Summary, texts: list[str], ref: Ref, rank: int) -> None:
        summary.captioned += 1
        summary.captions_per_sample[len(texts)] += 1
        distinct: set[str] = set()
        for text in texts:
            length = len(text)
            summary.characters[length] += 1
            summary.tokens[num_tokens(text)] += 1
            text_words = words(text)
            summary.num_words += len(text_words)
            distinct.update(word[:100] for word in text_words)
            summary.captions.add(hashed(text), rank, text[:300])
            summary.scripts[script(text)] += 1
            if can_tell_languages():
                summary.languages[language_of(text) or "short"] += 1
            summary.shortest.offer((length, hashed(text), rank), (ref, text[:300]))
            summary.longest.offer((-length, hashed(text), rank), (ref, text[:1000]))
        for word in distinct:
            summary.words.add(word, rank)

    def _image(self, summary: Summary, extension: str, data: bytes, ref: Ref, rank: int) -> None:
        kind = sniff(data)
        summary.formats[kind or "unknown"] += 1
        summary.misnamed += kind is not None and extension != "img" and EXTENSIONS.get(extension, extension) != kind
        summary.file_bytes[int(BYTE_STEPS * math.log2(max(len(data), 1)))] += 1
        size = _header(summary.modes, data, kind)
        if size is not None:
            width, height = size
            note = f"{width} × {height}"
            summary.short_side[min(*size, MAX_SIDE)] += 1
            summary.long_side[min(max(size), MAX_SIDE)] += 1
            summary.aspect[round(ASPECT_STEPS * math.log2(width / height))] += 1
            summary.sizes.add(note, rank)
            summary.smallest.offer((width * height, rank), (ref, note))
            summary.elongated.offer((-max(size) / min(size), rank), (ref, note))
        image = pixels(data)  # uint8 [3, H, W]
        summary.images += 1
        small = interpolate(image[None].to(torch.float32), (THUMBNAIL, THUMBNAIL), mode="area")[0].numpy()
        spread = float(np.tensordot(np.array([0.299, 0.587, 0.114]), small.astype(np.float64), 1).std())
        if spread < BLANK:
            summary.blanks += 1
            summary.blank.offer((spread, rank), (ref, f"standard deviation {spread:.2f}"))
        signed = signature(image.permute(1, 2, 0).numpy())
        high, low = signed["digest"].tolist()
        summary.pictures.add(high << 64 | low, rank, ref, int(signed["hash"]), signed["colour"].tobytes())


def _header(modes: Names, data: bytes, kind: str | None) -> tuple[int, int] | None:
    """Reads (width, height) as shown and counts the mode; None for an unreadable header."""
    if kind is None:
        return None
    try:
        header = raster.read_header(data, kind)
    except BadSample:  # decoding reports the reason
        return None
    modes[header.mode + (", animated" if header.animated else "")] += 1
    return (header.width, header.height) if min(header.width, header.height) > 0 else None


class Count:
    """The task of a worker: counts the samples of a shard; 0 for an unreadable one, which `Stage` reports."""

    def __call__(self, name: str) -> int:
        try:
            with Shard(name) as shard:
                return len(shard)
        except (ShardError, OSError):
            return 0
