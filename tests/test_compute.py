"""The choice of precision follows the measurement, a run keeps it, and OpenMP's spinning is bounded only where the user set nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from mmpretrain import compute, launch
from mmpretrain.compute import DEFAULT_WIDTH, Choice, Rates, measured_choice, model_width, product_rates, product_rows
from mmpretrain.config import recipe as recipes
from mmpretrain.cpu import SPINS, WAITING, bound_spinning, cpu_kind, waiting
from mmpretrain.trainer import train
from tests import runs
from tests.distributed.test_two_ranks import torchrun

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return runs.shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)  # another test of this process may have chosen another precision
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def measuring(monkeypatch, fp32: float, bf16: float) -> list[int]:
    """Every measurement gives these figures; returns the widths that were asked for, as they come."""
    widths: list[int] = []

    def rates(width: int) -> Rates:
        widths.append(width)
        return Rates(width, fp32, bf16)

    monkeypatch.setattr(compute, "product_rates", rates)
    return widths


def train_auto(data: Path, run_dir: Path) -> int:
    recipe = runs.recipe(data, run_dir, precision="auto", steps=3, checkpoint={"every": 1, "keep": 3})
    return train(recipes.assemble(recipe))


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected"),
    [
        (132, 625, "bf16"),  # AMX
        (103, 456, "bf16"),  # AVX-512 BF16 of an AMD Zen 5
        (124, 72, "fp32"),  # AVX-512 BF16 that is slower than fp32
        (90, 4, "fp32"),  # emulated
        (100, 120, "fp32"),  # too little to pay for the casts
        (100, 125, "bf16"),
    ],
)
def test_auto_takes_what_the_measurement_says_and_names_both_figures(on_a_cpu, monkeypatch, tmp_path, fp32, bf16, expected):
    widths = measuring(monkeypatch, fp32, bf16)
    config = recipes.Config(run_dir=str(tmp_path / "none"), model={"embed_dim": 8, "vision_cfg": {"width": 96}})
    choice = launch.precision(config)
    assert choice.precision == expected
    assert choice.rates == Rates(96, fp32, bf16)
    assert f"{fp32} GFLOP/s in fp32 and {bf16} in bf16" in choice.reason
    assert widths == [96]


def clocked(monkeypatch, seconds) -> dict[str, float]:
    """A clock that only products move: by `seconds(rows, dtype, how many products of that dtype there were before)`."""
    clock = {"now": 0.0}
    calls = {torch.float32: 0, torch.bfloat16: 0}

    def products(x, weight, grad):
        assert torch.get_num_threads() == 1
        assert (x.shape[1], weight.shape, grad.shape) == (64, (256, 64), (len(x), 256))
        clock["now"] += seconds(len(x), x.dtype, calls[x.dtype])
        calls[x.dtype] += 1

    monkeypatch.setattr(compute, "products", products)
    monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
    return clock


def test_a_slow_round_does_not_decide_and_the_threads_are_put_back(monkeypatch):
    """On a busy machine most rounds take long: the best of each precision counts."""
    threads = torch.get_num_threads()

    def seconds(rows, dtype, before):
        displaced = before % 3 != 2  # two rounds of three stand behind another program
        return (0.002 if dtype == torch.float32 else 0.0004) + (0.006 if displaced else 0.0)

    clock = clocked(monkeypatch, seconds)
    rates = product_rates(width=64)
    assert rates.bf16 / rates.fp32 == pytest.approx(5.0)
    assert 0.1 <= clock["now"] < 0.13
    assert torch.get_num_threads() == threads


def test_rates_count_the_three_products_of_a_linear_layer(monkeypatch):
    clocked(monkeypatch, lambda rows, dtype, before: 0.5)
    rates = product_rates(width=64, seconds=0.0)
    assert rates.fp32 == rates.bf16 == pytest.approx(3 * 2 * product_rows(64) * 64 * 256 / 0.5 / 1e9)


def test_emulated_bf16_is_found_with_few_rows(monkeypatch):
    clock = clocked(monkeypatch, lambda rows, dtype, before: 1e-5 * rows * (1 if dtype == torch.float32 else 20))
    rates = product_rates(width=64)
    assert rates.fp32 / rates.bf16 == pytest.approx(20)
    assert rates.fp32 == pytest.approx(3 * 2 * 64 * 256 / 1e-5 / 1e9)
    assert clock["now"] == pytest.approx(2 * 21 * 1e-5 * product_rows(64) / 16)


def test_the_measurement_leaves_the_global_generator_as_it_is():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    product_rates(width=32, seconds=0.0, min_rounds=1)
    assert torch.equal(torch.rand(3), expected)


def test_the_width_is_the_recipe_s_model_s(tmp_path):
    fields = {"embed_dim": 8, "vision_cfg": {"width": 48}, "text_cfg": {"width": 32}}
    file = tmp_path / "model.json"
    file.write_text(json.dumps({"model_cfg": fields}))
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    found = [model_width(m) for m in (fields, {"text_cfg": {"width": 32}}, str(file), "ViT-S-32-alt", "open_clip:ViT-S-32-alt")]
    assert found == [48, 32, 48, 384, 384]
    for unknown in ("no-such-model", "timm:resnet50", str(damaged), str(tmp_path / "absent.json"), {"vision_cfg": {"width": "wide"}}):
        assert model_width(unknown) == DEFAULT_WIDTH


def test_what_the_launcher_was_told_and_what_the_recipe_says_come_before_a_measurement(on_a_cpu, monkeypatch, tmp_path):
    widths = measuring(monkeypatch, 100, 10)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert launch.precision(recipes.Config(run_dir=str(tmp_path))).precision == "bf16"
    assert widths == []


def test_a_resumed_run_keeps_the_precision_it_began_with_and_says_so(on_a_cpu, data, tmp_path, monkeypatch, capfd):
    run = tmp_path / "run"
    widths = measuring(monkeypatch, 100.0, 300.0)
    assert train_auto(data, run) == 0
    begun = yaml.safe_load((run / "config.yaml").read_text())
    assert begun["precision"] == "bf16"
    assert begun["environment"]["product_gflops_fp32"] == 100.0
    assert begun["environment"]["product_gflops_bf16"] == 300.0
    assert begun["environment"]["cpu"] == cpu_kind()
    assert capfd.readouterr().out.count("100 GFLOP/s in fp32 and 300 in bf16") == 1
    assert len(widths) == 1

    shutil.rmtree(run / "checkpoints" / "step-00000003")  # as if it had been broken off after two steps
    widths = measuring(monkeypatch, 100.0, 4.0)  # another machine, where a new run would take fp32
    assert train_auto(data, run) == 0
    assert widths == []
    ended = yaml.safe_load((run / "config.yaml").read_text())
    assert ended["precision"] == "bf16"
    assert ended["environment"]["product_gflops_bf16"] == 300.0
    said = capfd.readouterr().out
    assert "precision bf16: this run began with it" in " ".join(said.split())
    assert "resuming from" in said


def test_no_record_of_a_precision_is_none_and_a_damaged_one_too(tmp_path):
    assert launch.recorded_precision(tmp_path) is None
    for text in ("", "- a list", "{", "precision: auto", "precision: [1]", "steps: 3"):
        (tmp_path / "config.yaml").write_text(text)
        assert launch.recorded_precision(tmp_path) is None, text
    (tmp_path / "config.yaml").write_text("precision: fp32\nenvironment: {product_width: x}\n")
    found = launch.recorded_precision(tmp_path)
    assert found is not None
    assert (found.precision, found.rates) == ("fp32", None)


def test_all_ranks_take_what_the_main_one_measured(tmp_path):
    out = torchrun("-m", "tests.distributed.precision", str(tmp_path / "run"))
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-4000:]
    assert out.stdout.count("took bf16") == 2


def test_measured_choice_is_deterministic_at_the_limit():
    assert measured_choice(Rates(8, 4.0, 5.0)).precision == "bf16"
    assert measured_choice(Rates(8, 4.0, 4.99)) == Choice("fp32", measured_choice(Rates(8, 4.0, 4.99)).reason, Rates(8, 4.0, 4.99))


def test_spinning_is_bounded_only_where_the_user_set_nothing():
    environ: dict[str, str] = {"OMP_NUM_THREADS": "2"}
    assert bound_spinning(environ)
    assert environ == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": str(SPINS)}
    assert waiting(environ) == {"GOMP_SPINCOUNT": str(SPINS)}
    for name in WAITING:
        environ = {name: "7"}
        assert not bound_spinning(environ)
        assert environ == {name: "7"}


def test_train_py_bounds_the_spinning_before_torch_is_imported():
    code = (
        "import os, sys, runpy\n"
        "seen = []\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch': seen.append(os.environ.get('GOMP_SPINCOUNT'))\n"
        "sys.meta_path.insert(0, Finder())\n"
        "sys.argv = ['train.py', 'configs/no-such-recipe.yaml']\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('seen', seen)\n"
    )
    for given, expected in (({}, str(SPINS)), ({"GOMP_SPINCOUNT": "12"}, "12"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)):
        env = {k: v for k, v in os.environ.items() if k not in WAITING} | given | {"PYTHONPATH": str(ROOT)}
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert f"seen [{expected!r}" in out.stdout, out.stdout + out.stderr[-2000:]
