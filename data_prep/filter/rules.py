"""The rules of `filter`: on single samples, on repeated captions, and on scores."""

from __future__ import annotations

import hashlib
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

from data_prep import files
from data_prep.captions import language_of
from data_prep.records import InputError, Record
from data_prep.shards.read import Shard, Span, captions, damage_lines, image_member, pixels
from mmpretrain.data import decode, raster
from mmpretrain.data.fields import decode_json, member_of
from mmpretrain.data.formats import decode_text
from mmpretrain.data.schema import LABEL_EXTENSION, METADATA_EXTENSION, BadSample

LIMITS = decode.ImageLimits(min_side=1, max_aspect=float("inf"))


class Sample:
    """A sample as rules and a user's predicate read it. Members are decoded when accessed; missing ones raise BadSample."""

    def __init__(self, shard: Shard, index: int, caption: str = "txt") -> None:
        self.key = shard.key(index)
        self._shard, self._index, self._caption = shard, index, caption
        self.members = frozenset(shard.index.members(index))  # extensions

    def _read(self, extension: str) -> bytes:
        return self._shard.read(self._index, {extension}).members[extension]

    @cached_property
    def captions(self) -> list[str]:
        extension = member_of(self._caption)
        return captions(Record(self.key, {extension: self._read(extension)} if extension in self.members else {}), self._caption)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The content of its json member; {} without one."""
        return decode_json(self._read(METADATA_EXTENSION)) if METADATA_EXTENSION in self.members else {}

    @cached_property
    def label(self) -> str | None:
        """The text of its cls member; None without one."""
        return decode_text(self._read(LABEL_EXTENSION)) if LABEL_EXTENSION in self.members else None

    @cached_property
    def image_bytes(self) -> bytes:
        extension = image_member(self.members)
        if extension is None:
            raise BadSample("missing_image", f"it has {', '.join(sorted(self.members))}")
        return self._read(extension)

    @cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) as shown, read from the header of the image."""
        kind = decode.sniff(self.image_bytes)
        if kind is None:
            raise BadSample("unknown_format", f"begins with {self.image_bytes[:12]!r}")
        header = raster.read_header(self.image_bytes, kind)
        return header.width, header.height

    @cached_property
    def image(self) -> np.ndarray:
        """uint8 [H,W,3], as training decodes it."""
        return pixels(self.image_bytes, LIMITS).permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class Predicate:
    """A user's function Sample -> bool, passed to workers as source text, so that all of them run the version read here."""

    name: str  # file:function
    source: str

    @classmethod
    def read(cls, spec: str) -> Predicate:
        """Reads FILE.py:function. Raises InputError where either is missing."""
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
        """Applies the function. Raises InputError where it fails or returns no bool: its bugs must not silently drop samples."""
        try:
            answer = self.function()(sample)
        except BadSample:
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise InputError(f"--where {self.name}, line {place.lineno}: {type(error).__name__}: {error} (sample {sample.key})") from error
        if not isinstance(answer, bool | np.bool_):
            raise InputError(f"--where {self.name}: returned {answer!r:.80} for sample {sample.key}, expected True (keep) or False")
        return bool(answer)


@cache
def _function(name: str, source: str) -> Any:
    file, _, function = name.rpartition(":")
    module = ModuleType("predicate")
    try:
        exec(compile(source, file, "exec"), module.__dict__)  # the user's own file, named on the command line
    except Exception as error:
        raise InputError(f"--where {name}: {type(error).__name__}: {error}") from error
    predicate = getattr(module, function, None)
    if not callable(predicate):
        names = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_")) or "none"
        raise InputError(f"--where {name}: {file} has no function {function!r}; it has {names}")
    return predicate


