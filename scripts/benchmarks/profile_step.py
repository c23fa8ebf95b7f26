"""Where the time of a training step goes, and how far it is from what the machine can do.

    python scripts/benchmarks/profile_step.py [configs/demo.yaml] [key=value ...] [--steps 20] [--threads 2]

The recipe's shards must exist. Steps are timed first without, then with torch's profiler, which only serves to divide the time. The limits
are measured in the same call: a large matrix product in the step's precision, and a copy of memory too large for the caches.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext

from common import ROOT, threads

KINDS = {  # the first that fits: part of an operator's name -> what it is
    "optimizer": ("adam", "sgd", "vector_norm", "foreach_norm"),
    "attention products and softmax": ("bmm", "softmax", "scaled_dot_product"),
    "matrix products": ("aten::mm", "addmm", "linear", "mkldnn", "convolution", "matmul"),
    "norms, GELU, residuals": ("layer_norm", "gelu", "aten::add", "aten::mul", "batch_norm"),
    "embedding": ("embedding", "index", "gather", "scatter", "fill_", "zero"),
    "copies and casts": ("copy_", "aten::cat", "contiguous", "clone", "_to_copy", "stack"),
}


def kind_of(operator: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in operator for part in parts)), "everything else")


def limits(dtype, device: str = "cpu") -> tuple[float, float]:
    """GFLOP/s of a product of 2048 x 2048 matrices, and GB/s of a copy (read and write counted)."""
    import torch

    a, b = (torch.randn(2048, 2048, dtype=dtype, device=device) for _ in range(2))
    x = torch.randn(1 << 26, device=device)
    y = torch.empty_like(x)

    def best(run, rounds: int = 8) -> float:
        times = []
        for _ in range(rounds):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
        return min(times)

    return 2 * 2048**3 / best(lambda: a @ b) / 1e9, 2 * x.nbytes / best(lambda: y.copy_(x)) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "configs" / "demo.yaml"))
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=threads())
    arguments = parser.parse_args()

    import torch
    from torch.profiler import ProfilerActivity, profile

    from mmpretrain import launch
    from mmpretrain.assembly import build_model, build_sources, layers
    from mmpretrain.batch import first_rows
    from mmpretrain.compute import choose_precision, model_width
    from mmpretrain.config import recipe as recipes
    from mmpretrain.data.loader import Loader
    from mmpretrain.model import freeze_unused
    from mmpretrain.optim import build_optimizer, parameter_groups

    config = recipes.load(arguments.recipe, arguments.overrides)
    launch.keep_freed_memory()
    torch.set_num_threads(arguments.threads)
    if config.precision == "auto":
        config.precision = choose_precision(model_width(config.model)).precision
    bf16 = config.precision == "bf16"
    model, _ = build_model(config)
    sources = build_sources(config, model)
    loader = Loader(sources, threads=1, processes=False)  # in this process, whose CPU time is read below
    taken = iter(loader)
    batches = [next(taken) for _ in range(4)]
    cpu, wall = time.process_time(), time.perf_counter()
    batches += [next(taken) for _ in range(16)]
    loading = (time.process_time() - cpu) / 16
    loading_wall = (time.perf_counter() - wall) / 16
    loader.close()

    def autocast():
        return torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()

    with autocast():
        freeze_unused(model, first_rows(batches[0], 4))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(parameter_groups(named, config.optim, layers(model.towers)), config.optim)
    phases = dict.fromkeys(("forward", "backward", "clip and optimizer"), 0.0)

    def step(batch) -> None:
        times = [time.perf_counter()]
        with autocast():
            loss, _ = model(batch)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_([p for _, p in named], config.optim.clip_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        for name, a, b in zip(phases, times, times[1:]):
            phases[name] += b - a

    for i in range(5):
        step(batches[i])
    phases.update(dict.fromkeys(phases, 0.0))
    for i in range(arguments.steps):
        step(batches[i % len(batches)])
    timed = {name: value / arguments.steps for name, value in phases.items()}  # without the profiler
    whole = sum(timed.values())
    with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
        for i in range(5):
            step(batches[i])
    spent: dict[str, float] = {}
    flops = product_time = 0.0
    for event in profiler.key_averages():
        kind = kind_of(event.key)
        spent[kind] = spent.get(kind, 0.0) + event.self_cpu_time_total
        if event.flops and kind in ("matrix products", "attention products and softmax"):
            flops += event.flops / 5
    everything = sum(spent.values())
    product_time = whole * spent.get("matrix products", 0.0) / everything
    peak, bandwidth = limits(torch.bfloat16 if bf16 else torch.float32)

    print(f"{arguments.recipe}: {arguments.threads} thread(s), {'bf16' if bf16 else 'fp32'}")
    print(f"step without the loader: {1e3 * whole:.1f} ms; " + ", ".join(f"{name} {1e3 * value:.1f}" for name, value in timed.items()))
    print(f"loader, one thread: {1e3 * loading_wall:.1f} ms a step ({1e3 * loading:.1f} of CPU)")
    for kind, value in sorted(spent.items(), key=lambda item: -item[1]):
        print(f"  {kind:32} {100 * value / everything:5.1f}%  {1e3 * whole * value / everything:7.1f} ms")
    moved = 28 * sum(p.numel() for _, p in named) / 1e9  # AdamW reads weight, gradient and two moments, writes three of them
    print(
        f"matrix products: {flops / 1e9:.1f} GFLOP a step, {flops / 1e9 / product_time:.0f} GFLOP/s in them; this machine's best {peak:.0f}"
    )
    print(f"all of these at that best: {1e3 * flops / 1e9 / peak:.1f} ms; ", end="")
    print(f"the optimizer's {moved:.2f} GB at {bandwidth:.0f} GB/s: {1e3 * moved / bandwidth:.1f} ms")


if __name__ == "__main__":
    main()
