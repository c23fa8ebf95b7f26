"""Step time, communication and storage reads for 8 to 1,024 GPUs and 10M to 10B pairs: the arithmetic of docs/scaling.md.

    python scripts/benchmarks/scaling_model.py [--write]      # prints the tables; --write puts them into the page

Every constant stands below with where it comes from. The index's size is measured as the page is made.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench_gpu_train_step import flops_per_pair
from common import ROOT

PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- tables: python scripts/benchmarks/scaling_model.py --write -->", "<!-- end of tables -->"

MODEL = {  # ViT-B/16
    "vision_cfg": {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12},
    "text_cfg": {"width": 512, "layers": 12},
}
PARAMETERS = 149.6e6  # of that model in open_clip
EMBED = 512
TEXT_TOKENS = 32  # a batch's longest caption, trimmed
PEAK = 989e12  # H100 SXM, dense bf16, FLOP/s (NVIDIA's data sheet)
PEAK_FP32 = 67e12  # H100 SXM, fp32, FLOP/s (the same): the loss stays in fp32
MFU = 0.35  # assumed: between open_clip's 13% on A100 and the 40% that bench_gpu_train_step asks for
NVLINK = 450e9 * 0.8  # bytes/s a GPU and direction within a node (900 GB/s both ways, NVIDIA's data sheet), 80% of it
NETWORK = 50e9 * 0.8  # bytes/s a GPU between nodes: one 400 Gb/s NDR port each (ConnectX-7's data sheet), 80% of it
LATENCY = 20e-6  # seconds of a collective, and again 5e-6 for each doubling of the GPUs: assumed
PER_NODE = 8
STORAGE_NIC = 12.5e9  # bytes/s a node from storage: a 100 Gb/s port
PAIR_BYTES = 42e3  # a 40 KB JPEG, a caption, tar headers and padding (pictures.py makes such files)
PER_SHARD = 10_000
DECODE = 575.0  # images/s a core, 500x375 -> 224, decode and one crop (measured: bench_loader, two cores give 1,050 to 1,190)
CORES = 14  # a GPU, on a host of 112
WINDOW = 16  # shards whose samples are mixed (the default of shuffle_window)
READ_AHEAD = 2  # windows


@dataclass
class Step:
    """Seconds of one step on `gpus` GPUs with `rows` pairs each."""

    gpus: int
    rows: int

    @property
    def batch(self) -> int:
        return self.gpus * self.rows

    @property
    def bandwidth(self) -> float:
        return NVLINK if self.gpus <= PER_NODE else NETWORK

    def collective(self, sent: float) -> float:
        return sent / self.bandwidth + LATENCY + 5e-6 * (self.gpus.bit_length() - 1)

    @property
    def towers(self) -> float:
        return self.rows * flops_per_pair(MODEL, TEXT_TOKENS) / (PEAK * MFU)

    @property
    def loss(self) -> float:
        """Tiles of similarities: one product forward, three backward, at half the fp32 peak."""
        return 4 * 2 * self.rows * self.batch * EMBED / (PEAK_FP32 / 2)

    @property
    def gradients(self) -> float:
        """Ring all-reduce of fp32 gradients, 2 (N-1)/N of their bytes a GPU."""
        return self.collective(2 * (self.gpus - 1) / self.gpus * 4 * PARAMETERS)

    @property
    def exposed(self) -> float:
        """What of it the backward pass, two thirds of the towers' time, does not hide; the last bucket of 25 MB never is."""
        last = self.collective(2 * 25e6)
        return max(last, self.gradients - 2 / 3 * self.towers)

    @property
    def features(self) -> float:
        """Gather of the text features in fp32, and the reduce-scatter of their gradient."""
        return 2 * self.collective((self.gpus - 1) / self.gpus * 4 * self.batch * EMBED)

    @property
    def columns_bytes(self) -> float:
        """The column sums: an all-to-all of [world, rows] floats a rank."""
        return 4.0 * self.batch

    @property
    def columns(self) -> float:
        return 2 * self.collective((self.gpus - 1) / self.gpus * self.columns_bytes)

    @property
    def seconds(self) -> float:
        return self.towers + self.loss + self.exposed + self.features + self.columns

    @property
    def pairs_per_s(self) -> float:
        return self.batch / self.seconds

    @property
    def efficiency(self) -> float:
        return self.towers / self.seconds


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def steps(cases: list[tuple[int, int]]) -> str:
    head = [
        "GPUs",
        "global batch",
        "towers, ms",
        "loss, ms",
        "gradients exposed, ms",
        "features, ms",
        "column sums, ms (MB held)",
        "step, ms",
    ]
    head += ["of ideal", "pairs/s", "cores a GPU to decode"]
    rows = []
    for gpus, each in cases:
        s = Step(gpus, each)
        columns = f"{ms(s.columns)} ({s.columns_bytes / 1e6:,.0f})"
        row = [f"{gpus:,}", f"{s.batch:,}", ms(s.towers), ms(s.loss), ms(s.exposed), ms(s.features), columns, ms(s.seconds)]
        rows.append([*row, f"{s.efficiency:.0%}", f"{s.pairs_per_s:,.0f}", f"{s.pairs_per_s / gpus / DECODE:.1f} of {CORES}"])
    return table(head, rows)


