"""SimCLR views/s on one core from decoded images: ours, a batch at a time, against torchvision's transforms on PIL images.

    python scripts/benchmarks/bench_augment.py [--quick] [--rounds 5] [--out FILE]

500x375 to 224 and 128x128 to 64: crop, flip, colour jitter, greyscale, blur, normalisation, with SimCLR's probabilities on both sides.
Mean, deviation and the share of grey images must agree: both draw the same distribution, but for hue in YIQ and one clamp rather than
several.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pictures
import torch
import views
from common import Row, alternate, arguments, formatted, ratio, record

from mmpretrain.data import buffers
from mmpretrain.launch import keep_freed_memory
from mmpretrain.types import Sample


def moments(images: torch.Tensor) -> torch.Tensor:
    """[mean, deviation, share of grey images] of normalised [B,3,H,W]."""
    mean, std = torch.tensor(views.MEAN)[:, None, None], torch.tensor(views.STD)[:, None, None]
    colour = images * std + mean
    grey = ((colour - colour.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 0.02).float().mean()
    return torch.stack([images.mean(), images.std(), grey])


def main() -> None:
    parsed = arguments(__doc__, rounds=5)
    keep_freed_memory()  # as train.py does
    torch.set_num_threads(1)
    for width, height, size in ((500, 375, 224), (128, 128, 64)):
        count = (32 if parsed.quick else 256) if size == 224 else (128 if parsed.quick else 1024)
        decoded = [pictures.picture(width, height, seed) for seed in range(64)]
        rows = [Sample(str(i), torch.from_numpy(np.array(image)).permute(2, 0, 1)) for i, image in enumerate(decoded)]
        spec, transform = views.ours(size, simclr=True)[0], views.pil(size, simclr=True)
        drawn = 0

        def ours(count=count, rows=rows, spec=spec) -> Iterator[torch.Tensor]:
            nonlocal drawn
            for _ in range(0, count, len(rows)):
                seeds = torch.arange(drawn, drawn + len(rows))
                drawn += len(rows)
                params = spec.draw(rows, seeds)
                each = zip(*(value.unbind(0) for value in params.values()))
                cut = (spec.geometry(sample.image, dict(zip(params, values))) for sample, values in zip(rows, each))
                yield spec.render(buffers.stack(cut, len(rows)), params).data

        def theirs(count=count, decoded=decoded, transform=transform) -> Iterator[torch.Tensor]:
            for _ in range(0, count, len(decoded)):
                yield torch.stack([transform(image) for image in decoded])

        def speed(batches: Callable[[], Iterator[torch.Tensor]], count=count) -> float:
            started = time.perf_counter()
            for _ in batches():
                pass
            return count / (time.perf_counter() - started)

        means = {name: moments(torch.cat([batch.clone() for batch in make()])) for name, make in (("ours", ours), ("PIL", theirs))}  # warm
        speeds = alternate({"ours": partial(speed, ours), "PIL": partial(speed, theirs)}, parsed.rounds)
        allowed = torch.tensor([0.25, 0.25, 0.3]) * (2 if parsed.quick else 1)
        if not ((means["ours"] - means["PIL"]).abs() < allowed).all():
            raise RuntimeError(f"the views differ: [mean, deviation, grey] is {means['ours'].tolist()}, PIL's {means['PIL'].tolist()}")
        times = ratio(speeds["ours"], speeds["PIL"])
        rates = formatted(speeds["ours"], speeds["PIL"], "views/s")
        figures = {name: value.tolist() for name, value in means.items()}
        record(parsed, Row(f"augment, {width}x{height} -> {size}", *rates, times, "at least 4x", times.median >= 4, figures))


if __name__ == "__main__":
    main()
