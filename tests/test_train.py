"""Whole runs of a tiny recipe: kills, signals, resumes, processes, and what refuses to start."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml

from data_prep.records import Record
from data_prep.shards.serial import write_shards
from mmpretrain.checkpoint import CheckpointError, checkpoints, find_checkpoint, load_json, load_tensors
from mmpretrain.config import recipe as recipes
from mmpretrain.config.build import OptionError
from mmpretrain.data.schema import BadSampleBudgetError
from mmpretrain.model import PretrainModel
from mmpretrain.tracking.jsonl import read_jsonl
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
    lines = runs.logged(undisturbed)
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


def test_losses_are_those_of_the_golden_file(undisturbed):
    """A refactor must not move a loss: 12 steps of all objectives, in fp32, to what differs between machines."""
    golden = read_jsonl(Path(__file__).parent / "golden" / "tiny.jsonl")
    lines = runs.logged(undisturbed)
    assert len(golden) == len(lines) == 12
    for expected, found in zip(golden, lines):
        assert {k: found[k] for k in expected} == pytest.approx(expected, rel=2e-3)


def test_a_finished_run_is_left_alone(undisturbed, data, capfd):
    before = runs.weights(undisturbed)
    assert start(data, undisturbed) == 0
    assert all((runs.weights(undisturbed)[k] == v).all() for k, v in before.items())
    assert "resuming from" in capfd.readouterr().out


@pytest.mark.parametrize("stop", [3, 7])
def test_resume_at_any_step_is_bit_identical(data, undisturbed, tmp_path, stop):
    """The run is broken off by an exception in the step after `stop`, checkpointed or not, and started again."""

    with runs.broken_off(stop):
        start(data, tmp_path / "run")
    assert start(data, tmp_path / "run") == 0
    runs.assert_same_run(tmp_path / "run", undisturbed)


def test_other_threads_and_chunks_see_the_same_batches(data, undisturbed, tmp_path):
    """Losses agree to rounding when the step is split and loaded otherwise."""
    assert start(data, tmp_path / "run", accumulate=2, loader_threads=4, prefetch=1) == 0
    a, b = runs.logged(undisturbed), runs.logged(tmp_path / "run")
    for x, y in zip(a, b):
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-4)
        assert y["grad_norm"] == pytest.approx(x["grad_norm"], rel=1e-2)


def test_kill_nine_at_random_moments_five_times(data, undisturbed, tmp_path):
    """SIGKILL after random delays, then to the end: weights, moments and log equal those of the undisturbed run."""
    code = textwrap.dedent(f"""
        import os, random, signal, sys, time, json
        from mmpretrain.config import recipe as recipes
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
    assert "because SIGTERM was received" in out
    step = load_json(find_checkpoint(run_dir), "state")["step"]
    assert read_jsonl(run_dir / "metrics.jsonl")[-1]["step"] == step


def test_a_worker_whose_launcher_dies_stops_too(data, tmp_path):
    path = runs.write_recipe(
        tmp_path / "recipe.yaml", runs.recipe(data, tmp_path / "run", steps=100000, checkpoint={"every": 100000, "keep": 2})
    )
    code = f"""
import subprocess, sys
worker = subprocess.Popen([sys.executable, 'train.py', {str(path)!r}])
print(worker.pid, flush=True)
worker.wait()
"""
    environment = os.environ | {"ACCELERATE_MIXED_PRECISION": "no"}  # as `accelerate launch` sets it
    launcher = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
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
    a, b = runs.logged(undisturbed), runs.logged(tmp_path / "run")
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


def test_weights_that_a_step_has_spoilt_are_not_saved(data, tmp_path):
    """The gradient is finite, the step is not."""
    recipe = runs.recipe(data, tmp_path / "run", steps=2, optim={"lr": 1e38})
    with pytest.raises(TrainingError, match=r"parameters are not finite .*Lower optim.lr"):
        train(recipes.assemble(recipe))
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_run_without_one_update_fails(data, tmp_path, monkeypatch):
    forward = PretrainModel.forward
    monkeypatch.setattr(PretrainModel, "forward", lambda *a: tuple(x * float("nan") if i == 0 else x for i, x in enumerate(forward(*a))))
    with pytest.raises(TrainingError, match="none of the 2 updates was made"):
        train(recipes.assemble(runs.recipe(data, tmp_path / "run", steps=2)))


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


