"""Loader processes: nothing is overwritten while it is held, nothing lives on, and what goes wrong is told."""

import gc
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch

from data_prep.records import Record
from data_prep.shards.serial import write_shards
from mmpretrain.data import buffers, decode
from mmpretrain.data.loader import Loader
from mmpretrain.data.loader_worker import ProcessWorker, ThreadWorker, start_workers
from mmpretrain.data.schema import BadSampleBudgetError, ShardError
from mmpretrain.data.source import Source, SourceConfig
from mmpretrain.data.views import ImageView
from mmpretrain.types import View, ViewSpec
from tests.data.generated import encoded, picture

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="loader processes need Linux")
IMAGE = ImageView(size=64, flip=0.5)  # 32 rows are 1.5 MB: memory that both sides map
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "s"
    write_shards([Record(f"{i:03d}", {"jpg": encoded(picture(i)), "txt": b"a"}) for i in range(40)], out, max_count=20)
    return out


@pytest.fixture
def loaders(folder: Path) -> Iterator[Any]:
    made: list[Loader] = []

    def make(views: Sequence[ViewSpec] = (IMAGE,), path: Path = folder, config: Any = None, **options: Any) -> Loader:
        source = Source("s", SourceConfig(shards=str(path), batch_size=32, **(config or {})), views)
        made.append(Loader({"s": source}, **{"threads": 2, "processes": True, "timeout_s": 60.0} | options))
        return made[-1]

    yield make
    for loader in made:
        loader.close()


def memory_files(pid: int | str = "self") -> int:
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:loader")


def test_a_batch_that_is_held_is_not_overwritten_and_memory_is_used_again(loaders) -> None:
    loader = loaders(prefetch=2)
    held = next(loader)["s"].views[IMAGE].data
    copy, view = held.clone(), held[3:5].flip(-1)
    for _ in range(6):
        next(loader)
    mapped = memory_files()
    assert 0 < mapped < 20
    for _ in range(30):
        next(loader)
    assert torch.equal(held, copy)
    del held
    for _ in range(10):
        next(loader)
    assert torch.equal(view, copy[3:5].flip(-1))
    assert memory_files() <= mapped + 2


def test_a_batch_outlives_its_loader(loaders) -> None:
    loader = loaders()
    held = next(loader)["s"].views[IMAGE].data
    copy = held.clone()
    next(loader)
    loader.close()
    del loader
    gc.collect()
    assert torch.equal(held, copy)


def test_memory_costs_no_file_descriptors(loaders) -> None:
    loader = loaders([ImageView(size=64, index=i) for i in range(4)])
    next(loader)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(12):
        next(loader)
    assert memory_files() >= 8
    assert len(os.listdir("/proc/self/fd")) <= before