def reads(cases: list[tuple[int, int]]) -> str:
    head = [
        "GPUs",
        "nodes",
        "bytes trained on, GB/s",
        "a node, its own part, GB/s",
        "a node, whole shards, GB/s",
        "storage, whole shards, GB/s",
    ]
    head += ["limit by the node's port"]
    rows = []
    for gpus, each in cases:
        used = Step(gpus, each).pairs_per_s * PAIR_BYTES
        nodes = max(1, gpus // PER_NODE)
        verdict = "holds" if used <= STORAGE_NIC else f"at {STORAGE_NIC / used:.0%} of the speed"
        numbers = [used, used / nodes, used, used * nodes]
        rows.append([f"{gpus:,}", f"{nodes:,}", *[f"{value / 1e9:,.3g}" for value in numbers], verdict])
    return table(head, rows)


def index_bytes() -> tuple[float, float]:
    """Bytes a sample of a shard's index, with and without checksums, for an image and a caption each."""
    from data_prep.records import Record
    from data_prep.shards.serial import write_shards
    from mmpretrain.data import index

    with tempfile.TemporaryDirectory() as name:
        write_shards((Record(f"{i:09d}", {"jpg": b"x" * 40, "txt": b"y"}) for i in range(2000)), Path(name) / "a")
        saved = index.index_path(Path(name) / "a" / "00000.tar")
        with_sums = saved.stat().st_size
        found = index.scan(Path(name) / "a" / "00000.tar")
        index.save(found, Path(name) / "plain.npz")
        return with_sums / 2000, (Path(name) / "plain.npz").stat().st_size / 2000


def sizes() -> str:
    with_sums, _ = index_bytes()
    head = [
        "pairs",
        "shards",
        "shards, TB",
        "an index, MB",
        "all indexes, GB",
        "sizes.json, MB",
        "order, MB a process",
        "window and read-ahead, GB",
    ]
    head += ["epoch on 64 GPUs", "epoch on 1,024 GPUs"]
    rows = []
    for pairs in (10**7, 10**8, 10**9, 10**10):
        shards = pairs // PER_SHARD
        # counts, first, and for each of two epochs shards and ends: int64; and six windows' permutations
        order = (2 + 2 * 2) * 8 * shards + 6 * 8 * WINDOW * PER_SHARD
        hours = [pairs / Step(gpus, 256).pairs_per_s / 3600 for gpus in (64, 1024)]
        shown = [f"{h * 60:.1f} min" if h < 1 else f"{h:.1f} h" for h in hours]
        held = READ_AHEAD * WINDOW * PER_SHARD * PAIR_BYTES
        row = [f"{pairs:,}", f"{shards:,}", f"{pairs * PAIR_BYTES / 1e12:.3g}", f"{with_sums * PER_SHARD / 1e6:.2g}"]
        row += [f"{with_sums * pairs / 1e9:,.3g}", f"{shards * 20 / 1e6:.3g}", f"{order / 1e6:.3g}", f"{held / 1e9:.3g}"]
        rows.append([*row, *shown])
    return table(head, rows)


def tables() -> str:
    weak = [(n, 256) for n in (8, 16, 64, 256, 1024)]
    strong = [(n, 32768 // n) for n in (8, 64, 256, 1024)]
    with_sums, without = index_bytes()
    return "\n".join(
        [
            BEGIN, "", "256 pairs a GPU:", "", steps(weak), "", "32,768 pairs a step:", "", steps(strong), "",
            "Reads, 256 pairs a GPU:", "", reads(weak), "", "Data:", "", sizes(), "",
            f"An index takes {with_sums:.0f} bytes a sample of an image and a caption, {without:.0f} without checksums.", "", END,
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    text = tables()
    if not parser.parse_args().write:
        print(text)
        return
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + text + after)
    print(f"{PAGE} written")


if __name__ == "__main__":
    main()
