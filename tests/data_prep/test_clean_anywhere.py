"""`filter` and `dedup` give the same bytes and lines wherever the shards lie and whichever engine does the work."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from data_prep.dedup import command as dedup
from data_prep.filter import command as filter
from data_prep.filter.rules import Rules
from data_prep.records import Record
from data_prep.shards.serial import write_shards
from mmpretrain.data.index import SUFFIX


def webp(seed: int, quality: int = 90) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC).save(out, "WEBP", quality=quality)
    return out.getvalue()


def drop_short(shards: str, out: str, **run: Any) -> dict[str, Any]:
    return filter.select([shards], out, rules=Rules(min_words=2), max_repeats=2, **run)


def drop_copies(shards: str, out: str, **run: Any) -> dict[str, Any]:
    return dedup.deduplicate([shards], out, **run)


CLEAN = pytest.mark.parametrize("clean", [drop_short, drop_copies])
Clean = Callable[..., dict[str, Any]]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Twelve samples in three shards: samples 3, 7 and 11 are copies of the first, re-encoded; every third has a single word."""
    pictures = [webp(0, 80 + i % 5) if i % 4 == 3 else webp(i) for i in range(12)]
    texts = ["word" if i % 3 == 2 else "two words" for i in range(12)]
    records = [Record(f"k{i:02d}", {"webp": picture, "txt": text.encode()}) for i, (picture, text) in enumerate(zip(pictures, texts))]
    write_shards(records, tmp_path / "in", max_count=4)
    (tmp_path / "in" / "classnames.txt").write_text("a\nb\n")
    return tmp_path / "in"


@pytest.fixture
def remote() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/clean", recursive=True)


def content(folder: Path) -> dict[str, bytes]:
    """The written files, without those that name where the input lay or were stamped by it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("manifest.json", "skipped.jsonl")}


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    return {name: result[name] for name in ("samples", "good", "dropped", "written")}


@CLEAN
@pytest.mark.parametrize("indexed", [True, False])
def test_urls(clean: Clean, indexed: bool, shards: Path, tmp_path: Path, remote: fsspec.AbstractFileSystem) -> None:
    expected = clean(str(shards), str(tmp_path / "local"), processes=1)
    assert 0 < expected["good"] < 12
    assert expected["good"] + sum(expected["dropped"].values()) == 12
    for path in shards.iterdir():
        if indexed or not path.name.endswith(SUFFIX):
            remote.put_file(str(path), f"/clean/in/{path.name}")
    assert numbers(clean("memory://clean/in", "memory://clean/out", processes=1)) == numbers(expected)
    remote.get("/clean/out", str(tmp_path / "fetched"), recursive=True)
    assert content(tmp_path / "fetched") == content(tmp_path / "local")
    assert numbers(clean(f"file://{shards}", f"file://{tmp_path}/url", processes=1)) == numbers(expected)
    assert content(tmp_path / "url") == content(tmp_path / "local")
    assert "classnames.txt" in content(tmp_path / "url")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One for all stages: to start it takes longer than they do."""
    ray = pytest.importorskip("ray")
    ray.shutdown()  # of a test before this one
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@CLEAN
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_ray_writes_the_same(clean: Clean, shards: Path, tmp_path: Path) -> None:
    expected = clean(str(shards), str(tmp_path / "local"), processes=2)
    assert numbers(clean(str(shards), str(tmp_path / "ray"), engine="ray", processes=2)) == numbers(expected)
    assert content(tmp_path / "ray") == content(tmp_path / "local")
    assert (tmp_path / "ray" / "skipped.jsonl").read_bytes() == (tmp_path / "local" / "skipped.jsonl").read_bytes()
