"""Whole runs of a tiny recipe: kills, signals, resumes, processes, and what refuses to start."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from mmpretrain import config as recipes
from mmpretrain.checkpoint import CheckpointError, checkpoints, find_checkpoint, load_json
from mmpretrain.options import OptionError
from mmpretrain.tracking import read_jsonl
from mmpretrain.trainer import TrainingError, train
from tests import runs
from tests.distributed.test_two_ranks import torchrun

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train(recipes.assemble(runs.recipe(data, run_dir))) == 0
    return run_dir


def start(data, run_dir, **changes):
    return train(recipes.assemble(runs.recipe(data, run_dir, **changes)))


def test_a_run_leaves_what_it_promises(undisturbed):
    names = {p.name for p in undisturbed.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "report.html", "images"} <= names
    lines = read_jsonl(undisturbed / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[4]["samples_seen"] == 5 * 12
    assert {"loss", "clip/loss", "simclr/loss", "simmim/loss", "masked_text/loss", "samples_per_s", "data_wait_s", "lr"} <= set(lines[0])
    assert [p.name for p in checkpoints(undisturbed / "checkpoints")] == ["step-00000012", "step-00000009"]
    folder = find_checkpoint(undisturbed)
    assert {p.name for p in folder.iterdir()} >= {
        "model.safetensors",
        "objectives.safetensors",
        "teacher.safetensors",
        "optimizer.pt",
        "state.json",
    }
    assert load_json(folder, "state")["positions"] == {"pairs": 96, "photos": 48}
    stored = recipes.yaml.safe_load((undisturbed / "config.yaml").read_text())
    assert stored["environment"]["processes"] == 1
    assert stored["precision"] == "fp32"


def test_a_finished_run_is_left_alone(undisturbed, data, capfd):
    before = runs.weights(undisturbed)
    assert start(data, undisturbed) == 0
    assert all((runs.weights(undisturbed)[k] == v).all() for k, v in before.items())
    assert "resuming from" in capfd.readouterr().out


@pytest.mark.parametrize("stop", [3, 7])
def test_resume_at_any_step_is_bit_identical(data, undisturbed, tmp_path, stop, monkeypatch):
    """The run is broken off by an exception in the step after `stop`, checkpointed or not, and started again."""
    from mmpretrain import trainer

    real = trainer.set_learning_rate

    def breaks(optimizer, config, step, steps):
        if step == stop:
            raise KeyboardInterrupt
        return real(optimizer, config, step, steps)

    monkeypatch.setattr(trainer, "set_learning_rate", breaks)
    with pytest.raises(KeyboardInterrupt):
        start(data, tmp_path / "run")
    monkeypatch.setattr(trainer, "set_learning_rate", real)
    assert start(data, tmp_path / "run") == 0
    runs.assert_same_run(tmp_path / "run", undisturbed)


def test_other_threads_and_chunks_see_the_same_batches(data, undisturbed, tmp_path):
    """Losses agree to rounding when the step is split and loaded otherwise."""
    assert start(data, tmp_path / "run", accumulate=2, loader_threads=4, prefetch=1) == 0
    a, b = read_jsonl(undisturbed / "metrics.jsonl"), read_jsonl(tmp_path / "run" / "metrics.jsonl")
    for x, y in zip(a, b):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-4)
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-2)


def test_kill_nine_at_random_moments_five_times(data, undisturbed, tmp_path):
    """SIGKILL after random delays, then to the end: weights, moments and log equal those of the undisturbed run."""
    code = textwrap.dedent(f"""
        import os, random, signal, sys, time, json
        from mmpretrain import config as recipes
        from mmpretrain.trainer import train
        from tests import runs
        from pathlib import Path
        recipe = runs.recipe(Path({str(data)!r}), Path({str(tmp_path / "run")!r}), steps=12)
        recipe["checkpoint"]["every"] = 1
        random.seed(5)
        def child():
            pid = os.fork()
            if pid == 0:
                try:
                    os._exit(train(recipes.assemble(recipe)))
                finally:
                    os._exit(99)
            return pid
        started = time.time()
        kills = 0
        metrics = Path(recipe["run_dir"]) / "metrics.jsonl"
        for goal in sorted(random.sample(range(1, 11), 5)):
            pid = child()
            while not metrics.exists() or sum(1 for _ in metrics.open()) < goal:
                time.sleep(0.002)
            time.sleep(random.random() * 0.15)  # somewhere in the step, its save or the next
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            kills += os.WIFSIGNALED(status)
        status = os.waitpid(child(), 0)[1]
        print(json.dumps({{"kills": kills, "exit": os.waitstatus_to_exitcode(status)}}))
    """)
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-3000:]
    assert json.loads(out.stdout.strip().splitlines()[-1]) == {"kills": 5, "exit": 0}
    runs.assert_same_run(tmp_path / "run", undisturbed)


@pytest.fixture
def long_run(data, tmp_path):
    """A run in a subprocess that would take minutes; yields once it has made a few steps."""
    path = runs.write_recipe(
        tmp_path / "recipe.yaml", runs.recipe(data, tmp_path / "run", steps=100000, checkpoint={"every": 100000, "keep": 2})
    )
    process = subprocess.Popen(
        [sys.executable, "train.py", str(path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.time() + 90
    while len(read_jsonl(tmp_path / "run" / "metrics.jsonl", strict=False)) < 3:
        assert process.poll() is None, process.stdout.read()
        assert time.time() < deadline
        time.sleep(0.05)
    yield process, tmp_path / "run"
    process.kill()
    process.wait()


def test_sigterm_saves_and_exits_zero(long_run):
    process, run_dir = long_run
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0, out
    assert "stopped by SIGTERM" in out
    step = load_json(find_checkpoint(run_dir), "state")["step"]
    assert read_jsonl(run_dir / "metrics.jsonl")[-1]["step"] == step


def test_a_worker_whose_launcher_dies_stops_too(data, tmp_path):
    path = runs.write_recipe(
        tmp_path / "recipe.yaml", runs.recipe(data, tmp_path / "run", steps=100000, checkpoint={"every": 100000, "keep": 2})
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; p = subprocess.Popen([sys.executable, 'train.py', {str(path)!r}]); print(p.pid, flush=True); p.wait()"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"ACCELERATE_MIXED_PRECISION": "no"},
    )  # fmt: skip
    worker = int(launcher.stdout.readline())
    deadline = time.time() + 90
    while len(read_jsonl(tmp_path / "run" / "metrics.jsonl", strict=False)) < 2 and time.time() < deadline:
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    while Path(f"/proc/{worker}").exists() and time.time() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()
    assert find_checkpoint(tmp_path / "run")


def test_a_run_of_one_process_goes_on_with_two(data, undisturbed, tmp_path, monkeypatch):
    """Begun alone, ended by two under torchrun: the same global batches, losses equal to rounding; no sample lost or repeated."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = runs.recipe(data, tmp_path / "run")
    recipe["objectives"]["simclr"]["norm"] = "batch"
    first = recipe | {"steps": 12}
    from mmpretrain import trainer

    real = trainer.set_learning_rate

    def breaks(optimizer, config, step, steps):
        if step == 6:
            raise KeyboardInterrupt
        return real(optimizer, config, step, steps)

    monkeypatch.setattr(trainer, "set_learning_rate", breaks)
    with pytest.raises(KeyboardInterrupt):
        train(recipes.assemble(first))
    path = runs.write_recipe(tmp_path / "recipe.yaml", recipe)
    out = torchrun("train.py", str(path))
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-3000:]
    a, b = read_jsonl(undisturbed / "metrics.jsonl"), read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [x["step"] for x in b] == list(range(1, 13))
    for x, y in zip(a, b):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-4)
    assert load_json(find_checkpoint(tmp_path / "run"), "state")["positions"] == {"pairs": 96, "photos": 48}


