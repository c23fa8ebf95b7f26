"""The stage of `stats`: one shard -> its summary. Every sample ends in the counts, as usable or with the reason why not."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from data_prep.captions import can_tell_languages, language_of, num_tokens
from data_prep.perceptual import THUMBNAIL, signature
from data_prep.shards.read import Shard, captions, image_member, pixels
from data_prep.stats.summary import Names, Ref, Summary, hashed
from data_prep.stats.text import script, words
from mmpretrain.data.decode import PILLOW_FORMATS, sniff
from mmpretrain.data.fields import FieldName, decode_json, label_from, member_of
from mmpretrain.data.schema import BadSample, ShardError

ASPECT_STEPS = 16  # bins per doubling of width / height
BYTE_STEPS = 4  # bins per doubling of an image's bytes
BLANK = 2.0  # standard deviation of the grey values, 0..255, below which an image counts as blank
EXTENSIONS = {"jpg": "jpeg", "tif": "tiff", "pgm": "ppm", "pbm": "ppm"}  # where the name differs from the format
MAX_SIDE = 1 << 16  # pixels; longer sides are counted as this, so that hostile headers cannot fill the memory


def rank_of(key: str, sizes: dict[str, int]) -> int:
    """Not of the key alone: where each shard counts from 0, the samples of one number would be drawn together."""
    return hashed(f"{key} {sorted(sizes.items())}")


@dataclass(frozen=True)
class Stage:
    """A shard's name -> its Summary. `share` of the samples, chosen by the hashes of their keys and sizes, are read and decoded."""

    caption: str = "txt"
    label: str | None = "cls"
    share: float = 1.0

    def __call__(self, name: str) -> Summary:
        found = Summary(shards=1)
        try:
            shard = Shard(name)
        except (ShardError, OSError) as error:
            found.unreadable.offer((hashed(name),), (name, "unreadable shard", str(error)))
            found.problems["shard: unreadable"] += 1
            return found
        try:
            self._index(found, shard)
            for i in range(len(shard)):
                key, members = shard.key(i), shard.index.members(i)
                rank = rank_of(key, {extension: member.size for extension, member in members.items()})
                if rank < self.share * 2.0**64:
                    self._sample(found, shard, i, Ref(name, i, key), rank)
        finally:
            shard.close()
        return found

    def _index(self, found: Summary, shard: Shard) -> None:
        index = shard.index
        found.samples, found.tar_bytes, found.repeated_keys = len(index), index.tar_bytes, index.duplicates
        found.members.update(index.counts())
        for number, extension in enumerate(index.extensions):
            found.member_bytes[extension] += int(index.size[index.extension == number].sum())
        for damage in index.damage:
            found.lost += damage.lost
            found.problems[f"shard: {damage.reason}"] += 1
            rank = (hashed(f"{shard.name}:{damage.offset}"),)
            found.unreadable.offer(
                rank, (shard.name, damage.reason, f"byte {damage.offset}: {damage.detail}; about {damage.lost} samples lost")
            )

    def _sample(self, found: Summary, shard: Shard, i: int, ref: Ref, rank: int) -> None:
        found.looked_at += 1

        def bad(what: str, error: BadSample) -> None:
            found.problems[f"{what}: {error.reason}"] += 1
            found.bad.offer((rank, hashed(what)), (ref, what, error.reason, error.detail))

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
                self._captions(found, texts, ref, rank)
            except BadSample as error:
                bad("caption", error)
        if self.caption == "txt" and b'"captions"' in record.members.get("json", b""):
            found.json_captions += 1
        label = None
        try:
            label = self._label(record.members)
        except BadSample as error:
            bad("label", error)
        if label is not None:
            found.labelled += 1
            found.labels.add(label, rank)
        extension = image_member(record.members)
        if extension is not None:
            try:
                self._image(found, extension, record.members[extension], ref, rank)
            except BadSample as error:
                bad("image", error)
                return
        found.examples.offer((rank,), (ref, texts[0][:300] if texts else "", label))

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

    def _captions(self, found: Summary, texts: list[str], ref: Ref, rank: int) -> None:
        found.captioned += 1
        found.captions_per_sample[len(texts)] += 1
        used: set[str] = set()
        for text in texts:
            length = len(text)
            found.characters[length] += 1
            found.tokens[num_tokens(text)] += 1
            spoken = words(text)
            found.num_words += len(spoken)
            used.update(word[:100] for word in spoken)
            found.captions.add(hashed(text), rank, text[:300])
            found.scripts[script(text)] += 1
            if can_tell_languages():
                found.languages[language_of(text) or "short"] += 1
            found.shortest.offer((length, hashed(text), rank), (ref, text[:300]))
            found.longest.offer((-length, hashed(text), rank), (ref, text[:1000]))
        for word in used:
            found.words.add(word, rank)

    def _image(self, found: Summary, extension: str, data: bytes, ref: Ref, rank: int) -> None:
        kind = sniff(data)
        found.formats[kind or "unknown"] += 1
        found.misnamed += kind is not None and extension != "img" and EXTENSIONS.get(extension, extension) != kind
        found.file_bytes[int(BYTE_STEPS * math.log2(max(len(data), 1)))] += 1
        size = _header(found.modes, data, kind)
        if size is not None:
            width, height = size
            note = f"{width} × {height}"
            found.short_side[min(*size, MAX_SIDE)] += 1
            found.long_side[min(max(size), MAX_SIDE)] += 1
            found.aspect[round(ASPECT_STEPS * math.log2(width / height))] += 1
            found.sizes.add(note, rank)
            found.smallest.offer((width * height, rank), (ref, note))
            found.elongated.offer((-max(size) / min(size), rank), (ref, note))
        image = pixels(data)  # uint8 [3, H, W]
        found.images += 1
        small = interpolate(image[None].to(torch.float32), (THUMBNAIL, THUMBNAIL), mode="area")[0].numpy()
        spread = float(np.tensordot(np.array([0.299, 0.587, 0.114]), small.astype(np.float64), 1).std())
        if spread < BLANK:
            found.blanks += 1
            found.blank.offer((spread, rank), (ref, f"standard deviation {spread:.2f}"))
        signed = signature(image.permute(1, 2, 0).numpy())
        high, low = signed["digest"].tolist()
        found.pictures.add(high << 64 | low, rank, ref, int(signed["hash"]), signed["colour"].tobytes())


def _header(modes: Names, data: bytes, kind: str | None) -> tuple[int, int] | None:
    """(width, height) as stored, and the mode counted; None where no header can be read."""
    if kind is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=[PILLOW_FORMATS[kind]]) as image:
                modes[image.mode + (", animated" if getattr(image, "n_frames", 1) > 1 else "")] += 1
                size = image.size
    except Exception:  # decoding says what is wrong with it
        return None
    return size if min(size) > 0 else None


class Count:
    """A shard's name -> how many samples its index has; 0 where it cannot be read, which the stage itself reports."""

    def __call__(self, name: str) -> int:
        try:
            with Shard(name) as shard:
                return len(shard)
        except (ShardError, OSError):
            return 0
