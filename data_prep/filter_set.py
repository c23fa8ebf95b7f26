"""Rules over the whole set: repeated captions, and scores under a model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep import files
from data_prep.records import InputError


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
