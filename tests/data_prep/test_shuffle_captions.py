"""The control of shuffled captions: the same images, labels and captions, and no caption where it was."""

import subprocess
import sys
from pathlib import Path

from data_prep.samples import Shard, expand
from data_prep.writer import Record, write_shards

ROOT = Path(__file__).parent.parent.parent


def test_every_caption_moves_and_none_is_lost(tmp_path):
    records = [Record(f"k{i}", {"jpg": bytes([i]), "txt": f"caption {i}".encode(), "cls": str(i).encode()}) for i in range(7)]
    write_shards(records, tmp_path / "in", max_count=3)
    command = [sys.executable, str(ROOT / "scripts" / "shuffle_captions.py"), str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = [record.members for name in expand([str(tmp_path / "out")]) for record in Shard(name)]
    assert [(m["jpg"], m["cls"]) for m in found] == [(r.members["jpg"], r.members["cls"]) for r in records]
    assert sorted(m["txt"] for m in found) == sorted(r.members["txt"] for r in records)
    assert all(m["txt"] != r.members["txt"] for m, r in zip(found, records))
    again = subprocess.run(
        [*command[:2], str(tmp_path / "in" / "00002.tar"), str(tmp_path / "one")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1
    assert "at least two" in again.stderr
