"""The rules of `filter` that look at one sample alone."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from data_prep import files
from data_prep.captions import language_of
from data_prep.records import InputError, Record
from data_prep.shards.read import Shard, Span, captions, damage_lines, image_member, pixels
from mmpretrain.data import decode
from mmpretrain.data.fields import decode_json, member_of
from mmpretrain.data.formats import decode_text
from mmpretrain.data.schema import LABEL_EXTENSION, METADATA_EXTENSION, BadSample

LIMITS = decode.ImageLimits(min_side=1, max_aspect=float("inf"))


class Sample:
    """What a rule, and a user's predicate, sees of a sample. What is not asked for is not decoded; what is missing raises BadSample."""

    def __init__(self, shard: Shard, at: int, caption: str = "txt") -> None:
        self.key = shard.key(at)
        self._shard, self._at, self._caption = shard, at, caption
        self.members = frozenset(shard.index.members(at))  # extensions

    def _read(self, extension: str) -> bytes:
        return self._shard.read(self._at, {extension}).members[extension]

    @cached_property
    def captions(self) -> list[str]:
        extension = member_of(self._caption)
        return captions(Record(self.key, {extension: self._read(extension)} if extension in self.members else {}), self._caption)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Its json; {} where it has none."""
        return decode_json(self._read(METADATA_EXTENSION)) if METADATA_EXTENSION in self.members else {}

    @cached_property
    def label(self) -> str | None:
        """Its cls, as text; None where it has none."""
        return decode_text(self._read(LABEL_EXTENSION)) if LABEL_EXTENSION in self.members else None

    @cached_property
    def image_bytes(self) -> bytes:
        extension = image_member(self.members)
        if extension is None:
            raise BadSample("missing_image", f"it has {', '.join(sorted(self.members))}")
        return self._read(extension)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) by the image's header."""
        kind = decode.sniff(self.image_bytes)
        if kind is None:
            raise BadSample("unknown_format", f"begins with {self.image_bytes[:12]!r}")
        try:
            with Image.open(io.BytesIO(self.image_bytes), formats=[decode.PILLOW_FORMATS[kind]]) as image:
                return image.size
        except Exception as error:  # decoders raise all sorts over hostile bytes
            raise BadSample("undecodable_image", f"{kind}: {' '.join(str(error).split())[:200]}") from error

    @cached_property
    def image(self) -> np.ndarray:
        """uint8 [H,W,3], as training decodes it."""
        return pixels(self.image_bytes, LIMITS).permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class Predicate:
    """A user's function of a Sample -> bool. It travels as its source text, so that a worker anywhere runs what was read here."""

    name: str  # file:function
    source: str

    @classmethod
    def read(cls, spec: str) -> Predicate:
        """`FILE.py:function`. Raises InputError where either is missing."""
        file, _, function = spec.rpartition(":")
        if not file or not function.isidentifier():
            raise InputError(f"--where {spec!r}: expected FILE.py:function")
        try:
            predicate = cls(spec, Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--where {spec}: {error}") from error
        predicate.function()
        return predicate

    def function(self) -> Any:
        return _function(self.name, self.source)

    def __call__(self, sample: Sample) -> bool:
        """Raises InputError where the function fails or answers anything but yes or no: a mistake there must not thin out the data."""
        try:
            answer = self.function()(sample)
        except BadSample:
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise InputError(f"--where {self.name}, line {place.lineno}: {type(error).__name__}: {error} (sample {sample.key})") from error
        if not isinstance(answer, bool | np.bool_):
            raise InputError(f"--where {self.name}: gave {answer!r:.80} for sample {sample.key}, expected True (keep) or False")
        return bool(answer)


@cache
def _function(name: str, source: str) -> Any:
    file, _, function = name.rpartition(":")
    module = ModuleType("predicate")
    try:
        exec(compile(source, file, "exec"), module.__dict__)  # the user's own file, named on the command line
    except Exception as error:
        raise InputError(f"--where {name}: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        names = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_")) or "none"
        raise InputError(f"--where {name}: {file} has no function {function!r}; it has {names}")
    return found


