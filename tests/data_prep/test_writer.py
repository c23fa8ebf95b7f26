"""Shards are written whole, the same each time, and never over something else."""

import hashlib
import json
from pathlib import Path

import pytest

from data_prep import serial
from data_prep.writer import Record, write_shards
from mmpretrain.data.index import index_path, load


def records(count: int = 7) -> list[Record]:
    return [Record(f"k{i}", {"jpg": bytes([i]) * (100 * i), "txt": f"number {i}".encode()}) for i in range(count)]


def tree(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_what_is_written(tmp_path: Path) -> None:
    out = tmp_path / "s"
    manifest = write_shards(records(), out, max_count=3, command="build", licence="CC0")
    assert sorted(p.name for p in out.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 3, "00001.tar": 3, "00002.tar": 1}
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert (manifest["num_samples"], manifest["members"], manifest["licence"]) == (7, {"jpg": 7, "txt": 7}, "CC0")
    assert manifest["shards"]["00001.tar"]["sha256"] == tree(out)["00001.tar"]
    index, _ = load(index_path(out / "00001.tar"))
    assert index.members(2)["txt"].sha256 == hashlib.sha256(b"number 5").digest()
    assert not list(out.glob("*.tmp*")) + list(out.glob("unfinished*"))


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(records(), tmp_path / name, max_count=3)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_shards_keep_to_their_size(tmp_path: Path) -> None:
    write_shards([Record(f"{i}", {"jpg": b"x" * 1000}) for i in range(10)], tmp_path / "s", max_bytes=5000)
    assert json.loads((tmp_path / "s" / "sizes.json").read_text()) == {f"0000{i}.tar": 2 for i in range(5)}


@pytest.mark.parametrize("after", ["_write", "save"])
def test_a_killed_build_resumes_and_ends_the_same(after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(records(), tmp_path / "whole", max_count=2)
    holder = serial if after == "_write" else serial.shard_index
    real, calls = getattr(holder, after), []

    def killed(*args: object) -> None:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(holder, after, killed)
    with pytest.raises(KeyboardInterrupt):
        write_shards(records(), tmp_path / "s", max_count=2)
    assert sorted(p.name for p in (tmp_path / "s").glob("*.tar")) == ["00000.tar", "00001.tar"]  # only whole shards have their name
    assert not (tmp_path / "s" / "manifest.json").exists()
    monkeypatch.undo()
    stamp = (tmp_path / "s" / "00001.tar").stat().st_mtime_ns
    write_shards(records(), tmp_path / "s", max_count=2)
    assert (tmp_path / "s" / "00001.tar").stat().st_mtime_ns == stamp  # kept, not written again
    assert tree(tmp_path / "s") == tree(tmp_path / "whole")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "s"
    write_shards(records(), out, max_count=3)
    before = tree(out)
    write_shards(records(), out, max_count=3)  # the same again is fine
    changed = [*records()[:4], Record("k4", {"jpg": b"other"}), *records()[5:]]
    for inputs, count in ((changed, 3), (records(9), 3), (records(3), 3), (records(), 4)):
        with pytest.raises(FileExistsError, match="Choose another --out"):
            write_shards(inputs, out, max_count=count)
    assert tree(out) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        write_shards(records(), tmp_path / "other")


@pytest.mark.parametrize("key", ["a.b", "../x", "/x", "a//b", "", "a b", "a\nb", "x" * 201, "a/../b", "con:x"])
def test_unsafe_keys_are_refused(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="key"):
        write_shards([Record(key, {"txt": b""})], tmp_path / "s")


def test_duplicate_keys_and_odd_members_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'k0' comes twice"):
        write_shards([*records(3), records(1)[0]], tmp_path / "a", max_count=2)
    for members in ({}, {"JPG": b""}, {"a/b": b""}, {"": b""}):
        with pytest.raises(ValueError, match="key 'k'"):
            write_shards([Record("k", members)], tmp_path / "b")
