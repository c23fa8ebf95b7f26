"""CLIP + SimCLR (two views) + masked image (60% replaced) + masked text on N pairs, ours, against open_clip's trainer on CLIP alone.

    python scripts/benchmarks/bench_combined_step.py [--quick] [--rounds 2] [--precision auto|fp32|bf16] [--out FILE]

The same model, shards, batch, precision and start as bench_train_step. "All views apart" encodes four images a pair: CLIP's, SimCLR's two
and the masked one. "SimCLR's view reused" takes SimCLR's first view as CLIP's image, hence three.
"""

import tempfile
from pathlib import Path

from common import Row, Spread, alternate, arguments, capped, formatted, ratio, record
from trainers import SMALL, TINY, Run, Setting, check_same_work, step_flops, train_ours, train_peer

REST = {"simclr": {"weight": 0.3}, "simmim": {"weight": 0.3, "mask_ratio": 0.6}, "masked_text": {"weight": 0.1}}
OURS = {"all views apart": {"clip": {}} | REST, "SimCLR's view reused": {"clip": {"augment": "simclr"}} | REST}


def main() -> None:
    parsed = arguments(__doc__, rounds=2, steps=0, precision="auto")
    with tempfile.TemporaryDirectory() as folder:
        if parsed.quick:
            setting = Setting(Path(folder), TINY, batch=16, steps=parsed.steps or 12, warmup=4, samples=512)
        else:
            setting = Setting(Path(folder), SMALL, batch=64, steps=parsed.steps or 16, warmup=4, samples=4000)
        setting.prepare()
        setting = setting.on_this_machine(parsed.precision)
        check_same_work(setting)
        runs: dict[str, list[Run]] = {"peer": [], **{name: [] for name in OURS}}

        def train(name: str) -> float:
            run = train_ours(setting, OURS[name]) if name in OURS else train_peer(setting)
            runs[name].append(run)
            print(
                f"{name}: {run.samples_per_s:.1f} pairs/s, CLIP's loss {run.losses[0]:.3f} -> {run.last:.3f}, {run.peak_mb:.0f} MB",
                flush=True,
            )
            return run.samples_per_s

        flops = {name: step_flops(setting, objectives) for name, objectives in OURS.items()}
        found = alternate({name: lambda name=name: train(name) for name in runs}, parsed.rounds)
    for name in OURS:
        times = ratio(found[name], found["peer"])
        ours, peer = formatted(found[name], found["peer"], "pairs/s")
        reached = setting.share_of_peak(flops[name], Spread.of(found[name]).median)
        ours += f"; {reached}"
        counts = name == "all views apart"
        figures = {
            which: {"peak_mb": [r.peak_mb for r in runs[which]], "clip_loss": [r.last for r in runs[which]]} for which in (name, "peer")
        }
        figures |= {"precision": setting.precision, "peak_gflops": setting.peak_gflops, "step_gflop": flops[name] / 1e9}
        target, met = ("at least 1x", times.median >= 1) if counts else ("", None)
        record(parsed, Row(f"combined_step, {name}, {setting.precision}{capped()}", ours, peer, times, target, met, figures))


if __name__ == "__main__":
    main()