@dataclass(frozen=True)
class Rules:
    """What a sample must be. None: not asked. Of several captions, each must pass."""

    min_side: int | None = None
    max_aspect: float | None = None
    min_words: int | None = None
    max_words: int | None = None
    min_chars: int | None = None
    max_chars: int | None = None
    languages: tuple[str, ...] = ()
    where: Predicate | None = None
    caption: str = "txt"

    def verdict(self, sample: Sample) -> tuple[str, str] | None:
        """(the first rule that it breaks, what was found), or None. Raises BadSample where what a rule needs cannot be read."""
        if self.min_side is not None or self.max_aspect is not None:
            width, height = sample.size
            if self.min_side is not None and min(width, height) < self.min_side:
                return "min_side", f"{width} x {height} pixels, the shorter side must be {self.min_side}"
            if self.max_aspect is not None and max(width, height) > self.max_aspect * min(width, height):
                return "max_aspect", f"{width} x {height} pixels, sides may differ {self.max_aspect:g} times"
        lengths = {"words": (self.min_words, self.max_words), "chars": (self.min_chars, self.max_chars)}
        for unit, (least, most) in lengths.items():
            for text in sample.captions if (least, most) != (None, None) else ():
                count = len(text.split()) if unit == "words" else len(text)
                if least is not None and count < least:
                    return f"min_{unit}", f"{count} {unit}, at least {least}: {text[:80]!r}"
                if most is not None and count > most:
                    return f"max_{unit}", f"{count} {unit}, at most {most}: {text[:80]!r}"
        for text in sample.captions if self.languages else ():
            language = language_of(text)  # None: too short to tell, which breaks no rule
            if language is not None and language not in self.languages:
                return "language", f"{language}: {text[:80]!r}"
        if self.where is not None and not self.where(sample):
            return "where", self.where.name
        return None


@dataclass(frozen=True)
class Judge:
    """The stage: a span of samples -> what is dropped (sample, rule, detail), and with `repeats` a digest of each caption; damage."""

    rules: Rules
    repeats: bool = False

    def __call__(self, span: Span) -> tuple[int, list[tuple[int, str, str]], np.ndarray, list[str]]:
        with Shard(span.name) as shard:
            stop = len(shard) if span.stop is None else span.stop
            dropped, digests = [], np.zeros(stop - span.start if self.repeats else 0, np.uint64)
            for at in range(span.start, stop):
                sample = Sample(shard, at, self.rules.caption)
                try:
                    found = self.rules.verdict(sample)
                    if found is None and self.repeats:
                        digests[at - span.start] = caption_digest(sample.captions)
                except BadSample as error:
                    found = error.reason, error.detail
                if found is not None:
                    dropped.append((at, *found))
            return stop - span.start, dropped, digests, [] if span.start else damage_lines(shard)


def caption_digest(texts: list[str]) -> int:
    """8 bytes of a sample's captions; capitals and white space make no difference."""
    text = "\n".join(" ".join(text.casefold().split()) for text in texts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def repeated(digests: np.ndarray, most: int) -> np.ndarray:
    """uint64 [n] -> bool [n]: those that come after `most` equal ones. O(n log n), 24 bytes each."""
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    begins = np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)]
    first = np.maximum.accumulate(np.where(begins, np.arange(len(ordered)), 0))
    result = np.zeros(len(digests), bool)
    result[order] = np.arange(len(ordered)) - first >= most
    return result


def too_low(scores: np.ndarray, least: float | None, fraction: float | None) -> tuple[np.ndarray, str]:
    """float32 [n] -> (bool [n]: dropped, the rule): below `least`, or not among the best `fraction` (rounded up; the first of equals)."""
    if least is not None:
        return scores < least, f"at least {least:g}"
    keep = int(np.ceil((1.0 if fraction is None else fraction) * len(scores) - 1e-9))
    dropped = np.ones(len(scores), bool)
    best = np.argsort(-scores, kind="stable")[:keep]
    dropped[best] = False
    limit = f"{scores[best[-1]]:.4f}" if len(best) else "nothing"
    return dropped, f"the best {keep} of {len(scores)} begin at {limit}"


def save_scores(place: str, rows: Iterator[tuple[str, str, float]]) -> None:
    """(shard, key, score) rows -> a .parquet or .jsonl file, written atomically, in batches. Raises InputError for another ending."""
    if not place.endswith((".parquet", ".jsonl")):
        raise InputError(f"--save-scores {place}: expected a name that ends in .parquet or .jsonl")
    with tempfile.TemporaryDirectory(prefix="data_prep-") as folder:
        path = Path(folder) / "scores"
        if place.endswith(".jsonl"):
            with path.open("w", encoding="utf-8") as file:
                for shard, key, score in rows:
                    file.write(json.dumps({"shard": shard, "key": key, "score": score}, ensure_ascii=False) + "\n")
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            schema = pa.schema([("shard", pa.string()), ("key", pa.string()), ("score", pa.float32())])
            with pq.ParquetWriter(path, schema) as writer:
                batch: list[tuple[str, str, float]] = []
                for row in rows:
                    batch.append(row)
                    if len(batch) == 10_000:
                        writer.write_table(pa.table(list(zip(*batch)), schema=schema))
                        batch = []
                if batch:
                    writer.write_table(pa.table(list(zip(*batch)), schema=schema))
        files.put(path, place)
