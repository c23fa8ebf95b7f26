"""Readers over an fsspec file system: the same samples as from local files."""

import json
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_prep.build.readers.coco import coco
from data_prep.build.readers.columns import Columns
from data_prep.build.readers.img2dataset import img2dataset
from data_prep.build.readers.json_lines import json_lines
from data_prep.build.readers.parquet import parquet_files
from data_prep.build.readers.sidecar import sidecar
from data_prep.build.readers.voc import voc
from data_prep.build.readers.webdataset import shards
from data_prep.records import Record
from data_prep.shards import read
from data_prep.shards.serial import write_shards
from mmpretrain.data.index import SUFFIX, index_path
from mmpretrain.data.schema import ShardError
from tests.data_prep.build.readers.support import collect, image
from tests.data_prep.build.readers.test_webdataset import downloads

PNG = image()


@pytest.fixture
def remote() -> Iterator[str]:
    system = fsspec.filesystem("memory")
    yield "memory://readers"
    system.rm("/readers", recursive=True)


def put(url: str, data: bytes | str) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(data if isinstance(data, bytes) else data.encode())


def test_tables(remote: str) -> None:
    put(f"{remote}/a.png", PNG)
    put(f"{remote}/t.jsonl", "".join(json.dumps({"image": name, "caption": name}) + "\n" for name in ("a.png", "b.png", f"{remote}/a.png")))
    found, skipped = collect(json_lines([f"{remote}/t.jsonl"], Columns(captions=("caption",), root=remote)))
    assert {key: members["png"] for key, members in found.items()} == {"00000000": PNG, "00000002": PNG}
    assert [item.reason for item in skipped] == ["missing_image"]


def test_parquet(remote: str, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"image": [PNG] * 5}), tmp_path / "t", row_group_size=2)
    put(f"{remote}/t.parquet", (tmp_path / "t").read_bytes())
    assert len(collect(parquet_files([f"{remote}/t.parquet"], Columns()))[0]) == 5


def test_folders(remote: str) -> None:
    put(f"{remote}/s/x/a.png", PNG)
    put(f"{remote}/s/x/a.txt", "one")
    assert collect(sidecar(f"{remote}/s"))[0] == {"x/a": {"png": PNG, "txt": b"one"}}
    put(f"{remote}/c.json", json.dumps({"images": [{"id": 1, "file_name": "x/a.png"}], "annotations": []}))
    assert collect(coco([f"{remote}/c.json"], f"{remote}/s"))[0]["x/a"]["png"] == PNG
    put(f"{remote}/v/JPEGImages/a.png", PNG)
    put(f"{remote}/v/Annotations/a.xml", "<annotation/>")
    put(f"{remote}/v/ImageSets/Main/train.txt", "a\n")
    assert collect(voc(f"{remote}/v", "train"))[0]["a"]["png"] == PNG


def test_shards(remote: str, tmp_path: Path) -> None:
    downloads(tmp_path, 4)
    for path in tmp_path.iterdir():
        put(f"{remote}/w/{path.name}", path.read_bytes())
    found, skipped = collect(img2dataset(f"{remote}/w"))
    assert found == collect(img2dataset(str(tmp_path)))[0]
    assert [(item.where, item.reason) for item in skipped] == [(f"{remote}/w/00001.tar", "count_disagrees")]


def test_parts_of_an_indexed_shard_fetch_only_their_bytes(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [Record(f"{i:03d}", {"png": PNG, "bin": bytes([i]) * 9000}) for i in range(20)]
    write_shards(records, tmp_path / "s")
    data = (tmp_path / "s" / "00000.tar").read_bytes()
    put(f"{remote}/a.tar", data)
    put(f"{remote}/a.tar{SUFFIX}", index_path(tmp_path / "s" / "00000.tar").read_bytes())
    fetched = []
    system = type(fsspec.filesystem("memory"))
    cat, get = system.cat_file, system.get_file
    monkeypatch.setattr(read, "PIECE_BYTES", 10_000)
    monkeypatch.setattr(system, "get_file", lambda self, *given, **more: (fetched.append(len(data)), get(self, *given, **more))[1])

    def counted(self: object, path: str, start: int | None = None, end: int | None = None, **more: object) -> bytes:
        found = cat(self, path, start=start, end=end, **more)
        fetched.extend([len(found)] if path.endswith(".tar") else [])
        return found

    monkeypatch.setattr(system, "cat_file", counted)
    found, skipped = collect(shards([f"{remote}/a.tar"]), 3)
    assert found == {record.key: record.members for record in records}
    assert not skipped
    assert max(fetched) <= 10_000
    assert sum(fetched) <= len(data)
    put(f"{remote}/a.tar", data + bytes(10_240))
    with pytest.raises(ShardError, match="Index it again"):
        collect(shards([f"{remote}/a.tar"]), 3)


def test_a_shard_without_an_index_is_fetched_once_by_a_worker(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, colour in (("a", 10), ("b", 200)):
        records = [Record(f"{name}{i:03d}", {"png": image((colour, i, 0))}) for i in range(10)]
        write_shards(records, tmp_path / name)
        put(f"{remote}/{name}.tar", (tmp_path / name / "00000.tar").read_bytes())
    fetched = []
    system = type(fsspec.filesystem("memory"))
    get = system.get_file
    monkeypatch.setattr(system, "get_file", lambda self, path, *given, **more: (fetched.append(path), get(self, path, *given, **more))[1])
    reader = shards([f"{remote}/a.tar", f"{remote}/b.tar"])
    tasks = list(reader.tasks(3))
    fetched.clear()  # what it took to index them
    keys = [record.key for task in tasks for record in reader(task)]
    assert keys == [f"{name}{i:03d}" for name in "ab" for i in range(10)]
    assert [path[-5:] for path in fetched] == ["a.tar", "b.tar"]
    put(f"{remote}/b.tar", (tmp_path / "a" / "00000.tar").read_bytes())  # of the same size
    assert [record.key for task in shards([f"{remote}/b.tar"]).tasks(10) for record in reader(task)] == [f"a{i:03d}" for i in range(10)]