def test_an_exception_comes_with_the_place_it_was_raised_at(loaders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "decode_image", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError") as caught:
        next(loaders())
    assert "in a loader process" in caught.value.__notes__[0]
    assert "decode_image" in caught.value.__notes__[0]


def test_an_exception_that_cannot_be_sent_is_told_in_words(loaders, monkeypatch: pytest.MonkeyPatch) -> None:
    class OddError(ShardError):  # local: cannot be pickled
        pass

    def fail(*_: object) -> None:
        raise OddError("the disk is wet")

    monkeypatch.setattr(decode, "decode_image", fail)
    with pytest.raises(RuntimeError, match="OddError: the disk is wet"):
        next(loaders())


def test_a_process_that_ends_is_an_error_that_names_the_sample(loaders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "decode_image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match=r"ended with status -9 while reading s/0000\d\.tar/\d+"):
        next(loaders())


def test_all_processes_share_one_budget(loaders, tmp_path: Path) -> None:
    records = [Record(f"{i:03d}", {"jpg": encoded(picture(i)) if i % 2 else b"\xff\xd8\xffno", "txt": b"a"}) for i in range(200)]
    write_shards(records, tmp_path / "s")
    loader = loaders(path=tmp_path / "s", config={"max_bad_fraction": 0.4})
    with pytest.raises(BadSampleBudgetError, match=r"samples read are bad, more than max_bad_fraction: 0\.4.*undecodable_image"):
        list(itertools.islice(loader, 20))
    every = loaders(path=tmp_path / "s", config={"max_bad_fraction": 1.0})
    skipped = 0
    for _ in range(10):
        next(every)
        skipped += len(every.drain_skipped())
    tally = every.sources["s"]._tally
    assert tally.bad >= skipped > 0  # whichever process met them; a few batches are ahead
    assert tally.read >= 10 * 32 + skipped


def test_signals_are_the_trainers_to_answer(loaders) -> None:
    loader = loaders()
    next(loader)
    for worker in loader._workers:
        os.kill(worker._process.pid, signal.SIGTERM)
        os.kill(worker._process.pid, signal.SIGINT)
    for _ in range(8):
        next(loader)


def test_closing_ends_the_processes(loaders) -> None:
    loader = loaders()
    next(loader)
    loader.close()
    assert [worker._process.exitcode for worker in loader._workers] == [0, 0]


def test_processes_end_with_their_parent(folder: Path) -> None:
    code = f"""
import os, time
from mmpretrain.data.loader import Loader
from mmpretrain.data.source import Source, SourceConfig
from mmpretrain.data.views import ImageView
loader = Loader({{"s": Source("s", SourceConfig(shards={str(folder)!r}, batch_size=32), [ImageView(size=64)])}}, threads=2, processes=True)
next(loader)
print(*(worker._process.pid for worker in loader._workers), flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    _killed_parent_leaves_none(parent, 2)


def test_a_process_that_is_sending_ends_with_its_parent(folder: Path) -> None:
    code = f"""
import time
from mmpretrain.data.source import Source, SourceConfig
from mmpretrain.data.views import TextView
from mmpretrain.data.loader_worker import start_workers
views = [TextView(context_length=900 + i) for i in range(8)]  # each too small for shared memory, together more than a pipe holds
workers = start_workers(2, True, {{"s": Source("s", SourceConfig(shards={str(folder)!r}, batch_size=32), views)}}, render=True)
for worker in workers:
    worker._connection.send(("s", range(32), []))
for worker in workers:
    worker._connection.poll(60)  # it has begun to send
print(*(worker._process.pid for worker in workers), flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    _killed_parent_leaves_none(parent, 2)


def test_a_forked_process_that_exits_leaves_its_parents_loader_alone(folder: Path) -> None:
    code = f"""
import os, sys
from mmpretrain.data.loader import Loader
from mmpretrain.data.source import Source, SourceConfig
from mmpretrain.data.views import ImageView
loader = Loader({{"s": Source("s", SourceConfig(shards={str(folder)!r}, batch_size=32), [ImageView(size=64)])}}, threads=2, processes=True)
next(loader)
if os.fork() == 0:
    sys.exit(0)
os.wait()
for _ in range(10):
    next(loader)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.stdout.strip() == "done", done.stderr


def _killed_parent_leaves_none(parent: subprocess.Popen, count: int) -> None:
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == count
    assert all(map(_alive, children))
    parent.kill()
    parent.wait()
    end = time.monotonic() + 60
    while any(map(_alive, children)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(_alive, children))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_memory_that_several_blocks_lend_stays_until_all_let_go(loaders) -> None:
    @dataclass(frozen=True)
    class Constant(ViewSpec):
        """The same memory in every block, as a spec that remembers what it made would give."""

        modality: ClassVar[Literal["image", "text"]] = "image"
        made: ClassVar[dict[int, torch.Tensor]] = {}

        def draw(self, samples, seeds):
            return {}

        def geometry(self, source, params):
            return source[:, :8, :8]

        def render(self, pixels, params):
            if len(pixels) not in self.made:
                self.made[len(pixels)] = buffers.empty((len(pixels), 3, 64, 64)).fill_(7.0)
            return View(self.made[len(pixels)])

    spec = Constant()
    loader = loaders([spec, IMAGE])
    held = []
    for step in range(12):
        held.append(next(loader)["s"].views[spec].data)
        if step % 3 == 2:
            held.clear()
        assert all((data == 7).all() for data in held)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_of_the_users_ends_without_closing_its_loader(folder: Path, method: str) -> None:
    code = f"""
import multiprocessing
from mmpretrain.data.loader import Loader
from mmpretrain.data.source import Source, SourceConfig
from mmpretrain.data.views import ImageView

def work():
    global loader
    source = Source("s", SourceConfig(shards={str(folder)!r}, batch_size=32), [ImageView(size=64)])
    loader = Loader({{"s": source}}, threads=2, processes=True)
    next(loader)

if __name__ == "__main__":
    process = multiprocessing.get_context({method!r}).Process(target=work)
    process.start()
    process.join(40)
    print(process.exitcode, flush=True)
    process.kill()
"""
    script = folder.parent / f"{method}.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.stdout.strip() == "0", done.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_specs_own_memory_and_a_spec_that_cannot_be_pickled(loaders, dtype: torch.dtype) -> None:
    @dataclass(frozen=True)
    class Inverted(ViewSpec):
        modality: ClassVar[Literal["image", "text"]] = "image"

        def draw(self, samples, seeds):
            return {}

        def geometry(self, source, params):
            return source[:, :16, :16].repeat(1, 4, 4)

        def render(self, pixels, params):
            return View(255.0 - pixels.to(dtype), torch.arange(len(pixels)).to(dtype))

    spec = Inverted()
    forked, threaded = loaders([spec]), loaders([spec], processes=False)
    for _ in range(6):
        found, wanted = next(forked)["s"], next(threaded)["s"]
        assert found.keys == wanted.keys
        assert torch.equal(found.views[spec].data, wanted.views[spec].data)
        assert torch.equal(found.views[spec].target, wanted.views[spec].target)


def test_which_workers_start(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {"s": Source("s", SourceConfig(shards=str(folder), batch_size=8), [IMAGE])}

    def kinds(processes: bool | None) -> set[type]:
        workers = start_workers(1, processes, sources, render=True)
        for worker in workers:
            worker.close(5.0)
        return set(map(type, workers))

    assert kinds(None) == kinds(True) == {ProcessWorker}
    assert kinds(False) == {ThreadWorker}
    monkeypatch.delattr(os, "memfd_create")
    assert kinds(None) == {ThreadWorker}
    with pytest.raises(ValueError, match="loader processes need Linux"):
        kinds(True)
