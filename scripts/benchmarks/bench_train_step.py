"""CLIP training, ours against open_clip's trainer as it comes and with its slow attention kernel turned off.

    python scripts/benchmarks/bench_train_step.py [--quick] [--rounds 2] [--precision auto|fp32|bf16] [--out FILE]

Both train ViT-Ti/16 at 112 px with a text tower of 12 layers in the precision that is the faster here, from the same
weights, on the same shards of demo scenes with their captions, in processes of their own, alternately. Beforehand
both train a few steps on one and the same batch: parameter counts and the course of the loss must agree. At the end
ours must stand at no worse a loss. Samples/s are read off the wall clock between the log lines of steps; the share of
the peak is that of our products and attention, counted as executed, in this machine's best product of the same
precision. ONEDNN_MAX_CPU_ISA=AVX512_CORE makes a lesser CPU of one with AMX. Memory is that of the trainer's process,
and that of all with the loader's, pages that they share counted once.
"""

import tempfile
from pathlib import Path

from common import Row, Spread, alternate, arguments, capped, formatted, ratio, record
from trainers import SMALL, TINY, Run, Setting, check_same_end, check_same_work, step_flops, train_ours, train_peer


def main() -> None:
    parsed = arguments(__doc__, rounds=2, steps=0, precision="auto")
    with tempfile.TemporaryDirectory() as folder:
        if parsed.quick:
            setting = Setting(Path(folder), TINY, batch=16, steps=parsed.steps or 16, warmup=4, samples=512)
        else:
            setting = Setting(Path(folder), SMALL, batch=64, steps=parsed.steps or 24, warmup=4, samples=4000)
        setting.prepare()
        setting = setting.on_this_machine(parsed.precision)
        flops = step_flops(setting, {"clip": {}})
        courses = check_same_work(setting)
        runs: dict[str, list[Run]] = {"ours": [], "peer": [], "switched": []}

        def train(name: str) -> float:
            run = train_ours(setting, {"clip": {}}) if name == "ours" else train_peer(setting, switch=name == "switched")
            runs[name].append(run)
            print(
                f"{name}: {run.samples_per_s:.1f} samples/s, loss {run.losses[0]:.3f} -> {run.last:.3f}, {run.peak_mb:.0f} MB", flush=True
            )
            return run.samples_per_s

        found = alternate({name: lambda name=name: train(name) for name in runs}, parsed.rounds)
    ours = runs["ours"]
    reached = setting.share_of_peak(flops, Spread.of(found["ours"]).median)
    print(f"ours: {reached}", flush=True)
    kind = f", {setting.precision}{capped()}"
    for name, title, least in (("peer", "as it comes", 3.0), ("switched", "with the attention switch", 2.0)):
        for mine, theirs in zip(ours, runs[name]):
            if not parsed.quick:
                check_same_end(mine, theirs)
        times = ratio(found["ours"], found[name])
        figures = {
            "parameters": ours[0].parameters,
            "precision": setting.precision,
            "peak_gflops": setting.peak_gflops,
            "step_gflop": flops / 1e9,
            "same_batch": courses,
            "losses": {"ours": [r.losses for r in ours], "peer": [r.losses for r in runs[name]]},
        }
        our_rate, peer_rate = formatted(found["ours"], found[name], "samples/s")
        row, target = f"train_step, {title}{kind}", f"at least {least:g}x"
        record(parsed, Row(row, f"{our_rate}; {reached}", peer_rate, times, target, times.median >= least, figures))
    for title, of in (("", lambda run: run.peak_mb), (", all processes", lambda run: run.tree_mb)):
        our_peaks, peer_peaks = ([of(run) for run in runs[name]] for name in ("ours", "peer"))
        memory = ratio(our_peaks, peer_peaks, less_is_better=True)
        texts = formatted(our_peaks, peer_peaks, "MB")
        record(parsed, Row(f"train_step, peak memory{title}{kind}", *texts, memory, "not higher", memory.median >= 1))


if __name__ == "__main__":
    main()