def test_a_run_opens_with_the_warnings_about_its_mixture(data, tmp_path, capfd):
    assert start(data, tmp_path / "run", steps=2, optim={"lr": 1e-3, "warmup_steps": 2}) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "warning: source 'pairs': 0.40 epochs: 60% of its samples are never seen." in out
    assert "warning: optim.warmup_steps is 2 of only 2 steps" in out
    assert start(data, tmp_path / "run", steps=2, optim={"lr": 1e-3, "warmup_steps": 2}) == 0
    assert "warning:" not in capfd.readouterr().out  # said once, when it begins


def test_another_recipe_is_refused_with_the_differences(data, undisturbed):
    with pytest.raises(OptionError, match=r"seed: 3 in the run, 4 in the recipe") as caught:
        start(data, undisturbed, seed=4, optim={"lr": 2e-3, "warmup_steps": 2})
    assert "optim.lr: 0.001 in the run, 0.002 in the recipe" in str(caught.value)
    assert "resume=force" in str(caught.value)
    with pytest.raises(OptionError, match="resume is never"):
        start(data, undisturbed, resume="never")


def test_a_run_begun_before_an_option_existed_is_resumed(data, tmp_path):
    evaluators = {"pairs": {"kind": "zero_shot", "data": str(data / "pairs"), "split": {"holdout": 0.5, "part": "train"}}}
    options = {"checkpoint": {"every": 3, "keep": 2}, "evaluators": evaluators}
    assert start(data, tmp_path / "run", steps=3, **options) == 0
    stored = tmp_path / "run" / "config.yaml"
    recipe = yaml.safe_load(stored.read_text())
    del recipe["networks"], recipe["max_skipped_steps"], recipe["objectives"]["clip"]["start"], recipe["optim"]["betas"]
    earlier = {"split": None} | recipe["evaluators"]["pairs"].pop("split")  # the earlier spelling
    recipe["evaluators"]["pairs"] |= earlier
    stored.write_text(yaml.safe_dump(recipe))
    assert start(data, tmp_path / "run", steps=3, **options) == 0
    recipe["optim"]["lr"] = 0.5
    stored.write_text(yaml.safe_dump(recipe))
    with pytest.raises(OptionError, match=r"optim\.lr: 0\.5 in the run"):
        start(data, tmp_path / "run", steps=3, **options)


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
    from mmpretrain import run_folder

    with (
        run_folder.lock(recipes.assemble(runs.recipe(data, tmp_path / "run"))),
        pytest.raises(OptionError, match="another process is training"),
    ):
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
    evaluators = {"knn_pairs": {"kind": "zero_shot", "data": str(data / "pairs"), "every": 6, "seed": 5}}
    for _ in range(2):
        assert start(data, tmp_path / "run", evaluators=evaluators) == 0
    lines = read_jsonl(tmp_path / "run" / "results.jsonl")
    assert [line["step"] for line in lines] == [6, 12]
    assert set(lines[0]) == {"step", "evaluator", "name", "dataset", "model", "n", "seed", "metrics"}
    assert (lines[0]["n"], lines[0]["seed"]) == (40, 5)  # the evaluator's seed; the run's is 3


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


