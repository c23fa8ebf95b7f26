"""The control of shuffled captions: the same images, labels and captions, and no caption where it was."""

from typer.testing import CliRunner, Result

from data_prep.__main__ import app
from data_prep.records import Record
from data_prep.shards.read import Shard, expand
from data_prep.shards.serial import write_shards


def shuffle(shards: object, out: object) -> Result:
    return CliRunner().invoke(app, ["shuffle", str(shards), "--out", str(out)])


def test_every_caption_moves_and_none_is_lost(tmp_path):
    records = [Record(f"k{i}", {"jpg": bytes([i]), "txt": f"caption {i}".encode(), "cls": str(i).encode()}) for i in range(7)]
    write_shards(records, tmp_path / "in", max_count=3)
    done = shuffle(tmp_path / "in", tmp_path / "out")
    assert done.exit_code == 0, done.output
    found = [record.members for name in expand([str(tmp_path / "out")]) for record in Shard(name)]
    assert [(m["jpg"], m["cls"]) for m in found] == [(r.members["jpg"], r.members["cls"]) for r in records]
    assert sorted(m["txt"] for m in found) == sorted(r.members["txt"] for r in records)
    assert all(m["txt"] != r.members["txt"] for m, r in zip(found, records))
    alone = shuffle(tmp_path / "in" / "00002.tar", tmp_path / "one")
    assert alone.exit_code == 1
    assert "at least two" in alone.output
