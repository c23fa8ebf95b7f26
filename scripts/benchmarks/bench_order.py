"""The order of 10 billion samples in a million shards: time to the first slots and after a resume, memory of the process.

    python scripts/benchmarks/bench_order.py [--quick] [--rounds 3] [--out FILE]

"Order" is the pure function from slots to samples; "shard set" adds what a source does with a million remote names before its first batch:
the names, the counts stated in sizes.json, the order. Start-up is to take less than 5 s, and the process less than 200 MB for it.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

from bench_contrastive_loss import resident
from common import Row, Spread, arguments, measured, record


def case(which: str, shards: int, folder: str) -> None:
    """In the child. Memory is what is added to the process that has imported everything."""
    import numpy as np

    from mmpretrain.data.cache import ShardCache
    from mmpretrain.data.order import Order
    from mmpretrain.data.shards import ShardSet

    per_shard, batch = 10_000, 32_768
    Order(np.full(64, 8), seed=0).locate(np.arange(100))
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")
    started = time.perf_counter()
    if which == "order":
        counts = np.full(shards, per_shard, np.int64)
    else:
        found = ShardSet(f"local://{folder}/{{000000..{shards - 1:06d}}}.tar", None, 16, ShardCache(Path(folder) / "cache"), False)
        counts = found.counts
    order = Order(counts, seed=0)
    first = order.locate(np.arange(batch))
    start_s = time.perf_counter() - started
    slot = 3 * order.total + order.total // 2 + 12_345  # a cursor is a slot: in the middle of the fourth epoch
    started = time.perf_counter()
    resumed = Order(counts, seed=0).locate(np.arange(slot, slot + batch))
    resume_s = time.perf_counter() - started
    started = time.perf_counter()
    for at in range(20):
        order.locate(np.arange((at + 1) * batch, (at + 2) * batch))
    step_ms = (time.perf_counter() - started) / 20 * 1000
    again = order.locate(np.arange(slot, slot + batch))
    assert order.total == shards * per_shard
    assert (resumed.epoch == 3).all()
    assert all((a == b).all() for a, b in zip(resumed, again)), "a resumed order must be the same"
    pairs = first.shard * per_shard + first.sample
    assert len(np.unique(pairs)) == batch, "no sample comes twice in an epoch"
    print(
        "RESULT"
        + json.dumps(
            {"start_s": start_s, "resume_s": resume_s, "step_ms": step_ms, "mb": resident("VmHWM") - before, "mb_at_start": before}
        )
    )


def main() -> None:
    if sys.argv[1:2] == ["--case"]:
        return case(sys.argv[2], int(sys.argv[3]), sys.argv[4])
    parsed = arguments(__doc__, rounds=3)
    shards = 20_000 if parsed.quick else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sizes.json").write_text(json.dumps({f"{i:06d}.tar": 10_000 for i in range(shards)}))
        for which, title in (("order", "order"), ("shards", "shard set and order")):
            found = []
            for _ in range(parsed.rounds if which == "order" else 1):
                done = measured([sys.executable, __file__, "--case", which, str(shards), folder])
                found.append(json.loads(done.output.split("RESULT", 1)[1]) | {"process_mb": done.peak_mb})
            seconds, resume, mb = (Spread.of([one[key] for one in found]) for key in ("start_s", "resume_s", "mb"))
            step = Spread.of([one["step_ms"] for one in found])
            row = f"order of {shards * 10_000:,} samples in {shards:,} shards: {title}"
            told = f"{seconds} s to the first 32,768 slots, {resume} s after a resume, then {step} ms for so many; {mb} MB"
            record(parsed, Row(row, told, "-", None, "under 5 s and 200 MB", seconds.median < 5 and mb.median < 200, {"runs": found}))


if __name__ == "__main__":
    main()
