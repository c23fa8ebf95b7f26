"""What only another process shows: the script's output and exit status, and two processes against one."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmpretrain import checkpoint
from mmpretrain.errors import HangError
from tests.evaluators.fake import COLOURS, colour_folder, picture, write
from tests.evaluators.two_processes import results
from tests.tiny import MODEL, towers

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def call(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


@pytest.fixture
def evaluate(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("evaluate")


def test_two_processes_find_what_one_finds(tmp_path):
    """Seven test images, one of them bad, over two processes: unequal parts, none lost, none twice."""
    colour_folder(tmp_path / "train", list(COLOURS), 2)
    colour_folder(tmp_path / "test", list(COLOURS), 1)
    write(tmp_path / "test" / "red" / "9.png", picture("blue"))
    write(tmp_path / "test" / "red" / "bad.png", b"GIF89a")
    rows = [f"test/{name}/0.png,the {name}" for name in COLOURS] + ["test/red/0.png,crimson red", "test/blue/0.png,a cyan sky"]
    table = write(tmp_path / "pairs.csv", "\n".join(["file,caption", *rows]).encode())
    alone = results(str(tmp_path), str(table))
    together = call(sys.executable, str(ROOT / "tests/evaluators/two_processes.py"), str(tmp_path), str(table))
    assert together.returncode == 0, together.stderr[-2000:]
    found = json.loads(together.stdout.strip().splitlines()[-1])
    assert (alone["processes"], found["processes"]) == (1, 2)
    assert alone["n"] == found["n"] == [7, 6, 7, 7]
    assert alone["skipped"] == found["skipped"] == ["red/bad.png"]
    assert found["metrics"] == alone["metrics"]
    assert alone["metrics"][0]["acc1"] == pytest.approx(6 / 7)
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-4)


def trained(tmp_path) -> tuple[Path, Path]:
    """A run folder with one checkpoint, and data."""
    documents = {"open_clip_config": {"model_cfg": MODEL, "preprocess_cfg": {}}, "state": {"step": 7, "positions": {}, "skipped_steps": 0}}
    tensors = {"model": towers().state_dict() | {"logit_scale": torch.tensor(1.0)}}
    checkpoint.save(tmp_path / "run" / "checkpoints", 7, tensors, {}, documents, keep=1)
    return tmp_path / "run", colour_folder(tmp_path / "data", ["red", "green"], 2)


OPTIONS = ["--json", "--seed", "3", "templates=a {c} thing", "batch_size=2"]


def test_the_script_evaluates_a_run(tmp_path, evaluate, monkeypatch, capsys):
    run, data = trained(tmp_path)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(run), "zero_shot", f"data={data}", "--device", "cpu", *OPTIONS])
    assert evaluate.main() == 0
    line = json.loads(capsys.readouterr().out)  # nothing but the line
    assert list(line) == ["step", "evaluator", "name", "dataset", "model", "n", "seed", "metrics"]
    assert (line["step"], line["evaluator"], line["name"], line["dataset"]) == (None, "zero_shot", "zero_shot", str(data))
    assert (line["n"], line["seed"], len(line["model"])) == (4, 3, 64)
    assert 0 <= line["metrics"]["acc1"] <= 1
    assert [json.loads(text) for text in (run / "results.jsonl").read_text().splitlines()] == [line]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(run), "zero_shot", f"data={data}", "--weights", "teacher"])
    assert evaluate.main() == 2
    assert "this run kept no teacher" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_under_torchrun(tmp_path):
    run, data = trained(tmp_path)
    script = [str(ROOT / "scripts/evaluate.py"), str(run), "zero_shot", f"data={data}", *OPTIONS]
    alone = call(sys.executable, *script)
    together = call(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *script)
    assert (alone.returncode, together.returncode) == (0, 0), alone.stderr[-2000:] + together.stderr[-2000:]
    assert json.loads(alone.stdout) == json.loads(together.stdout)


def test_what_hangs_does_not_keep_the_script(evaluate, monkeypatch, capsys):
    """An ordinary exit would wait for the thread that hangs."""

    def hang(arguments):
        raise HangError("no batch of images in 300 s")

    ends = []
    monkeypatch.setattr(evaluate, "evaluate", hang)
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "run", "zero_shot"])
    evaluate.main()
    assert ends == [1]
    assert "error: no batch of images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere", "zero_shot", "data=x"], 2, "no such folder or file"),
        (["nowhere", "zeroshot", "data=x"], 2, "did you mean 'zero_shot'"),
        (["nowhere", "zero_shot", "data=x", "batchsize=2"], 2, "did you mean 'batch_size'"),
        (["nowhere", "zero_shot", "data=x", "seed=1", "--seed", "2"], 2, "leave one out"),
        (["nowhere"], 2, "are required"),
        (["--help"], 0, "templates="),
    ],
)
def test_exit_status_and_messages(arguments, status, message, evaluate, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    try:
        found = evaluate.main()
    except SystemExit as stop:
        found = stop.code
    assert found == status
    captured = capsys.readouterr()
    assert message in captured.out + captured.err