def test_nan_is_skipped_then_aborts_naming_the_batch(data, tmp_path, monkeypatch):
    from mmpretrain.objectives.clip import CLIP

    real = CLIP.forward
    calls = []

    def poisoned(self, image, text):
        calls.append(1)
        out = real(self, image, text)
        return out | {"loss": out["loss"] * float("nan")} if len(calls) > 4 else out

    monkeypatch.setattr(CLIP, "forward", poisoned)
    with pytest.raises(TrainingError, match=r"3 updates in a row.*pairs.*p\d{4}"):
        start(data, tmp_path / "run", max_skipped_steps=2)
    found = find_checkpoint(tmp_path / "run")
    assert load_json(found, "state")["step"] == 3
    assert all(torch.from_numpy(v).isfinite().all() for v in runs.weights(tmp_path / "run").values())


def test_one_nan_is_survived(data, tmp_path, monkeypatch, capfd):
    from mmpretrain.objectives.clip import CLIP

    real = CLIP.forward
    calls = []

    def poisoned(self, image, text):
        calls.append(1)
        out = real(self, image, text)
        return out | {"loss": out["loss"] * float("inf")} if len(calls) == 5 else out

    monkeypatch.setattr(CLIP, "forward", poisoned)
    assert start(data, tmp_path / "run") == 0
    assert "not finite" in capfd.readouterr().out
    assert all(torch.from_numpy(v).isfinite().all() for v in runs.weights(tmp_path / "run").values())


