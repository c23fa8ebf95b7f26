"""Demo shards written beside a training run: awaited where they are read; no failure, stop or death of a process goes unnoticed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep.demo import background
from data_prep.demo.background import EVALUATION, TRAINING, DemoData, DemoError, Writing, lock_path
from data_prep.demo.command import unwritten
from mmpretrain.config.recipe import assemble
from mmpretrain.evaluation import DataInProgress
from mmpretrain.system import hold
from mmpretrain.tracking.jsonl import read_jsonl
from mmpretrain.trainer import train
from tests import runs


def test_what_is_missing_is_written_by_another_process_and_then_kept(tmp_path: Path):
    root = tmp_path / "demo"
    writing = Writing(root, ["val"])
    assert writing._process is not None
    writing.wait()
    assert unwritten(root, splits=["val"]) == []
    again = Writing(root, ["val"])
    assert again._process is None
    again.wait()


def test_a_killed_writer_is_an_error_that_names_it(tmp_path: Path):
    writing = Writing(tmp_path / "demo", ["val", "test"])
    writing._process.kill()
    with pytest.raises(
        DemoError, match=r"demo splits val, test failed \(exit status -9\).*python -m data_prep demo .* --split val --split test"
    ):
        writing.wait()


def test_a_writer_that_fails_is_an_error(tmp_path: Path):
    (tmp_path / "demo").write_text("no folder")
    writing = Writing(tmp_path / "demo", ["val"])
    with pytest.raises(DemoError, match="exit status 1"):
        writing.wait()


def test_a_folder_of_somebody_else_is_refused_when_it_is_needed(tmp_path: Path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "mine.txt").write_text("precious")
    writing = Writing(tmp_path, ["pairs"])
    with pytest.raises(DemoError, match="did not write it"):
        writing.wait()


def _begun(root: Path) -> None:
    while not list(root.glob(".pairs.tmp-*")):
        time.sleep(0.02)


def test_stopping_leaves_nothing_half_written(tmp_path: Path):
    writing = Writing(tmp_path / "demo", ["pairs"], quiet=True)
    _begun(tmp_path / "demo")
    writing.stop()
    assert not list((tmp_path / "demo").iterdir())


def test_the_writer_ends_when_the_training_process_does(tmp_path: Path):
    root = tmp_path / "demo"
    code = f"import os\nfrom data_prep.demo.background import Writing\nWriting({str(root)!r}, ['pairs'], quiet=True)\ninput()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    _begun(root)
    parent.kill()
    parent.communicate()
    with hold(lock_path(root)):  # the writer holds it until it ends
        assert not list(root.iterdir())


class _Fake:
    """A Writing that notes what is done with it."""

    events: list[str]

    def __init__(self, root: Path, splits: tuple[str, ...], quiet: bool = False) -> None:
        self.name = "later" if quiet else "first"
        assert tuple(splits) == (EVALUATION if quiet else TRAINING)
        self.events.append(f"start {self.name}")

    def wait(self) -> None:
        self.events.append(f"wait {self.name}")

    def stop(self) -> None:
        self.events.append(f"stop {self.name}")


@pytest.mark.parametrize(("shards", "waits"), [("data/demo/pairs/*.tar", []), (["data/demo/val/*.tar"], ["wait later"])])
def test_training_waits_for_what_it_trains_on(monkeypatch: pytest.MonkeyPatch, shards, waits: list[str]):
    _Fake.events = []
    monkeypatch.setattr(background, "Writing", _Fake)
    data = DemoData("data/demo")
    config = SimpleNamespace(
        sources={"pairs": SimpleNamespace(shards=shards)},
        evaluators={"test": SimpleNamespace(options=SimpleNamespace(data="data/demo/test"))},
    )
    in_progress = data.prepare(config)  # type: ignore[arg-type]
    assert _Fake.events == ["start first", "wait first", "start later", *waits]
    assert {path.name for path in in_progress.pending} == set(EVALUATION)
    data.stop()
    assert _Fake.events[-2:] == ["stop first", "stop later"]


def test_an_evaluator_waits_for_its_data_and_shows_baselines_beside_its_result(tmp_path: Path):
    shards = runs.shards(tmp_path / "shards")
    late, neighbours = tmp_path / "late", tmp_path / "neighbours"
    shutil.copytree(shards / "pairs", tmp_path / "copy")
    written = DataInProgress({late: lambda: (shards / "pairs").rename(late), neighbours: lambda: (tmp_path / "copy").rename(neighbours)})
    own = runs.shards(tmp_path / "own")
    options = {"kind": "zero_shot", "data": str(late), "train": str(neighbours), "baselines": ["colour_histogram"]}
    evaluators = {"late": {**options, "reference": {"ceiling": 0.9}}}
    config = assemble(runs.recipe(own, tmp_path / "run", steps=1, evaluators=evaluators))
    assert train(config, written) == 0
    (line,) = read_jsonl(tmp_path / "run" / "results.jsonl")
    assert line["baselines"] == {"ceiling": 0.9, "colour_histogram_knn": 1.0}
    assert line["n"] == 40


def test_a_failure_to_write_reaches_the_run(tmp_path: Path):
    def fail() -> None:
        raise DemoError("it failed")

    written = DataInProgress({tmp_path / "late": fail})
    own = runs.shards(tmp_path / "own")
    evaluators = {"late": {"kind": "zero_shot", "data": str(tmp_path / "late" / "*.tar")}}
    with pytest.raises(DemoError, match="it failed"):
        train(assemble(runs.recipe(own, tmp_path / "run", steps=1, evaluators=evaluators)), written)


def test_the_writer_starts_without_the_libraries_that_compute():
    code = f"import sys\nimport {background.__name__}\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
