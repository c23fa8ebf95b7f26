"""Remote shards: copied, bounded, checked by size, fetched again after failures."""

import json
import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from data_prep.records import Record
from data_prep.shards.serial import write_shards
from mmpretrain.data import cache as cache_module
from mmpretrain.data.cache import ShardCache
from mmpretrain.data.loader import Loader
from mmpretrain.data.schema import ShardError
from mmpretrain.data.source import Source, SourceConfig
from mmpretrain.data.views import CenterView
from tests.data.generated import encoded, picture

IMAGE = CenterView(size=16)


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[str]:
    """Three built shards of four samples in memory://, with index and sizes.json."""
    write_shards([Record(f"{i:02d}", {"jpg": encoded(picture(i))}) for i in range(12)], tmp_path / "built", max_count=4)
    name = f"memory://{uuid.uuid4().hex}"
    memory = fsspec.filesystem("memory")
    for file in (tmp_path / "built").iterdir():
        memory.pipe_file(f"{name}/{file.name}", file.read_bytes())
    yield name
    memory.rm(name, recursive=True)


def source(bucket: str, cache: Path, **config: object) -> Source:
    return Source("remote", SourceConfig(shards=bucket + "/{00000..00002}.tar", cache_dir=str(cache), batch_size=4, **config), [IMAGE])