def test_another_recipe_is_refused_with_the_differences(data, undisturbed):
    with pytest.raises(OptionError, match=r"seed: 3 in the run, 4 in the recipe") as caught:
        start(data, undisturbed, seed=4, optim={"lr": 2e-3, "warmup_steps": 2})
    assert "optim.lr: 0.001 in the run, 0.002 in the recipe" in str(caught.value)
    assert "resume=force" in str(caught.value)
    with pytest.raises(OptionError, match="resume is never"):
        start(data, undisturbed, resume="never")


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(data, tmp_path):
    start(data, tmp_path / "run", steps=3, checkpoint={"every": 3, "keep": 1})
    (find_checkpoint(tmp_path / "run") / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not match its sha256"):
        start(data, tmp_path / "run", steps=3, checkpoint={"every": 3, "keep": 1})


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(data, undisturbed, tmp_path, capfd):
    start(data, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000012" / "optimizer.pt").write_bytes(b"x")
    capfd.readouterr()
    assert start(data, tmp_path / "run") == 0
    out = capfd.readouterr().out
    assert "skipping checkpoint" in out
    assert "step-00000009" in out
    runs.assert_same_run(tmp_path / "run", undisturbed)


def test_two_runs_in_one_folder_are_refused(data, tmp_path):
    from mmpretrain import run

    with run.lock(recipes.assemble(runs.recipe(data, tmp_path / "run"))), pytest.raises(OptionError, match="another process is training"):
        start(data, tmp_path / "run")


def test_batch_size_must_divide(data, tmp_path):
    with pytest.raises(OptionError, match=r"photos\.batch_size is 4.*accumulate 8 = 8"):
        start(data, tmp_path / "run", accumulate=8)


def test_image_only_run_has_no_text_tower(data, tmp_path, capfd):
    recipe = runs.recipe(data, tmp_path / "run", steps=2, teacher=None, objectives={"simclr": {"source": "photos"}})
    del recipe["sources"]["pairs"]
    assert train(recipes.assemble(recipe)) == 0
    from safetensors.torch import load_file

    names = load_file(find_checkpoint(tmp_path / "run") / "model.safetensors")
    assert not any(name.startswith("text.") for name in names)
    assert "towers.visual.proj" in capfd.readouterr().out


def test_init_from_takes_weights_but_not_the_step(data, undisturbed, tmp_path):
    assert start(data, tmp_path / "run", steps=1, init_from=str(undisturbed), optim={"lr": 0.0}) == 0
    old, new = runs.weights(undisturbed), runs.weights(tmp_path / "run")
    assert all((new[k] == old[k]).all() for k in new if k.startswith("model."))


def test_evaluators_run_on_schedule_and_are_not_repeated(data, tmp_path):
    evaluators = {"knn_pairs": {"kind": "zero_shot", "data": str(data / "pairs"), "every": 6}}
    for _ in range(2):
        assert start(data, tmp_path / "run", evaluators=evaluators) == 0
    lines = read_jsonl(tmp_path / "run" / "results.jsonl")
    assert [line["step"] for line in lines] == [6, 12]
    assert set(lines[0]) == {"step", "evaluator", "name", "dataset", "model", "n", "seed", "metrics"}
    assert lines[0]["n"] == 40


def test_command_line(data, tmp_path):
    path = runs.write_recipe(tmp_path / "recipe.yaml", runs.recipe(data, tmp_path / "run"))

    def cli(*arguments):
        return subprocess.run([sys.executable, "train.py", str(path), *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    bad = cli("optim.lrr=1")
    assert bad.returncode == 2
    assert "unknown option 'optim.lrr'; did you mean 'lr'" in bad.stderr
    shown = cli("optim.lr=5e-4", "--print-config")
    assert shown.returncode == 0
    assert "lr: 0.0005" in shown.stdout
    assert not (tmp_path / "run").exists()