def test_a_bad_step_leaves_batchnorm_and_the_checkpoints_alone(data, tmp_path, monkeypatch):
    """A NaN that passes through a BatchNorm at step 3, where a checkpoint is due: statistics stay finite, step 4 is saved instead."""
    from mmpretrain import trainer
    from mmpretrain.heads import GlobalBatchNorm

    forward, set_rate = GlobalBatchNorm.forward, trainer.set_learning_rate
    now = []

    def notes(optimizer, config, step, steps):
        now.append(step)
        return set_rate(optimizer, config, step, steps)

    monkeypatch.setattr(trainer, "set_learning_rate", notes)
    monkeypatch.setattr(GlobalBatchNorm, "forward", lambda self, x: forward(self, x * float("nan") if now[-1:] == [2] else x))
    recipe = runs.recipe(data, tmp_path / "run", steps=5, objectives={"simclr": {"source": "photos", "norm": "batch"}}, teacher=None)
    del recipe["sources"]["pairs"]
    assert train(recipes.assemble(recipe | {"checkpoint": {"every": 3, "keep": 9}})) == 0
    assert [p.name[-2:] for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["05", "04"]
    lines = runs.logged(tmp_path / "run")
    assert [line["step"] for line in lines if line["loss"] is None] == [3]
    stored = load_tensors(find_checkpoint(tmp_path / "run"), "objectives")
    assert any("running_mean" in name for name in stored)
    assert all(value.isfinite().all() for value in stored.values())


def break_at(monkeypatch, stop, action):
    """Do it with an exception in the step after `stop`."""
    from mmpretrain import trainer

    real = trainer.set_learning_rate

    def breaks(optimizer, config, step, steps):
        if step == stop:
            raise KeyboardInterrupt
        return real(optimizer, config, step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "set_learning_rate", breaks)
        return action()


def test_towers_with_dropout_resume_bit_identical(data, tmp_path, monkeypatch):
    """Another library's module draws from torch's global generator."""
    tower = {"timm_model_name": "test_resnet", "image_size": 32, "timm_pool": "avg", "timm_proj": "linear", "timm_drop": 0.5}
    changes = {"model": {**runs.MODEL, "vision_cfg": tower}, "objectives": {"clip": {"source": "pairs"}}, "steps": 5}
    recipe = runs.recipe(data, tmp_path / "a", **changes, checkpoint={"every": 3, "keep": 2})
    del recipe["sources"]["photos"]
    assert train(recipes.assemble(recipe)) == 0
    again = recipe | {"run_dir": str(tmp_path / "b")}
    with pytest.raises(KeyboardInterrupt):
        break_at(monkeypatch, 3, lambda: train(recipes.assemble(again)))
    torch.manual_seed(99)
    torch.rand(7)
    assert train(recipes.assemble(again)) == 0
    runs.assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.fixture(scope="module")
def watched(data, tmp_path_factory):
    """Four updates of `clip` with `token_drop` and a teacher: what the steps saw, by name, one entry a step."""
    from mmpretrain import trainer
    from mmpretrain.objectives.clip import CLIP
    from mmpretrain.towers.teacher import Teacher
    from mmpretrain.towers.vision import VisionTransformer

    seen = {"tokens": [], "dropout": [], "student": [], "teacher": []}
    trunk, forward, update = VisionTransformer.trunk, CLIP.forward, Teacher.update

    def notes_tokens(self, tokens, *args, **kwargs):
        seen["tokens"].append(tokens.x.shape[1])
        return trunk(self, tokens, *args, **kwargs)

    def notes_dropout(self, **encoded):
        with torch.random.fork_rng([]):
            seen["dropout"].append(tuple(torch.nn.functional.dropout(torch.ones(64), 0.5).tolist()))
        return forward(self, **encoded)

    def notes_weights(self, *args, **kwargs):
        if not seen["teacher"]:
            seen["teacher"].append(self.module.visual.conv1.weight.clone())
        result = update(self, *args, **kwargs)
        seen["student"].append(self._student[0].visual.conv1.weight.detach().clone())
        seen["teacher"].append(self.module.visual.conv1.weight.clone())
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VisionTransformer, "trunk", notes_tokens)
        patch.setattr(CLIP, "forward", notes_dropout)
        patch.setattr(Teacher, "update", notes_weights)
        patch.setattr(trainer, "show", lambda *args: None)
        changes = {"objectives": {"clip": {"source": "pairs", "token_drop": 0.5, "whole_tail": 0.5}}, "steps": 4, "cost_every": 0}
        teacher = {"momentum": 0.2, "final_momentum": 1.0}
        recipe = runs.recipe(data, tmp_path_factory.mktemp("watched") / "run", **changes, teacher=teacher, optim={"lr": 1e-2})
        del recipe["sources"]["photos"]
        assert train(recipes.assemble(recipe)) == 0
    return seen


def test_objectives_learn_before_each_step_how_far_the_run_is(watched):
    assert watched["tokens"][-4:] == [9, 9, 17, 17]  # half of 16 patches, and all of them in the last half of the run


def test_each_step_has_a_dropout_of_its_own(watched):
    assert len(set(watched["dropout"][-4:])) == 4


