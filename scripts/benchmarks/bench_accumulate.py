"""One CLIP step of 1,024 pairs as 16 chunks of 64 against one direct batch: time, memory, gradients.

    python scripts/benchmarks/bench_accumulate.py [--quick] [--rounds 2] [--out FILE]

ViT-Ti/16 at 112 px with 12 text layers, bf16, each case in a process of its own; memory is what the step adds at its peak. Gradients are
compared in fp32, where only the order of sums differs, on a smaller batch; in bf16 their relative distance is given as a figure.
"""

import json
import sys
import time
from pathlib import Path

from bench_contrastive_loss import resident
from common import Row, Spread, alternate, arguments, measured, ratio, record, threads
from trainers import SMALL, TINY


def case(size: str, batch: int, chunks: int, bf16: bool, out: str) -> None:
    """In the child: gradients of one step, after one that warms up. Writes them to `out` where it is given."""
    import torch

    from mmpretrain.assembly import build_model
    from mmpretrain.config.recipe import assemble
    from mmpretrain.data.text import get_tokenizer, trim
    from mmpretrain.launch import keep_freed_memory
    from mmpretrain.types import Rows, View

    torch.set_num_threads(threads())
    keep_freed_memory()
    towers = SMALL if size == "small" else TINY
    recipe = {"steps": 1, "model": towers, "sources": {"pairs": {"shards": "none"}}, "objectives": {"clip": {"source": "pairs"}}}
    model, _ = build_model(assemble(recipe))
    tokenizer = get_tokenizer()
    words = ("circle", "star", "heart", "ring", "moon", "arrow")
    captions = [f"a picture of a {words[i % 6]} number {i} left of a large red {words[i % 5]}" for i in range(batch)]
    torch.manual_seed(0)
    side = towers["vision_cfg"]["image_size"]
    views = {}
    for spec in model.views()["pairs"]:
        ids = trim(tokenizer.encode(captions, towers["text_cfg"]["context_length"]), tokenizer.eot)
        views[spec] = View(torch.randn(batch, 3, side, side) if spec.modality == "image" else ids)
    rows = Rows([str(i) for i in range(batch)], torch.arange(batch), {}, views)

    def step(part: Rows, chunks: int) -> float:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if chunks == 1:
                loss, _ = model({"pairs": part})
            else:
                loss, _ = model.backward_in_chunks({"pairs": part}, chunks, torch.Tensor.backward)
        if chunks == 1:
            loss.backward()
        return loss.item()

    few = min(32, batch)
    small = Rows(rows.keys[:few], rows.seeds[:few], {}, {s: View(v.data[:few]) for s, v in views.items()})
    step(small, 2 if chunks > 1 else 1)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    loss = step(rows, chunks)
    seconds = time.perf_counter() - started
    mb = resident("VmHWM") - before
    if out:
        torch.save({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, out)
    print("RESULT" + json.dumps({"seconds": seconds, "mb": mb, "loss": loss}))


def distance(first: Path, second: Path) -> tuple[float, int]:
    """|a - b| / |b| over all gradients, and how many tensors there are."""
    import torch

    a, b = (torch.load(path, weights_only=True) for path in (first, second))
    if a.keys() != b.keys():
        raise RuntimeError(f"gradients of different parameters: {sorted(a.keys() ^ b.keys())[:5]}")
    apart = sum((a[k] - b[k]).double().square().sum() for k in a)
    return float((apart / sum(b[k].double().square().sum() for k in b)) ** 0.5), len(a)


def main() -> None:
    if sys.argv[1:2] == ["--case"]:
        size, batch, chunks, bf16, out = sys.argv[2:7]
        return case(size, int(batch), int(chunks), bf16 == "bf16", out)
    parsed = arguments(__doc__, rounds=2)
    import tempfile

    size, batch, chunks = ("tiny", 64, 4) if parsed.quick else ("small", 1024, 16)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results: dict[str, list[dict]] = {"chunks": [], "direct": []}

        def run(which: str, size: str, batch: int, chunks: int, kind: str) -> dict:
            out = str(folder / f"{which}-{kind}.pt")
            words = [size, str(batch), str(chunks if which == "chunks" else 1), kind, out]
            done = measured([sys.executable, __file__, "--case", *words])
            return json.loads(done.output.split("RESULT", 1)[1])

        def timed(which: str) -> float:
            results[which].append(run(which, size, batch, chunks, "bf16"))
            return results[which][-1]["seconds"]

        seconds = alternate({which: lambda which=which: timed(which) for which in results}, parsed.rounds)
        for which in results:
            run(which, size, 64, 4, "fp32")
        exact, tensors = distance(folder / "chunks-fp32.pt", folder / "direct-fp32.pt")
        rounded, _ = distance(folder / "chunks-bf16.pt", folder / "direct-bf16.pt")
    if not exact < 1e-4:
        raise RuntimeError(f"gradients in chunks differ from the direct batch's by {exact:.2e} of their norm, in fp32")
    speed = ratio(seconds["chunks"], seconds["direct"], less_is_better=True)
    mb = {which: [r["mb"] for r in found] for which, found in results.items()}
    memory = ratio(mb["chunks"], mb["direct"], less_is_better=True)
    title = f"accumulate, {batch:,} as {chunks} x {batch // chunks}"
    texts = {which: (f"{Spread.of(seconds[which])} s", f"{Spread.of(mb[which])} MB") for which in results}
    record(parsed, Row(f"{title}, speed", texts["chunks"][0], texts["direct"][0], speed, "at least 0.75x", speed.median >= 0.75))
    record(parsed, Row(f"{title}, memory", texts["chunks"][1], texts["direct"][1], memory, "at least 6x less", memory.median >= 6))
    figures = {"fp32": exact, "bf16": rounded, "tensors": tensors}
    record(
        parsed,
        Row(
            f"{title}, gradients",
            f"{exact:.1e} of the norm apart in fp32, {rounded:.1e} in bf16",
            "0",
            None,
            "equal: 1e-4 in fp32",
            exact < 1e-4,
            figures,
        ),
    )


if __name__ == "__main__":
    main()
