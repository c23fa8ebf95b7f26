"""Our train.py and open_clip's trainer on the same shards, from the same weights: what train_step and combined_step share."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peer
from common import ROOT, machine, measured, threads

from mmpretrain.cpu import SPINS

SMALL: dict[str, Any] = {  # ViT-Ti/16 at 112 px and a text tower of 12 layers
    "embed_dim": 192,
    "vision_cfg": {"image_size": 112, "patch_size": 16, "width": 192, "layers": 12, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 12},
}
TINY: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
# Sizes and weights of the peer's parameters, and a count of what a torch file holds, without importing torch here.
FIRST_WEIGHTS = """
import json, sys, torch, open_clip
torch.manual_seed(0)
model = open_clip.model.CLIP(**json.load(open(sys.argv[1])))
torch.save(model.state_dict(), sys.argv[2])
"""
COUNT = """
import sys, torch
state = torch.load(sys.argv[1], map_location="cpu", weights_only=False)["state_dict"]
print(sum(t.numel() for name, t in state.items() if not name.endswith("attn_mask")))
"""
# The precision that `precision: auto` takes (or the one given), why, and this machine's best product in it, GFLOP/s.
MACHINE = """
import json, sys, time, torch
from mmpretrain.compute import choose_precision, model_width
torch.set_num_threads(int(sys.argv[2]))
choice = choose_precision(model_width(json.load(open(sys.argv[1]))))
precision = choice.precision if sys.argv[3] == "auto" else sys.argv[3]
a, b = (torch.randn(2048, 2048).to(torch.bfloat16 if precision == "bf16" else torch.float32) for _ in range(2))
seconds = []
for _ in range(9):
    started = time.perf_counter()
    a @ b
    seconds.append(time.perf_counter() - started)
print(json.dumps({"precision": precision, "reason": choice.reason, "peak_gflops": 2 * 2048**3 / min(seconds[1:]) / 1e9}))
"""
# FLOPs of the products and the attention of a step's forward and backward pass, as executed (captions trimmed, masks as drawn).
STEP_FLOPS = """
import sys, torch
from torch.utils.flop_counter import FlopCounterMode
from mmpretrain.config import recipe as recipes
from mmpretrain.assembly import build_model, build_sources
from mmpretrain.batch import first_rows
from mmpretrain.data.loader import Loader
from mmpretrain.model import freeze_unused
config = recipes.load(sys.argv[1], ["precision=fp32"])
model, _ = build_model(config)
loader = Loader(build_sources(config, model), threads=1, processes=False)
taken = iter(loader)
batches = [next(taken) for _ in range(4)]
loader.close()
freeze_unused(model, first_rows(batches[0], 4))
with FlopCounterMode(display=False) as counter:
    for batch in batches:
        model(batch)[0].backward()