def test_remote_shards_read_like_local_ones(bucket: str, tmp_path: Path) -> None:
    remote = source(bucket, tmp_path / "cache")
    assert remote.num_samples == 12
    loader = Loader({"remote": remote}, threads=2, timeout_s=30)
    keys = [key.rpartition("/")[2] for _ in range(3) for key in next(loader)["remote"].keys]
    loader.close()
    assert sorted(keys) == [f"{i:02d}" for i in range(12)]
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [True, False])
def test_loader_processes_read_from_an_object_store(
    object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """Its client runs threads, which forked processes do not have; without read-ahead in the parent the processes fetch themselves."""
    write_shards([Record(f"{i:02d}", {"jpg": encoded(picture(i))}) for i in range(12)], tmp_path / "set", max_count=4)
    object_store.put(str(tmp_path / "set"), "bucket/set", recursive=True)
    remote = source("s3://bucket/set", tmp_path / "cache")
    if not ahead:
        monkeypatch.setattr(remote, "read_ahead", lambda slot: None)
    loader = Loader({"remote": remote}, threads=2, timeout_s=60)
    keys = [key.rpartition("/")[2] for _ in range(3) for key in next(loader)["remote"].keys]
    loader.close()
    assert sorted(keys) == [f"{i:02d}" for i in range(12)]


def test_without_sizes_the_indexes_count_and_without_both_the_command_is_printed(bucket: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.rm_file(bucket + "/sizes.json")
    assert source(bucket, tmp_path).num_samples == 12
    memory.rm_file(bucket + "/00001.tar.index.npz")
    with pytest.raises(ShardError, match=r"00001\.tar: a remote shard needs its index.*python -m data_prep index"):
        source(bucket, tmp_path)


def test_sizes_alone_are_enough_and_must_be_true(bucket: str, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for i in range(3):
        memory.rm_file(f"{bucket}/0000{i}.tar.index.npz")
    assert len(source(bucket, tmp_path).rows(range(12)).keys) == 12
    memory.pipe_file(bucket + "/sizes.json", json.dumps({f"0000{i}.tar": 5 for i in range(3)}).encode())
    with pytest.raises(ShardError, match=r"4 samples found, sizes\.json says 5"):
        source(bucket, tmp_path).rows(range(12))
    memory.pipe_file(bucket + "/sizes.json", b'["00000.tar"]')
    with pytest.raises(ShardError, match=r"sizes\.json: expected"):
        source(bucket, tmp_path)


def test_short_reads_and_resets_are_retried_then_an_error(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, failures = bucket + "/00000.tar", [2]
    real = MemoryFileSystem.open

    def flaky(self: MemoryFileSystem, path: str, *args: object, **kwargs: object) -> object:
        file = real(self, path, *args, **kwargs)
        if failures[0] > 0 and path.endswith(".tar"):
            failures[0] -= 1
            if failures[0] % 2:
                raise ConnectionResetError("reset by peer")
            return fsspec.core.OpenFile(fsspec.filesystem("memory"), path).open() if failures[0] < 0 else _Short(file)
        return file

    monkeypatch.setattr(MemoryFileSystem, "open", flaky)
    path = ShardCache(tmp_path, first_wait=0.01).fetch(url)
    assert os.path.getsize(path) == fsspec.filesystem("memory").size(url)
    assert failures == [0]
    failures[0] = 10**6
    with pytest.raises(ShardError, match=r"00000\.tar: failed 3 times, last with"):
        ShardCache(tmp_path / "other", attempts=3, first_wait=0.01).fetch(url)
    assert [f for f in (tmp_path / "other" / "shards").rglob("*") if f.is_file()] == []  # no partial file left


class _Short:
    """A stream that ends early without saying so, as a dropped connection does."""

    def __init__(self, file: object) -> None:
        self._data: bytes | None = file.read()[:1000]

    def read(self, n: int = -1) -> bytes:
        data, self._data = self._data, b""
        return data or b""

    def __enter__(self) -> "_Short":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def test_the_cache_is_bounded_and_an_evicted_shard_comes_again(bucket: str, tmp_path: Path) -> None:
    size = fsspec.filesystem("memory").size(bucket + "/00000.tar")
    cache = ShardCache(tmp_path, max_bytes=2 * size + 100)
    for i in (0, 1, 2):
        cache.fetch(f"{bucket}/0000{i}.tar")
    held = list((tmp_path / "shards").glob("*.tar"))
    assert len(held) == 2
    assert os.path.exists(cache.fetch(f"{bucket}/00000.tar"))


def test_a_copy_is_used_again(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ShardCache(tmp_path).fetch(bucket + "/00000.tar")
    monkeypatch.setattr(ShardCache, "_copy", lambda *_: pytest.fail("fetched twice"))
    assert ShardCache(tmp_path).fetch(bucket + "/00000.tar") == first


def test_missing_and_unknown_remote_places(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no such file"):
        cache_module.retried(lambda: ShardCache(tmp_path).fetch("memory://nowhere/0.tar"), "x", attempts=1)
    with pytest.raises(ShardError, match="nosuch"):
        ShardCache(tmp_path).fetch("nosuch://x/0.tar")


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(bucket: str, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    old, young = folder / "a.tar.tmp-1", folder / "b.tar.tmp-2"
    for file in (old, young):
        file.write_bytes(b"part")
    os.utime(old, (1, 1))
    ShardCache(tmp_path).fetch(bucket + "/00000.tar")
    assert not old.exists()
    assert young.exists()


def test_two_processes_fetch_a_shard_once(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies, real = [], ShardCache._copy

    def slow(*arguments: object) -> None:
        copies.append(arguments)
        time.sleep(0.3)
        real(*arguments)

    monkeypatch.setattr(ShardCache, "_copy", staticmethod(slow))
    with ThreadPoolExecutor(2) as pool:  # a lock on a file holds between two openings of it, whoever made them
        paths = list(pool.map(lambda _: ShardCache(tmp_path).fetch(bucket + "/00000.tar"), range(2)))
    assert paths[0] == paths[1]
    assert len(copies) == 1


def test_a_hiccup_while_looking_for_an_index_is_retried(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failures, real = [1], MemoryFileSystem.cat_file

    def flaky(self: MemoryFileSystem, path: str, **options: object) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise ConnectionResetError("reset by peer")
        return real(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", flaky)
    monkeypatch.setattr(cache_module.time, "sleep", lambda _: None)
    assert len(cache_module.read_sizes([bucket + "/00000.tar"])) == 1
    assert failures == [0]
