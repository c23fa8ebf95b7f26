"""Run a reader as `build` does, without writing shards."""

import io
import pickle
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep.records import Record, Skipped
from mmpretrain.data.index import open_index


def image(colour: tuple[int, int, int] = (200, 30, 30), kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(out, kind)
    return out.getvalue()


def samples(out: Path) -> dict[str, dict[str, bytes]]:
    """Key -> members of the shards in a folder."""
    found = {}
    for shard in sorted(out.glob("*.tar")):
        data, index = shard.read_bytes(), open_index(shard)
        for i, key in enumerate(index.keys):
            found[key] = {e: data[m.offset : m.offset + m.size] for e, m in index.members(i).items()}
    return found


def collect(reader: Any, max_count: int = 3) -> tuple[dict[str, dict[str, bytes]], list[Skipped]]:
    """(members by key, what was left out). Reader and tasks go through pickle, and tasks are the same each time, as workers need it."""
    records: dict[str, dict[str, bytes]] = {}
    skipped: list[Skipped] = []
    tasks = list(reader.tasks(max_count))
    assert list(map(repr, tasks)) == list(map(repr, reader.tasks(max_count)))
    worker = pickle.loads(pickle.dumps(reader))
    for task in tasks:
        made = list(worker(pickle.loads(pickle.dumps(task))))
        assert sum(isinstance(item, Record) for item in made) <= max_count
        for item in made:
            if isinstance(item, Skipped):
                skipped.append(item)
                continue
            item.check()
            assert item.key not in records, f"{item.key} came twice"
            records[item.key] = item.members
    return records, skipped


def reasons(skipped: list[Skipped]) -> dict[str, str]:
    """where -> reason"""
    return {item.where: item.reason for item in skipped}