@dataclass(frozen=True)
class Rules:
    """The conditions on a single sample; None: no condition. Of several captions, each must pass."""

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
        """Returns (the first violated rule, details); None for a sample that passes. Raises BadSample for an unreadable member."""
        if self.min_side is not None or self.max_aspect is not None:
            width, height = sample.size
            if self.min_side is not None and min(width, height) < self.min_side:
                return "min_side", f"{width} x {height} pixels, the shorter side must be {self.min_side}"
            if self.max_aspect is not None and max(width, height) > self.max_aspect * min(width, height):
                return "max_aspect", f"{width} x {height} pixels, sides may differ {self.max_aspect:g} times"
        lengths = {"words": (self.min_words, self.max_words), "chars": (self.min_chars, self.max_chars)}
        for unit, (minimum, maximum) in lengths.items():
            for text in sample.captions if (minimum, maximum) != (None, None) else ():
                count = len(text.split()) if unit == "words" else len(text)
                if minimum is not None and count < minimum:
                    return f"min_{unit}", f"{count} {unit}, at least {minimum}: {text[:80]!r}"
                if maximum is not None and count > maximum:
                    return f"max_{unit}", f"{count} {unit}, at most {maximum}: {text[:80]!r}"
        for text in sample.captions if self.languages else ():
            language = language_of(text)  # None: too short to detect, which violates no rule
            if language is not None and language not in self.languages:
                return "language", f"{language}: {text[:80]!r}"
        if self.where is not None and not self.where(sample):
            return "where", self.where.name
        return None


@dataclass(frozen=True)
class Judge:
    """The task of a worker: judges a span of samples.

    Returns their number, the dropped ones (sample, rule, detail), with `repeats` a digest of the captions of each, and the
    damage of the shard.
    """

    rules: Rules
    repeats: bool = False

    def __call__(self, span: Span) -> tuple[int, list[tuple[int, str, str]], np.ndarray, list[str]]:
        with Shard(span.name) as shard:
            stop = len(shard) if span.stop is None else span.stop
            dropped, digests = [], np.zeros(stop - span.start if self.repeats else 0, np.uint64)
            for index in range(span.start, stop):
                sample = Sample(shard, index, self.rules.caption)
                try:
                    violation = self.rules.verdict(sample)
                    if violation is None and self.repeats:
                        digests[index - span.start] = caption_digest(sample.captions)
                except BadSample as error:
                    violation = error.reason, error.detail
                if violation is not None:
                    dropped.append((index, *violation))
            return stop - span.start, dropped, digests, [] if span.start else damage_lines(shard)


def caption_digest(texts: list[str]) -> int:
    """Digests the captions of a sample to 8 bytes, regardless of case and white space."""
    text = "\n".join(" ".join(text.casefold().split()) for text in texts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def repeated(digests: np.ndarray, max_repeats: int) -> np.ndarray:
    """Marks digests, uint64 [n], with at least `max_repeats` equal ones before them: bool [n]. O(n log n), 24 bytes each."""
    order = np.argsort(digests, kind="stable")
    ordered = digests[order]
    begins = np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)]
    first = np.maximum.accumulate(np.where(begins, np.arange(len(ordered)), 0))
    result = np.zeros(len(digests), bool)
    result[order] = np.arange(len(ordered)) - first >= max_repeats
    return result


def too_low(scores: np.ndarray, min_score: float | None, keep_top: float | None) -> tuple[np.ndarray, str]:
    """Marks the low scores.

    Args:
        scores: float32 [n].
        min_score: drop scores below it; else `keep_top` applies.
        keep_top: keep this fraction, rounded up; ties go to the first.

    Returns:
        (bool [n]: dropped, a description of the limit).
    """
    if min_score is not None:
        return scores < min_score, f"at least {min_score:g}"
    keep = int(np.ceil((1.0 if keep_top is None else keep_top) * len(scores) - 1e-9))
    dropped = np.ones(len(scores), bool)
    best = np.argsort(-scores, kind="stable")[:keep]
    dropped[best] = False
    limit = f"{scores[best[-1]]:.4f}" if len(best) else "nothing"
    return dropped, f"the best {keep} of {len(scores)} begin at {limit}"


def save_scores(place: str, rows: Iterator[tuple[str, str, float]]) -> None:
    """Writes (shard, key, score) rows to a .parquet or .jsonl file, atomically. Raises InputError for another extension."""
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
