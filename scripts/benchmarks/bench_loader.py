"""Shards to normalised float32 batches on two cores, images/s: our loader with two workers, webdataset with two worker processes.

    python scripts/benchmarks/bench_loader.py [--quick] [--rounds 2] [--out FILE]

JPEGs of 500x375 to 224 pixels and of 128x128 to 64, with CLIP's view (a crop of 90 to 100%) and with SimCLR's two. The peers decode and
transform with PIL, and with torchvision on tensors. All three must give the same pictures where nothing is random, and batches of the same
mean and deviation where crops are. Queues are empty while the clock runs, since nothing else is done with a batch.
"""

import io
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pictures
import torch
import views
from common import Row, alternate, arguments, formatted, ratio, record, threads
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from webdataset.compat import WebDataset, WebLoader

from mmpretrain.data.loader import Loader
from mmpretrain.data.source import Source, SourceConfig
from mmpretrain.data.views import CenterView
from mmpretrain.launch import keep_freed_memory

BATCH = 64
WORKERS = 2


def with_pil(data: bytes, transform: Callable, copies: int) -> list[torch.Tensor]:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return [transform(image) for _ in range(copies)]


def with_torchvision(data: bytes, transform: Callable, copies: int) -> list[torch.Tensor]:
    image = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return [transform(image) for _ in range(copies)]


def stack(samples: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    return [torch.stack(view) for view in zip(*samples)]


def peer_batches(folder: Path, make: Callable[[bytes], list[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    """As open_clip reads: shards, shuffle, decode, transform, batch, each in `WORKERS` processes."""
    pattern = str(folder / "{00000..00003}.tar")
    data: Any = WebDataset(pattern, shardshuffle=False, resampled=True)
    data = data.shuffle(256, initial=64).to_tuple("jpg").map_tuple(make).map(lambda row: row[0]).batched(BATCH, collation_fn=stack)
    return iter(WebLoader(data, batch_size=None, num_workers=WORKERS))


def our_batches(folder: Path, specs: list) -> tuple[Iterator[list[torch.Tensor]], Callable[[], None]]:
    source = Source("pairs", SourceConfig(shards=str(folder / "*.tar"), batch_size=BATCH), specs)
    loader = Loader({"pairs": source}, threads=WORKERS)
    return ([batch["pairs"].views[spec].data for spec in specs] for batch in loader), loader.close


def speed(batches: Iterator[list[torch.Tensor]], seconds: float, warmup: int) -> tuple[float, torch.Tensor]:
    """Images/s, and [mean, deviation] over the batches that were timed."""
    for _ in range(warmup):
        next(batches)
    count, kept = 0, []
    started = time.perf_counter()
    while (took := time.perf_counter() - started) < seconds or count < 3 * BATCH:
        batch = next(batches)
        count += len(batch[0])
        if len(kept) < 4:
            kept.append(batch)
    flat = torch.cat([view for batch in kept for view in batch])
    if flat.dtype != torch.float32 or flat.ndim != 4:
        raise RuntimeError(f"expected float32 [B,3,H,W], found {flat.dtype} {tuple(flat.shape)}")
    return count / took, torch.stack([flat.mean(), flat.std()])


def check_pictures(folder: Path, size: int) -> None:
    """The evaluation view of every sample of a batch, ours and PIL's. Raises RuntimeError where they differ by more than rounding."""
    batches, close = our_batches(folder, [CenterView(size=size)])
    found = next(batches)[0]
    close()
    plain = views.central(size)
    files: Any = WebDataset(str(folder / "00000.tar"), shardshuffle=False).to_tuple("jpg")
    theirs = torch.stack([plain(Image.open(io.BytesIO(data)).convert("RGB")) for (data,), _ in zip(files, range(64))])
    nearest = torch.stack([(theirs - image).abs().mean((1, 2, 3)).min() for image in found])
    if not nearest.max() < 0.05:  # in standard deviations of a pixel; 0.02 is one level of 255
        raise RuntimeError(f"our pictures differ from PIL's by up to {nearest.max():.3f} on average")


def main() -> None:
    parsed = arguments(__doc__, rounds=2)
    keep_freed_memory()  # as train.py does
    torch.set_num_threads(threads())
    seconds, count = (0.5, 256) if parsed.quick else (4.0, 1024)
    for width, height, size in ((500, 375, 224), (128, 128, 64)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "shards"
            each = pictures.write(folder, width, height, count)
            check_pictures(folder, size)
            for simclr in (False, True):
                specs, copies = views.ours(size, simclr), 1 + simclr
                moments: dict[str, torch.Tensor] = {}

                def run(which: str, folder=folder, size=size, simclr=simclr, specs=specs, copies=copies, moments=moments) -> float:
                    if which == "ours":
                        batches, close = our_batches(folder, specs)
                        rate, moments[which] = speed(batches, seconds, 4)
                        close()
                        return rate
                    decode = with_pil if which == "pil" else with_torchvision
                    transform = views.pil(size, simclr) if which == "pil" else views.tensors(size, simclr)
                    rate, moments[which] = speed(peer_batches(folder, partial(decode, transform=transform, copies=copies)), seconds, 4)
                    return rate

                found = alternate({which: partial(run, which) for which in ("ours", "pil", "torchvision")}, parsed.rounds)
                for which in ("pil", "torchvision"):
                    if not (moments["ours"] - moments[which]).abs().max() < 0.15:
                        raise RuntimeError(
                            f"batches differ: mean and deviation {moments['ours'].tolist()}, {which} {moments[which].tolist()}"
                        )
                what = f"{width}x{height} -> {size}" + (", two SimCLR views" if simclr else "")
                for which, least in (("pil", 3.5), ("torchvision", 1.3)):
                    times = ratio(found["ours"], found[which])
                    rates = formatted(found["ours"], found[which], "images/s")
                    title = f"loader, {what}, against webdataset + {'PIL' if which == 'pil' else 'torchvision'}"
                    record(parsed, Row(title, *rates, times, f"at least {least:g}x", times.median >= least, {"jpeg_bytes": each}))


if __name__ == "__main__":
    main()
