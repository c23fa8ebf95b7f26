"""Batches: complete, in order, the same for any threads, processes, ranks and resumption."""

import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.records import Record
from data_prep.shards.serial import write_shards
from mmpretrain.data import decode, fields
from mmpretrain.data.loader import Loader
from mmpretrain.data.source import Source, SourceConfig
from mmpretrain.data.views import ImageView, TextView
from mmpretrain.types import Batch
from tests.data.generated import encoded, picture

STRONG = ImageView(
    size=16, scale=(0.2, 1), flip=0.5, jitter_prob=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.5, solarize=0.3
)
TEXT = TextView(context_length=16)
N = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    records = [Record(f"{i:03d}", {"jpg": encoded(picture(i)), "txt": ("picture " * (1 + i % 9)).encode()}) for i in range(N)]
    records[7] = Record("007", {"jpg": encoded(picture(0))[:300], "txt": b"cut"})
    write_shards(records, out / "s", max_count=20)
    return out / "s"


def sources(folder: Path) -> dict[str, Source]:
    return {
        "pairs": Source("pairs", SourceConfig(shards=str(folder), batch_size=16), [STRONG, TEXT]),
        "photos": Source("photos", SourceConfig(shards=str(folder / "00000.tar"), batch_size=8), [STRONG]),
    }


@pytest.fixture
def loaders(folder: Path) -> Iterator[object]:
    made: list[Loader] = []

    def make(**options: object) -> Loader:
        made.append(Loader(sources(folder), **{"threads": 2, "timeout_s": 60.0} | options))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def same(a: Batch, b: Batch) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].keys == b[name].keys
        assert torch.equal(a[name].seeds, b[name].seeds)
        for spec, view in a[name].views.items():
            assert torch.equal(view.data, b[name].views[spec].data)


@pytest.mark.parametrize("processes", [True, False])
def test_batches_do_not_depend_on_threads_processes_and_blocks(loaders, monkeypatch: pytest.MonkeyPatch, processes: bool) -> None:
    first = loaders(threads=1, prefetch=1, processes=False)
    monkeypatch.setattr("mmpretrain.data.loader.MIN_BLOCK", 3)
    second = loaders(threads=5, processes=processes)
    for _ in range(8):
        same(next(first), next(second))
        assert first.drain_skipped() == second.drain_skipped()


def test_resume_at_any_step_gives_the_same_batches(loaders) -> None:
    whole = loaders()
    positions, batches = [], []
    for _ in range(8):
        positions.append(whole.position())
        batches.append(next(whole))
    assert positions[3] == {"pairs": 48, "photos": 24}
    for step in (1, 3, 6):
        resumed = loaders(start=positions[step])
        for batch in batches[step:]:
            same(batch, next(resumed))


@pytest.mark.parametrize("world", [2, 4, 8])  # more ranks than shards too
def test_ranks_partition_the_global_batch(loaders, world: int) -> None:
    whole, parts = loaders(), [loaders(rank=r, world_size=world) for r in range(world)]
    for _ in range(4):
        batch, shares = next(whole), [next(part) for part in parts]
        for name, rows in batch.items():
            assert rows.keys == [key for share in shares for key in share[name].keys]
            assert torch.equal(rows.seeds, torch.cat([share[name].seeds for share in shares]))
            assert torch.equal(rows.views[STRONG].data, torch.cat([share[name].views[STRONG].data for share in shares]))


def test_an_epoch_holds_every_good_sample_and_reports_the_bad(loaders) -> None:
    loader = loaders()
    keys: list[str] = []
    records = []
    for _ in range(25):  # eight epochs of pairs
        keys += next(loader)["pairs"].keys
        records += [r for r in loader.drain_skipped() if r["source"] == "pairs"]
    for epoch in range(8):
        slots = range(epoch * N, (epoch + 1) * N)
        read = {keys[slot].rpartition("/")[2] for slot in slots}
        assert read == {f"{i:03d}" for i in range(N)} - {"007"}
    assert {(r["key"], r["reason"]) for r in records} == {("007", "undecodable_image")}
    assert len(records) == 8
    assert loader.drain_skipped() == []
    assert loader.wait_s >= 0