def test_the_teachers_momentum_follows_its_schedule_through_the_run(watched):
    teacher = watched["teacher"][0]
    for step, (student, found) in enumerate(zip(watched["student"], watched["teacher"][1:], strict=True), 1):
        momentum = 1 - 0.8 * (math.cos(math.pi * step / 4) + 1) / 2
        assert not torch.equal(student, teacher)
        teacher = momentum * teacher + (1 - momentum) * student
        torch.testing.assert_close(found, teacher)


def test_wrong_evaluation_data_is_said_before_the_first_step(data, tmp_path):
    for wrong, message in ((str(tmp_path / "nothing"), "no such folder"), (str(tmp_path / "*.tar"), "no such shard")):
        with pytest.raises(OptionError, match=rf"evaluators\.end: .*{message}"):
            start(data, tmp_path / "run", evaluators={"end": {"kind": "zero_shot", "data": wrong}})
    with pytest.raises(OptionError, match=r"evaluators\.near: k=0"):
        start(data, tmp_path / "run", evaluators={"near": {"kind": "knn", "data": str(data / "pairs"), "k": 0}})
    assert not (tmp_path / "run").exists()


def test_an_interrupted_evaluation_is_saved_and_made_up_for(data, tmp_path, monkeypatch):
    """SIGTERM while the first of two evaluators runs at a step without a checkpoint: save, leave; the second runs on resuming."""
    from mmpretrain.evaluators import ZeroShot

    real, calls = ZeroShot.__call__, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments)

    monkeypatch.setattr(ZeroShot, "__call__", interrupted)
    evaluators = {name: {"kind": "zero_shot", "data": str(data / "pairs"), "every": 4} for name in ("first", "second")}
    changes = {"evaluators": evaluators, "checkpoint": {"every": 100, "keep": 2}, "steps": 8}
    done = []
    for _ in range(2):
        assert start(data, tmp_path / "run", **changes) == 0
        done.append([(line["name"], line["step"]) for line in read_jsonl(tmp_path / "run" / "results.jsonl")])
    assert done[0] == [("first", 4)]
    assert done[1] == [(name, step) for step in (4, 8) for name in ("first", "second")]
    assert [p.name for p in checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000008", "step-00000004"]


def test_force_goes_on_with_another_recipe_and_says_what_is_fresh(data, undisturbed, tmp_path, capfd):
    start_from = shutil.copytree(undisturbed, tmp_path / "init")
    recipe = runs.recipe(data, tmp_path / "run", steps=3, init_from=str(start_from), teacher=None, objectives={"clip": {"source": "pairs"}})
    del recipe["sources"]["photos"]
    assert train(recipes.assemble(recipe)) == 0
    before = load_tensors(find_checkpoint(tmp_path / "run"), "model")
    shutil.rmtree(start_from)  # what a run began from need not outlive its beginning
    more = runs.recipe(data, tmp_path / "run", steps=4, init_from=str(start_from), optim={"lr": 0.0})
    with pytest.raises(OptionError, match="resume=force"):
        train(recipes.assemble(dict(more)))
    capfd.readouterr()
    assert train(recipes.assemble(more | {"resume": "force"})) == 0
    said = capfd.readouterr().out
    assert "the checkpoint lacks simclr." in said
    assert "no teacher: it starts as a copy of the towers" in said
    after = load_tensors(find_checkpoint(tmp_path / "run"), "model")
    assert all(torch.equal(after[name], value) for name, value in before.items() if name != "logit_scale")
    teacher = load_tensors(find_checkpoint(tmp_path / "run"), "teacher")
    assert torch.equal(teacher["visual.proj"], before["visual.proj"])


def test_skipped_samples_are_logged_once_with_their_step(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(folder / "pairs")
    records = [Record(f"p{i:04d}", {"png": runs.picture(i), "txt": b"one"}) for i in range(39)]
    write_shards([*records, Record("bad", {"png": b"no picture", "txt": b"one"})], folder / "pairs")
    assert start(folder, tmp_path / "run", steps=10, log_every=50) == 0
    lines = read_jsonl(tmp_path / "run" / "skipped.jsonl")
    assert {(line["key"], line["reason"]) for line in lines} == {("bad", "unknown_format")}
    first = lines[0]
    assert 1 <= first["step"] <= 5
    assert first["slot"] // 8 == first["step"] - 1
    assert "/p" in first["replaced_by"]


@pytest.mark.parametrize("options", [{"max_bad_fraction": 0.0}, {"max_consecutive_bad": 2, "max_bad_fraction": 1.0}])
@pytest.mark.parametrize("processes", [False, True])
def test_a_run_that_ends_by_its_budget_lists_the_bad_samples(options, processes, tmp_path):
    bad = {f"p{i:04d}" for i in range(400) if i % 4 == 0}
    records = [Record(f"p{i:04d}", {"png": b"no picture" if i % 4 == 0 else runs.picture(i), "txt": b"one"}) for i in range(400)]
    write_shards(records, tmp_path / "data")
    sources = {"pairs": {"shards": str(tmp_path / "data"), "batch_size": 8, **options}}
    recipe = runs.recipe(tmp_path, tmp_path / "run", sources=sources, objectives={"clip": {"source": "pairs"}}, teacher=None, steps=50)
    with pytest.raises(BadSampleBudgetError) as error:
        train(recipes.assemble(recipe | {"loader_processes": processes, "loader_threads": 2}))
    lines = read_jsonl(tmp_path / "run" / "skipped.jsonl")
    assert {line["key"] for line in lines} <= bad
    assert {line["reason"] for line in lines} == {"unknown_format"}
    places = [(line["slot"], line["key"]) for line in lines]
    assert len(places) == len(set(places)) >= (2 if "max_consecutive_bad" in options else 11), error.value


def test_pictures_of_an_objective_that_takes_several_views(monkeypatch):
    from accelerate import Accelerator

    from mmpretrain import trainer
    from tests import tiny

    class Shown(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            (first, second) = inner.needs.values()
            self.needs = {"crops": (first, second)}

        def pictures(self, crops):
            return {"crops": [crop.view.data for crop in crops]}

    class Stub:
        def __init__(self):
            self.names = []

        def images(self, step, name, grid):
            self.names.append(name)

    model = tiny.model({"simclr": {}}, double=False)
    model.objectives["simclr"] = Shown(model.objectives["simclr"])
    tracker = Stub()
    trainer.show(tracker, model, Accelerator(cpu=True), tiny.batch(model, double=False), 1)
    assert tracker.names == ["views/pairs", "crops/simclr"]


def test_fp16_is_refused_with_what_to_do(data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(OptionError, match=r"--mixed_precision fp16.*launch with bf16 or no"):
        start(data, tmp_path / "run")


@pytest.mark.slow
def test_every_rank_refuses_what_the_main_one_refuses(data, undisturbed, tmp_path):
    path = runs.write_recipe(tmp_path / "recipe.yaml", runs.recipe(data, undisturbed, seed=4))
    out = torchrun("train.py", str(path))
    assert out.returncode != 0
    assert out.stderr.count("holds a run of a different recipe") == 2, out.stderr[-3000:]


def test_exit_status_says_whose_fault_it_is(data, tmp_path, monkeypatch, capsys):
    import train as entry

    recipe = runs.recipe(data, tmp_path / "run")
    (tmp_path / "empty").mkdir()

    def cli(*arguments, **changes):
        path = runs.write_recipe(tmp_path / "recipe.yaml", recipe | changes)
        monkeypatch.setattr(sys, "argv", ["train.py", str(path), *arguments])
        return entry.main(), *capsys.readouterr()

    for wrong in ({"model": "ViT-Q-99"}, {"teacher": {"momentum": 3.0}}, {"evaluators": {"e": {"kind": "knn", "data": "x", "k": 0}}}):
        status, _, said = cli(**wrong)
        assert status == 2, said
        (line,) = said.splitlines()
        assert line.startswith(("error: model: ", "error: option teacher.momentum=3.0", "error: evaluators.e: "))
    status, _, said = cli("sources.pairs.shards=" + str(tmp_path / "empty"))
    assert status == 1
    assert "a folder without *.tar" in said
    status, shown, _ = cli("--print-config", "steps=3")
    assert status == 0
    assert "steps: 3" in shown
    monkeypatch.setattr("mmpretrain.trainer.train", lambda *a: {}["unexpected"])
    with pytest.raises(KeyError):  # with its traceback
        cli()