print(counter.get_total_flops() / len(batches))
"""
LINE = re.compile(r"Contrastive_loss: ([0-9.naif]+) ")


def model_config(name: str) -> dict[str, Any]:
    """The config of an open_clip model. Raises SystemExit for a name that open_clip does not know."""
    import open_clip

    config = open_clip.get_model_config(name)
    if config is None:
        raise SystemExit(f"--model {name}: open_clip has no such model; it has {', '.join(open_clip.list_models())}")
    return config


@dataclass
class Setting:
    """The work that both do."""

    folder: Path
    model: dict[str, Any]
    batch: int
    steps: int
    warmup: int  # steps left out of the timing
    samples: int
    lr: float = 1e-3
    shards: int = 4
    data: str = "shards"  # or "one": a single shard of one batch
    precision: str = "bf16"  # of both trainers
    peak_gflops: float = 0.0  # of this machine's best product in that precision; 0 until `on_this_machine`

    def prepare(self) -> None:
        """Write shards (image and caption, nothing else), the model's config, and the weights that both start from."""
        from data_prep.demo.records import chunk
        from data_prep.records import Record
        from data_prep.shards.serial import write_shards

        scenes = [pair for at in range(0, self.samples, 250) for pair in chunk((0, "pairs", at, min(at + 250, self.samples)))]
        records = [Record(key, {"jpg": members["jpg"], "txt": members["txt"]}) for key, members in scenes]
        write_shards(records, self.folder / "shards", max_count=self.samples // self.shards)
        write_shards(records[: self.batch], self.folder / "one", max_count=self.batch)
        (self.folder / "configs").mkdir()
        (self.folder / "configs" / "bench.json").write_text(json.dumps(self.model))
        self._python(FIRST_WEIGHTS, self.folder / "configs" / "bench.json", self.folder / "first.pt")

    def on_this_machine(self, precision: str = "auto") -> Setting:
        """In the precision that `precision: auto` measures as the faster, or in the one given; prints the CPU's kind and its peak."""
        if precision not in ("auto", "fp32", "bf16"):
            raise SystemExit(f"--precision {precision}: expected auto, fp32 or bf16")
        found = json.loads(self._python(MACHINE, self.folder / "configs" / "bench.json", threads(), precision))
        print(
            f"{machine()}: {found['reason']}; computing in {found['precision']}, best product {found['peak_gflops']:.0f} GFLOP/s",
            flush=True,
        )
        return replace(self, precision=found["precision"], peak_gflops=found["peak_gflops"])

    def share_of_peak(self, flops: float, samples_per_s: float) -> str:
        """How much of the machine's best product a trainer reaches, whose step has so many FLOPs."""
        gflops = flops * samples_per_s / self.batch / 1e9
        return f"{flops / 1e9:.1f} GFLOP a step, {gflops:.0f} GFLOP/s: {gflops / self.peak_gflops:.0%} of the peak in {self.precision}"

    def aligned(self) -> Setting:
        """A few steps on one batch, always the same samples: both trainers must then find the same losses, but for their crops."""
        return replace(self, steps=8, warmup=1, data="one", shards=1, lr=1e-4)  # at a large rate rounding grows into different courses

    @staticmethod
    def _python(code: str, *words: Path | str | int) -> str:
        command = [sys.executable, "-c", code, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | _environment())
        if done.returncode:
            raise RuntimeError(f"ended with status {done.returncode}:\n{done.stderr[-3000:]}")
        return done.stdout.splitlines()[-1] if done.stdout else ""


@dataclass
class Run:
    """What one training run gave. `losses` are CLIP's, one a step, before that step's update."""

    losses: list[float]
    samples_per_s: float
    peak_mb: float
    tree_mb: float
    parameters: int

    @property
    def last(self) -> float:
        """The mean over the last eighth."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 8) :])


def _speed(setting: Setting, seen: list[float]) -> float:
    """From the wall clock at which the lines of steps appeared, so that it holds everything that a trainer does between two steps."""
    if len(seen) != setting.steps:
        raise RuntimeError(f"expected {setting.steps} lines of steps in the log, found {len(seen)}")
    return setting.batch * (setting.steps - setting.warmup) / (seen[-1] - seen[setting.warmup - 1])


def _environment() -> dict[str, str]:
    # Both sides' threads wait as ours do: on a busy machine spinning without bound would slow the peer many times over (bench_busy.py).
    waiting = {"GOMP_SPINCOUNT": str(SPINS)}
    return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads()), "WANDB_MODE": "disabled"} | waiting


def train_peer(setting: Setting, switch: bool = False) -> Run:
    """open_clip_train.main on CLIP; `switch` turns the slow attention kernel off."""
    logs = setting.folder / "peer"
    shutil.rmtree(logs, ignore_errors=True)
    options = {
        "train-data": f"{setting.folder}/{setting.data}/{{00000..{setting.shards - 1:05d}}}.tar", "dataset-type": "webdataset",
        "train-num-samples": setting.steps * setting.batch, "batch-size": setting.batch, "workers": 1, "epochs": 1,
        "lr": setting.lr, "wd": 0.2, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "warmup": setting.steps // 8, "log-every-n-steps": 1,
        "device": "cpu", "precision": "amp_bf16" if setting.precision == "bf16" else "fp32",
        "model": "bench", "pretrained": setting.folder / "first.pt", "logs": logs, "name": "run",
    }  # fmt: skip
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [str(peer.python()), "-c", peer.RUNNER, str(setting.folder / "configs"), "math" if switch else "none", *words]
    log = logs / "run" / "out.log"
    done = measured(command, _environment(), log, "Train Epoch:")
    losses = [float(value) for value in LINE.findall(log.read_text())]
    count = int(Setting._python(COUNT, logs / "run" / "checkpoints" / "epoch_1.pt"))
    return Run(losses, _speed(setting, done.seen), done.peak_mb, done.tree_mb, count)


def write_recipe(setting: Setting, objectives: dict[str, Any]) -> Path:
    """Our recipe of the same work; every objective reads the same pairs."""
    recipe = {
        "run_dir": str(setting.folder / "ours"), "steps": setting.steps, "model": str(setting.folder / "configs" / "bench.json"),
        "init_from": str(setting.folder / "first.pt"), "precision": setting.precision,
        "threads": threads(), "log_every": 1, "cost_every": 0,
        "sources": {"pairs": {"shards": f"{setting.folder}/{setting.data}/*.tar", "batch_size": setting.batch}},
        "objectives": {name: {"source": "pairs"} | options for name, options in objectives.items()},
        "optim": {"lr": setting.lr, "weight_decay": 0.2, "betas": [0.9, 0.98], "eps": 1e-6,
                  "warmup_steps": setting.steps // 8, "clip_grad_norm": None},
    }  # fmt: skip
    path = setting.folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def step_flops(setting: Setting, objectives: dict[str, Any]) -> float:
    """FLOPs of one of our steps, counted by torch while it runs: products and attention, forward and backward, the optimizer left out."""
    return float(Setting._python(STEP_FLOPS, write_recipe(setting, objectives)))


def train_ours(setting: Setting, objectives: dict[str, Any]) -> Run:
    """Our train.py; every objective reads the same pairs."""
    folder = setting.folder / "ours"
    shutil.rmtree(folder, ignore_errors=True)
    path = write_recipe(setting, objectives)
    log = folder / "metrics.jsonl"
    done = measured([sys.executable, str(ROOT / "train.py"), str(path)], _environment(), log, "samples_seen")
    losses = [json.loads(line)["clip/loss"] for line in log.read_text().splitlines()]
    weights = max((folder / "checkpoints").glob("step-*")) / "model.safetensors"
    return Run(losses, _speed(setting, done.seen), done.peak_mb, done.tree_mb, _parameters(weights))


def _parameters(path: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = 1
            for side in entry["shape"]:
                count *= side
            total += count
    return total


def check_same_work(setting: Setting) -> list[list[float]]:
    """Train CLIP with both on the same batch, step after step; returns both courses of the loss.

    Raises RuntimeError where the models differ in size, or the losses anywhere by more than crops explain.
    """
    ours, theirs = train_ours(setting.aligned(), {"clip": {}}), train_peer(setting.aligned())
    if ours.parameters != theirs.parameters:
        raise RuntimeError(f"different models: {ours.parameters:,} parameters against the peer's {theirs.parameters:,}")
    for step, (mine, their) in enumerate(zip(ours.losses, theirs.losses, strict=True)):
        if not abs(mine - their) < 0.1:
            raise RuntimeError(f"different training: at step {step} of the same batch the loss is {mine:.4f}, the peer's {their:.4f}")
    pairs = "  ".join(f"{a:.3f}/{b:.3f}" for a, b in zip(ours.losses, theirs.losses))
    print(f"same batch, ours/peer: {pairs}; {ours.parameters:,} parameters each", flush=True)
    return [ours.losses, theirs.losses]


def check_same_end(ours: Run, theirs: Run) -> None:
    """Raises RuntimeError where ours ended at a worse loss. Batches differ between the two, hence the margin."""
    if not ours.last < theirs.last + 0.15:
        raise RuntimeError(f"after the same samples the loss is {ours.last:.3f}, against the peer's {theirs.last:.3f}")
