"""The checkpoint protocol: whole or absent, verified, newest valid first."""

import json
import os
import resource
import subprocess
import sys
import textwrap

import pytest
import torch

from mmpretrain import checkpoint, trainer
from mmpretrain.checkpoint import CheckpointError, find_checkpoint, load_tensors
from mmpretrain.config.recipe import assemble
from mmpretrain.towers.vision import resize_grid
from tests import runs

STATE = {"positions": {}, "skipped_steps": 0}


def write(root, step, value=1.0, keep=3):
    return checkpoint.save(
        root, step, {"model": {"w": torch.full((3,), value)}}, {"w": {"step": torch.tensor(1.0)}}, {"state": {"step": step} | STATE}, keep
    )


def test_round_trip_and_pruning(tmp_path):
    for step in (1, 2, 3, 10):
        write(tmp_path, step, float(step), keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000010", "step-00000003"]
    found = checkpoint.find_checkpoint(tmp_path)
    assert checkpoint.load_tensors(found, "model")["w"].tolist() == [10.0] * 3
    assert checkpoint.load_json(found, "state") == {"step": 10} | STATE
    assert checkpoint.load_optimizer(found)["w"]["step"] == 1.0


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json"])
def test_a_flipped_bit_is_refused_and_the_previous_one_taken(tmp_path, name):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    data = bytearray((newest / name).read_bytes())
    data[len(data) // 2] ^= 1
    (newest / name).write_bytes(data)
    found, said = checkpoint.newest_valid(tmp_path)
    assert found == tmp_path / "step-00000001"
    assert len(said) == 1
    assert name in said[0]
    assert "sha256" in said[0]


@pytest.mark.parametrize("damage", ["missing", "manifest", "no manifest"])
def test_other_damage_is_named(tmp_path, damage):
    folder = write(tmp_path, 1)
    if damage == "missing":
        (folder / "state.json").unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"state\.json is missing|manifest\.json cannot be read"):
        checkpoint.find_checkpoint(tmp_path)


def test_full_disk_leaves_the_old_checkpoint_and_nothing_partial(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*earlier checkpoints are untouched"):
        write(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.newest_valid(tmp_path)[0] == tmp_path / "step-00000001"


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path):
    write(tmp_path, 1)
    (tmp_path / "step-00000002.tmp-99").mkdir()
    assert checkpoint.newest_valid(tmp_path)[0].name == "step-00000001"
    write(tmp_path, 3)
    assert not list(tmp_path.glob("*.tmp-*"))


def test_kill_at_every_stage_of_a_save_leaves_a_valid_checkpoint(tmp_path):
    """A child dies by SIGKILL at the n-th file-system call of its second save, for every n until a save gets through."""
    code = textwrap.dedent("""
        import os, signal, sys, torch
        from pathlib import Path
        from mmpretrain import checkpoint
        root, fatal = Path(sys.argv[1]), int(sys.argv[2])
        state = lambda step: {"step": step, "positions": {}, "skipped_steps": 0}
        save = lambda step: checkpoint.save(root, step, {"model": {"w": torch.full((3,), float(step))}}, {}, {"state": state(step)}, 1)
        save(1)
        calls = 0
        def dies(call):
            def wrapper(*args, **kwargs):
                global calls
                calls += 1
                if calls == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)
            return wrapper
        checkpoint.flush, checkpoint._sha256 = dies(checkpoint.flush), dies(checkpoint._sha256)
        checkpoint.save_file, checkpoint.torch.save = dies(checkpoint.save_file), dies(checkpoint.torch.save)
        Path.rename, Path.mkdir, checkpoint.shutil.rmtree = dies(Path.rename), dies(Path.mkdir), dies(checkpoint.shutil.rmtree)
        save(2)
    """)
    # One child that forks for every n: importing torch once.
    driver = code.replace("fatal = Path(sys.argv[1]), int(sys.argv[2])", "fatal = Path(sys.argv[1]), 0").split("save(1)")
    forked = (
        driver[0]
        + "for n in range(1, 60):\n"
        + "    root = Path(sys.argv[1]) / str(n)\n"
        + "    pid = os.fork()\n"
        + "    if pid == 0:\n"
        + "        fatal = n\n"
        + textwrap.indent("save(1)" + driver[1], "        ")
        + "\n        os._exit(0)\n"
        + "    status = os.waitpid(pid, 0)[1]\n"
        + "    if status == 0: break\n"
        + "    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (n, status)\n"
        + "else: raise SystemExit('no save got through')\n"
        + "print(n)\n"
    )
    out = subprocess.run([sys.executable, "-c", forked, str(tmp_path)], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    stages = int(out.stdout)
    assert stages > 8
    for n in range(1, stages + 1):
        found, _ = checkpoint.newest_valid(tmp_path / str(n))
        assert found is not None, f"killed at call {n}"
        step = json.loads((found / "state.json").read_text())["step"]
        assert checkpoint.load_tensors(found, "model")["w"].tolist() == [float(step)] * 3


def test_optimizer_state_moves_by_name(tmp_path):
    def build(order):
        w = {name: torch.nn.Parameter(torch.ones(2)) for name in "ab"}
        return w, torch.optim.AdamW([{"params": [w[n]], "names": [n]} for n in order], lr=0.1)

    weights, optimizer = build("ab")
    (weights["a"].sum() * 3 + weights["b"].sum()).backward()
    optimizer.step()
    state = checkpoint.optimizer_by_name(optimizer)
    fresh, other = build("ba")
    checkpoint.restore_optimizer(other, state)
    assert torch.equal(other.state[fresh["a"]]["exp_avg"], optimizer.state[weights["a"]]["exp_avg"])
    assert not torch.equal(other.state[fresh["a"]]["exp_avg"], other.state[fresh["b"]]["exp_avg"])
    with pytest.raises(CheckpointError, match="names parameters this recipe does not train: z"):
        checkpoint.restore_optimizer(other, {"z": {}})


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    folder = write(tmp_path, 1)

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"x": Evil()}, folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt.*is not unpickled.*mkdir") as refused:
        checkpoint.load_optimizer(folder)
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("large", ["model", "optimizer", "both"])
def test_a_disk_that_fills_up_leaves_the_old_checkpoint(tmp_path, large):
    """For real: the kernel refuses to let a child's files grow, and safetensors and torch each raise errors of their own."""
    write(tmp_path, 1)
    big = torch.zeros(300_000)
    model = {"w": big if large != "optimizer" else big[:3].clone()}
    optimizer = {"w": {"exp_avg": big if large != "model" else big[:3].clone()}}
    read, wrote = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            checkpoint.save(tmp_path, 2, {"model": model}, optimizer, {"state": {"step": 2} | STATE}, 3)
            os.write(wrote, b"saved")
        except BaseException as error:
            os.write(wrote, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    said = os.read(read, 5000).decode()
    assert said.startswith("CheckpointError: cannot write")
    assert "earlier checkpoints are untouched" in said
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.newest_valid(tmp_path)[0] == tmp_path / "step-00000001"


def test_optimizer_state_that_does_not_fit_is_left_out_where_that_is_wanted():
    w = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([{"params": [w], "names": ["w"]}])
    fits = {"step": torch.tensor(1.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    assert checkpoint.restore_optimizer(optimizer, {"w": fits, "gone": fits}, strict=False) == ["gone"]
    assert optimizer.state[w]["exp_avg"].tolist() == [1, 1]
    for wrong in (fits | {"exp_avg": torch.ones(3)}, {"momentum_buffer": torch.ones(2)}):
        with pytest.raises(CheckpointError, match="does not train: w"):
            checkpoint.restore_optimizer(optimizer, {"w": wrong})


def rewrite(folder, name, content):
    """Other content, with the right sum."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = checkpoint._sha256(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("manifest", ['{"files": []}', '{"files": {}}', "[" * 100_000, '{"files": {"state.json": 5}}', "5"])
def test_a_manifest_that_says_nothing_makes_no_checkpoint(tmp_path, manifest):
    older = write(tmp_path, 1)
    (write(tmp_path, 2) / "manifest.json").write_text(manifest)
    found, said = checkpoint.newest_valid(tmp_path)
    assert found == older
    assert "its manifest.json" in said[0]


@pytest.mark.parametrize("content", [b"{}", b"[1", b"5", b"\xff", b'{"step": "x", "positions": {}, "skipped_steps": 0}'])
def test_a_state_to_go_on_from_is_part_of_a_checkpoint(tmp_path, content):
    older = write(tmp_path, 1)
    rewrite(write(tmp_path, 2), "state.json", content)
    found, said = checkpoint.newest_valid(tmp_path)
    assert found == older
    assert "state.json" in said[0]


def test_content_that_cannot_be_read_names_its_file(tmp_path):
    folder = write(tmp_path, 1)
    rewrite(folder, "model.safetensors", b"\xff" * 64)
    rewrite(folder, "optimizer.pt", b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .*remove .*step-00000001"):
        checkpoint.load_tensors(folder, "model")
    with pytest.raises(CheckpointError, match=r"objectives\.safetensors cannot be read"):
        checkpoint.load_tensors(folder, "objectives")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt cannot be read"):
        checkpoint.load_optimizer(folder)
    torch.save([1], folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match=r"optimizer\.pt cannot be read \(expected each parameter's state"):
        checkpoint.load_optimizer(folder)


def test_forcing_another_image_size_resizes_the_positions_of_towers_and_teacher(tmp_path):
    runs.shards(tmp_path)
    data = runs.recipe(tmp_path, tmp_path / "run", steps=1, objectives={"clip": {"source": "pairs"}}, evaluators={})
    data["sources"] = {"pairs": data["sources"]["pairs"]}
    data["optim"] = {"lr": 0.0}
    assert trainer.train(assemble(data)) == 0
    before = {stem: load_tensors(find_checkpoint(tmp_path / "run"), stem) for stem in ("model", "teacher")}
    assert trainer.train(assemble(data | {"image_size": 24, "steps": 2, "resume": "force"})) == 0
    for stem, weights in before.items():
        after = load_tensors(find_checkpoint(tmp_path / "run"), stem)
        wanted = resize_grid(weights["visual.positional_embedding"], (4, 4), (6, 6))
        torch.testing.assert_close(after["visual.positional_embedding"], wanted)
