"""Contrastive loss with gradients at large batches, d = 512, fp32: our tiles against open_clip's ClipLoss, time and peak memory.

    python scripts/benchmarks/bench_contrastive_loss.py [--quick] [--rounds 2] [--out FILE]

Every case runs in a process of its own. Memory is what the case adds at its peak to the process that already holds the features. Loss and
gradients must agree. The peer needs about 18 bytes for each of B x B similarities: it is left out where that does not fit into memory.
"""

import json
import os
import sys
import time
from pathlib import Path

from common import Row, Spread, alternate, arguments, measured, ratio, record, threads

DIMENSIONS = 512


def case(which: str, size: int) -> None:
    """In the child: one forward and backward, after a small one that loads the kernels."""
    import torch

    from mmpretrain.functional import info_nce

    torch.set_num_threads(threads())
    torch.manual_seed(0)

    def features(rows: int) -> list[torch.Tensor]:
        shared = torch.randn(rows, DIMENSIONS)
        return [torch.nn.functional.normalize(shared + torch.randn(rows, DIMENSIONS), dim=1).requires_grad_() for _ in range(2)]

    def run(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        scale = torch.tensor(1 / 0.07)
        if which == "ours":
            loss = info_nce(a, b, scale)
        else:
            from open_clip.loss import ClipLoss

            loss = ClipLoss()(a, b, scale)
        loss.backward()
        return loss.detach()

    run(*features(64))
    a, b = features(size)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    started = time.perf_counter()
    loss = run(a, b)
    seconds = time.perf_counter() - started
    peak = resident("VmHWM")
    gradients = [t.grad for t in (a, b) if t.grad is not None]
    checks = [loss.item(), *(gradient.norm().item() for gradient in gradients), gradients[0][:4].sum().item()]
    print("RESULT" + json.dumps({"seconds": seconds, "mb": peak - before, "checks": checks}))


def resident(name: str = "VmRSS") -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def available_gb() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable"))


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--case":
        return case(sys.argv[2], int(sys.argv[3]))
    parsed = arguments(__doc__, rounds=2)
    if not os.access("/proc/self/clear_refs", os.W_OK):
        print("skipped: peak memory is read from /proc/self, which this system does not have")
        return
    sizes = [1024, 2048] if parsed.quick else [4096, 16384, 32768]
    judged = sizes[-2]
    memory: dict[int, float] = {}
    for size in sizes:
        sides = ["ours", "peer"]
        needed = 18 * size**2 / 2**30
        if needed > available_gb() - 2:
            print(f"B = {size:,}: the peer needs about {needed:.0f} GB, {available_gb():.0f} are free: ours alone")
            sides = ["ours"]
        results: dict[str, list[dict]] = {name: [] for name in sides}

        def run(name: str, size: int = size, results: dict[str, list[dict]] = results) -> float:
            done = measured([sys.executable, __file__, "--case", name, str(size)])
            results[name].append(json.loads(done.output.split("RESULT", 1)[1]))
            return results[name][-1]["seconds"]

        seconds = alternate({name: lambda name=name: run(name) for name in sides}, parsed.rounds if size < 32768 else 1)
        mb = {name: [r["mb"] for r in found] for name, found in results.items()}
        memory[size] = Spread.of(mb["ours"]).median
        ours = f"{Spread.of(seconds['ours'])} s, {Spread.of(mb['ours'])} MB"
        if "peer" not in sides:
            record(parsed, Row(f"contrastive_loss, B = {size:,}", ours, f"does not fit (about {needed:.0f} GB)", None, "", None))
            continue
        for mine, theirs in zip(results["ours"][0]["checks"], results["peer"][0]["checks"]):
            if not abs(mine - theirs) <= 1e-4 * max(1.0, abs(theirs)):
                raise RuntimeError(f"B = {size}: loss and gradients differ: {results['ours'][0]['checks']}, {results['peer'][0]['checks']}")
        faster, leaner = ratio(seconds["ours"], seconds["peer"], True), ratio(mb["ours"], mb["peer"], True)
        theirs = f"{Spread.of(seconds['peer'])} s, {Spread.of(mb['peer'])} MB"
        at = size == judged
        record(
            parsed,
            Row(
                f"contrastive_loss, B = {size:,}, speed",
                ours,
                theirs,
                faster,
                "at least 1.5x" if at else "",
                faster.median >= 1.5 if at else None,
            ),
        )
        record(
            parsed,
            Row(
                f"contrastive_loss, B = {size:,}, memory",
                ours,
                theirs,
                leaner,
                "at least 20x less" if at else "",
                leaner.median >= 20 if at else None,
            ),
        )
    small, large = sizes[-2:]
    growth = memory[large] / memory[small]
    row = Row(
        f"contrastive_loss, memory {small:,} -> {large:,}",
        f"{memory[small]:.0f} -> {memory[large]:.0f} MB",
        "quadratic",
        None,
        "linear: at most 2.5x for 2x",
        growth <= 2.5,
    )
    record(parsed, row)


if __name__ == "__main__":
    main()
