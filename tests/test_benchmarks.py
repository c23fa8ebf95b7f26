"""The benchmarks' own arithmetic, and the quick forms that need neither a network nor minutes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "scripts" / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def quick(name: str, out: Path, *words: str, timeout: float = 300) -> list[dict]:
    """The records of a benchmark's quick form."""
    command = [sys.executable, str(HERE / f"bench_{name}.py"), "--quick", "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_ratio_is_taken_round_by_round_and_more_is_better():
    from common import Spread, ratio

    assert ratio([10, 30, 20], [5, 10, 20]) == Spread(2.0, 1.0, 3.0)
    assert ratio([2.0, 4.0], [8.0, 8.0], less_is_better=True) == Spread(3.0, 2.0, 4.0)
    assert str(Spread(1234.4, 2.0, 2000.0)) == "1,234 (2 to 2,000)"


def test_alternate_goes_forwards_and_backwards():
    from common import alternate

    order = []

    def run(name):
        order.append(name)
        return float(len(order))

    found = alternate({"a": lambda: run("a"), "b": lambda: run("b")}, 3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [1, 4, 5], "b": [2, 3, 6]}


def test_measured_sees_memory_lines_and_failure(tmp_path):
    from common import measured

    log = tmp_path / "log"
    code = (
        "import sys, time\nblock = bytearray(200 << 20)\nblock[::4096] = b'x' * len(block[::4096])\n"
        "file = open(sys.argv[1], 'w', buffering=1)\n"
        "for i in range(3):\n    print('step', i, file=file)\n    print('other', file=file)\n    time.sleep(0.3)\n"
    )
    done = measured([sys.executable, "-c", code, str(log)], watch=log, pattern="step")
    assert len(done.seen) == 3
    assert 0.15 < done.seen[2] - done.seen[1] < 5
    assert 200 < done.peak_mb < 400
    with pytest.raises(RuntimeError, match="ended with status 3"):
        measured([sys.executable, "-c", "raise SystemExit(3)"])


def test_flops_of_vit_b_16():
    """OpenAI's ViT-B/16 takes 35 GFLOP forward for an image and 6 for 77 tokens of text (as open_clip's profile has it, 41.1 in all)."""
    from bench_gpu_train_step import flops_per_pair

    config = {
        "vision_cfg": {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12},
        "text_cfg": {"width": 512, "layers": 12},
    }
    assert flops_per_pair(config, 77) / 3 == pytest.approx(41.1e9, rel=0.03)


def test_scaling_model_by_hand():
    from scaling_model import EMBED, Step

    step = Step(1024, 256)
    assert step.batch == 262_144
    assert step.columns_bytes == 4 * 262_144
    assert step.loss == pytest.approx(8 * 256 * 262_144 * EMBED / 33.5e12)
    assert Step(8, 256).bandwidth > step.bandwidth
    assert step.seconds > step.towers
    assert Step(1, 256).features == pytest.approx(2 * 20e-6)  # nothing to send: latency alone


def test_the_scaling_page_holds_the_models_tables():
    from scaling_model import PAGE, tables

    assert tables() in PAGE.read_text(), "run scripts/benchmarks/scaling_model.py --write"


def test_page_shows_the_last_record_of_each_row_and_failures():
    from run_all import page

    line = {
        "benchmark": "augment", "row": "a | b", "ours": "1", "peer": "2", "ratio": {"median": 1.5, "low": 1, "high": 2},
        "target": "at least 2x", "met": False, "quick": False, "machine": "M", "date": "2030-01-02", "versions": {"torch": "9"},
        "command": "python x",
    }  # fmt: skip
    text = page([line | {"ours": "old"}, line, line | {"row": "c", "met": True, "ratio": None}], {"loader": "stopped after 5 s"})
    assert "| a \\| b | 1 | 2 | 1.50 (1.00 to 2.00) | at least 2x | **no** |" in text
    assert "old" not in text
    assert "targets met: 1 of 2" in text
    assert "- loader: stopped after 5 s" in text
    assert "2030-01-02: M; torch 9" in text


def test_run_all_knows_every_row_and_stays_under_half_an_hour():
    from run_all import MINUTES, known

    assert {"train_step", "combined_step", "loader", "augment", "contrastive_loss", "accumulate", "scaling", "gpu_train_step"} <= set(
        known()
    )
    assert set(known()) <= set(MINUTES)
    assert sum(MINUTES.values()) < 30


def test_courses_of_the_loss_must_agree(monkeypatch, tmp_path):
    import trainers

    setting = trainers.Setting(tmp_path, trainers.TINY, batch=4, steps=16, warmup=2, samples=16)
    theirs = trainers.Run([3.0, 2.0], 1.0, 1.0, 1.0, 10)
    monkeypatch.setattr(trainers, "train_peer", lambda setting: theirs)
    for ours, message in (
        (trainers.Run([3.0, 2.3], 1.0, 1.0, 1.0, 10), "at step 1"),
        (trainers.Run([3.0, 2.0], 1.0, 1.0, 1.0, 11), "different models"),
        (trainers.Run([float("nan"), 2.0], 1.0, 1.0, 1.0, 10), "at step 0"),
    ):
        monkeypatch.setattr(trainers, "train_ours", lambda setting, objectives, ours=ours: ours)
        with pytest.raises(RuntimeError, match=message):
            trainers.check_same_work(setting)


def test_decode_quick(tmp_path):
    rows = quick("decode", tmp_path / "out.jsonl")  # it fails where a format's pixels are not Pillow's
    assert {"decode, JPEG", "decode, PNG, alpha", "decode, PPM, maximum 100", "decode, BMP, runs of one pixel"} <= {
        row["row"] for row in rows
    }
    assert all(row["figures"]["bytes"] > 0 for row in rows)


def test_order_quick(tmp_path):
    rows = quick("order", tmp_path / "out.jsonl")
    assert [row["met"] for row in rows] == [None, None]  # a quick run judges nothing
    assert all(run["mb"] > 0 and run["start_s"] > 0 for row in rows for run in row["figures"]["runs"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["augment", "loader", "contrastive_loss", "accumulate", "scaling", "startup", "towers", "busy"])
def test_quick(name, tmp_path):
    rows = quick(name, tmp_path / "out.jsonl", timeout=900)
    assert rows
    assert all(row["benchmark"] == name and row["ours"] and row["command"] for row in rows)


def test_gpu_benchmark_skips_without_a_gpu():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(HERE / "bench_gpu_train_step.py")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "skipped" in done.stdout