def test_threads_compute_on_one_core_and_leave_the_others_alone(loaders, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        seen: set[int] = set()
        real = decode.decode_image
        monkeypatch.setattr(decode, "decode_image", lambda *a: seen.add(torch.get_num_threads()) or real(*a))
        loader = loaders(processes=False)
        next(loader)
        assert seen == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("processes", [True, False])
def test_a_failure_names_the_sample(loaders, monkeypatch: pytest.MonkeyPatch, processes: bool) -> None:
    monkeypatch.setattr(fields, "decode_text", lambda data: 1 / 0)
    loader = loaders(processes=processes)
    with pytest.raises(RuntimeError, match=r"source 'pairs': reading .*s/0000\d\.tar/\d+ of .*ZeroDivisionError"):
        next(loader)
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("processes", [True, False])
def test_what_hangs_is_an_error_that_names_the_sample(loaders, monkeypatch: pytest.MonkeyPatch, processes: bool) -> None:
    real, alive = decode.decode_image, threading.Event()
    monkeypatch.setattr(decode, "decode_image", lambda *a: alive.wait() and real(*a))
    loader = loaders(timeout_s=0.3, processes=processes)
    with pytest.raises(RuntimeError, match=r"no batch in 0\.3 s; it is reading .*s/0000\d\.tar/\d+"):
        next(loader)
    alive.set()
    loader.close()
    assert not any(thread.is_alive() for thread in loader._threads)
    assert not any(worker._process.is_alive() for worker in loader._workers if processes)


def test_waiting_long_is_said(loaders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real, alive = decode.decode_image, threading.Event()
    monkeypatch.setattr("mmpretrain.data.loader.PATIENCE_S", 0.2)
    monkeypatch.setattr(decode, "decode_image", lambda *a: alive.wait() and real(*a))
    threading.Timer(1.0, alive.set).start()
    next(loaders(processes=False))
    assert "no batch for 0 s; the loader is reading" in caplog.text
    assert "s/0000" in caplog.text


def test_a_thread_that_cannot_start_is_told_and_leaves_nothing(loaders, monkeypatch: pytest.MonkeyPatch) -> None:
    real, started = threading.Thread.start, []

    def start(thread: threading.Thread) -> None:
        if thread.name == "loader-2":
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    before = set(multiprocessing.active_children())
    with pytest.raises(RuntimeError, match="can't start new thread"):
        loaders(threads=4)
    for thread in started:
        thread.join(5)
    assert not any(thread.is_alive() for thread in started)
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"prefetch": -1}, {"rank": 5, "world_size": 2}, {"rank": -1, "world_size": 2}])
def test_what_cannot_be_meant_is_refused(loaders, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at least"):
        loaders(**wrong)


def test_batch_size_must_divide_among_ranks(loaders) -> None:
    with pytest.raises(ValueError, match="batch_size 16 does not divide among 3 ranks"):
        loaders(world_size=3)


def test_captions_of_a_batch_are_cut_to_its_longest(loaders) -> None:
    loader = loaders()
    lengths = {next(loader)["pairs"].views[TEXT].data.shape[1] for _ in range(3)}
    assert lengths <= {8, 16}


def test_one_rank_reports_damaged_shards(tmp_path: Path) -> None:
    write_shards([Record(f"{i:03d}", {"jpg": encoded(picture(i)), "txt": b"a"}) for i in range(20)], tmp_path / "s")
    (file,) = (tmp_path / "s").glob("*.tar")
    for index in [*(tmp_path / "s").glob("*.npz"), tmp_path / "s" / "sizes.json"]:
        index.unlink()
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2 + 100])
    reported = []
    for rank in range(2):
        config = SourceConfig(shards=str(file), batch_size=4, max_bad_fraction=1.0)
        loader = Loader({"s": Source("s", config, [TEXT])}, rank=rank, world_size=2, threads=1)
        reported.append([record["reason"] for record in loader.drain_skipped()])
        loader.close()
    assert len(reported[0]) == 1
    assert reported[1] == []
