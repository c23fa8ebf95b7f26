"""Shards as the other stages read them: local and remote ones alike, and what cannot be read named."""

import json
import os
import pickle
from pathlib import Path

import fsspec
import pytest
import torch

from data_prep.records import Record
from data_prep.shards import read as samples
from data_prep.shards.read import Shard
from data_prep.shards.serial import write_shards
from mmpretrain.data.decode import ImageLimits, decode_image
from mmpretrain.data.schema import BadSample, ShardError
from tests.data.generated import encoded, pair, picture, tar_bytes


def foreign(folder: Path, members: list[tuple[str, bytes]]) -> Path:
    """A shard as others write them, without an index."""
    path = folder / "00000.tar"
    path.write_bytes(tar_bytes(members))
    return path


def records(count: int) -> list[Record]:
    return [Record(f"k{i}", {name.partition(".")[2]: data for name, data in pair(i)}) for i in range(count)]


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    """Two built shards in a remote folder, with their indexes."""
    write_shards(records(5), tmp_path / "built", max_count=3)
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "built").iterdir():
        memory.pipe(f"/{tmp_path.name}/{path.name}", path.read_bytes())
    return f"memory://{tmp_path.name}"


def test_reads_what_was_written(tmp_path: Path) -> None:
    write_shards(records(3), tmp_path)
    with Shard(str(tmp_path / "00000.tar")) as shard:
        assert [shard.key(i) for i in range(len(shard))] == ["k0", "k1", "k2"]
        assert list(shard) == records(3)
        assert shard.read(1, ["txt", "npy"]).members == {"txt": b"picture 1"}


def test_pickles_as_its_name(tmp_path: Path) -> None:
    opened = Shard(str(foreign(tmp_path, [*pair(0), ("big.png", b"x" * 100_000)])))
    data = pickle.dumps(opened)
    assert len(data) < 1000
    assert pickle.loads(data).read(1).members == {"png": b"x" * 100_000}


def test_foreign_shards_are_read_without_writing_beside_them(tmp_path: Path) -> None:
    path = foreign(tmp_path, [*pair(0), *pair(0)])
    assert [record.key for record in Shard(str(path))] == ["00000", "00000~2"]
    assert [p.name for p in path.parent.iterdir()] == ["00000.tar"]


def test_remote_shards_read_like_local_ones_and_leave_nothing_behind(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = set(tmp_path.iterdir())
    for spec in (bucket, bucket + "/*.tar", bucket + "/{00000..00001}.tar"):
        names = samples.expand([spec])
        assert names == [f"memory:///{tmp_path.name}/0000{i}.tar" for i in range(2)] or names == [f"{bucket}/0000{i}.tar" for i in range(2)]
        read = []
        for name in names:
            with Shard(name) as shard:
                assert shard.index.checksum is not None
                read += list(shard)
        assert read == records(5)
    assert set(tmp_path.iterdir()) == before


def test_a_remote_shard_cut_since_it_was_indexed_is_named_by_its_url(bucket: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    place = f"/{tmp_path.name}/00000.tar"
    memory.pipe(place, memory.cat_file(place)[:4000])
    with pytest.raises(ShardError, match=rf"{bucket}/00000\.tar: 4000 bytes, but its index says \d+ bytes and 3 samples"):
        Shard(f"{bucket}/00000.tar")


def test_a_remote_folder_without_shards_is_named(bucket: str) -> None:
    with pytest.raises(ShardError, match=r"/none: no \*\.tar found"):
        samples.expand([bucket + "/none"])
    with pytest.raises(ShardError, match="no shards were named"):
        samples.expand([])


def test_a_remote_folder_may_have_brackets_in_its_name(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/set[v2]/0.tar", b"x")
    (name,) = samples.expand([f"memory://{tmp_path.name}/set[v2]"])
    assert name.endswith("/set[v2]/0.tar")


def test_file_urls_are_local_paths(tmp_path: Path) -> None:
    path = foreign(tmp_path, pair(0))
    assert samples.expand([f"file://{path}"]) == [str(path)]


@pytest.mark.parametrize(("damage", "reason"), [("flip", "checksum"), ("cut", "cut")])
def test_bytes_changed_since_opening_are_a_bad_sample(tmp_path: Path, damage: str, reason: str) -> None:
    write_shards(records(3), tmp_path)
    path = tmp_path / "00000.tar"
    shard = Shard(str(path))
    member = shard.index.members(2)["jpg"]
    if damage == "flip":
        with open(path, "r+b") as file:
            file.seek(member.offset + 40)
            file.write(b"?!")
    else:
        os.truncate(path, member.offset + 40)
    assert shard.read(1) == records(3)[1]
    with pytest.raises(BadSample) as caught:
        shard.read(2)
    assert caught.value.reason == reason


def test_captions_from_text_and_json() -> None:
    meta = json.dumps({"caption": "one", "captions": ["a", " ", "b"], "number": 3}).encode()
    record = Record("k", {"txt": b"\xef\xbb\xbfcafe\xcc\x81 \n", "json": meta, "bad.txt": b"\xff"})
    assert samples.captions(record) == ["caf\u00e9"]
    assert samples.captions(record, "json:caption") == ["one"]
    assert samples.captions(record, "json:captions") == ["a", "b"]
    for caption, reason in [
        ("vtt", "missing_field"),
        ("json:none", "missing_field"),
        ("json:number", "bad_caption"),
        ("bad.txt", "not_utf8"),
    ]:
        with pytest.raises(BadSample) as caught:
            samples.captions(record, caption)
        assert caught.value.reason == reason


def test_pixels_are_those_of_training() -> None:
    data = encoded(picture())
    assert torch.equal(samples.pixels(data), decode_image(data))
    with pytest.raises(BadSample, match="too_many_pixels"):
        samples.pixels(data, ImageLimits(max_pixels=100))
    assert samples.image_member({"txt": 1, "webp": 2}) == "webp"
    assert samples.image_member(["txt"]) is None


def test_what_is_no_shard_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"<html>")
    (tmp_path / "1.tar").write_bytes(tar_bytes([]))
    with pytest.raises(ShardError, match=r"0\.tar: a web page"):
        Shard(str(tmp_path / "0.tar"))
    assert len(Shard(str(tmp_path / "1.tar"))) == 0
