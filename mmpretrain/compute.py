"""The choice of precision for this device: measured on a CPU, known on an accelerator."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from torch import Tensor

Precision = Literal["fp32", "bf16"]
MIN_GAIN = 1.25  # least speed-up of products for which bf16 is chosen: it has fewer digits and costs casts
FLOPS = 1 << 28  # of one product, within 256 to 2,048 rows: 2 ms at 130 GFLOP/s, and as compute-bound as a step
EMULATED = 4.0  # bf16 that takes this many times as long for a product of few rows is emulated, and not measured further
DEFAULT_WIDTH = 768  # of a recipe that states none: ViT-B
MAX_WIDTH = 1024  # of a measured product; wider ones gain as much


@dataclass(frozen=True)
class Rates:
    """Speed of a linear layer's products (forward and both gradients) in GFLOP/s, on one thread."""

    width: int
    fp32: float
    bf16: float


@dataclass(frozen=True)
class Choice:
    """A chosen precision, the reason, and the measured rates (None: not measured)."""

    precision: Precision
    reason: str
    rates: Rates | None = None


def products(x: Tensor, weight: Tensor, grad: Tensor) -> None:
    """Compute a linear layer's products of one step: [R, D] x [4D, D], the gradients of the input and of the weight."""
    torch.nn.functional.linear(x, weight)
    torch.matmul(grad, weight)
    torch.matmul(grad.mT, x)


def product_rows(width: int) -> int:
    """Return the rows of the measured products: FLOPS each, within bounds."""
    return max(256, min(2048, FLOPS // (8 * width * width)))


@torch.no_grad()
def best_seconds(operands: dict[torch.dtype, tuple[Tensor, Tensor, Tensor]], min_rounds: int, ends: float) -> dict[torch.dtype, float]:
    """Time the products of each precision in turn, and return the shortest time of each.

    Args:
        operands: dtype -> input, weight, gradient.
        min_rounds: least number of rounds.
        ends: repeat until this time of `time.perf_counter`.
    """
    best = dict.fromkeys(operands, float("inf"))
    rounds = 0
    while rounds < min_rounds or time.perf_counter() < ends:
        for dtype, of_dtype in operands.items():
            started = time.perf_counter()
            products(*of_dtype)
            best[dtype] = min(best[dtype], time.perf_counter() - started)
        rounds += 1
    return best


def product_rates(width: int = DEFAULT_WIDTH, seconds: float = 0.1, min_rounds: int = 3) -> Rates:
    """Measure fp32 and bf16 products alternately, on one thread.

    A busy machine slows some rounds and not others, so the best round of each precision counts. Several threads could
    be slowed in all rounds, since each product waits for its last thread. A round of few rows comes first: it warms
    up, and detects emulated bf16.

    Args:
        width: D, of the model.
        seconds: total time, plus one round.
        min_rounds: rounds of each precision, however long they take.
    """
    generator = torch.Generator().manual_seed(0)  # the global generator stays as it is
    rows = product_rows(width)
    x, weight, grad = (torch.randn(a, b, generator=generator) for a, b in ((rows, width), (4 * width, width), (rows, 4 * width)))
    operands = {dtype: (x.to(dtype), weight.to(dtype), grad.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    few = {dtype: (x[: rows // 16], weight, grad[: rows // 16]) for dtype, (x, weight, grad) in operands.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ends = time.perf_counter() + seconds
        best = best_seconds(few, 2, 0.0)
        if best[torch.bfloat16] > EMULATED * best[torch.float32]:
            rows //= 16
        else:
            best_seconds(operands, 1, 0.0)  # warms the caches
            best = best_seconds(operands, min_rounds, ends)
    finally:
        torch.set_num_threads(threads)
    flops = 3 * 2 * rows * width * 4 * width
    return Rates(width, flops / best[torch.float32] / 1e9, flops / best[torch.bfloat16] / 1e9)


def measured_choice(rates: Rates) -> Choice:
    """Choose bf16 where its products are at least MIN_GAIN times as fast as those of fp32."""
    precision: Precision = "bf16" if rates.bf16 >= MIN_GAIN * rates.fp32 else "fp32"
    figures = f"products of width {rates.width} reach {rates.fp32:.0f} GFLOP/s in fp32 and {rates.bf16:.0f} in bf16 on one thread"
    return Choice(precision, f"precision {precision}: {figures}", rates)


def choose_precision(width: int = DEFAULT_WIDTH) -> Choice:
    """Choose the precision for this device: on CUDA bf16 since Ampere, on MPS fp32, on a CPU the faster one as measured."""
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16", "precision bf16: the GPU computes in it")
        return Choice("fp32", "precision fp32: the GPU does not compute in bf16")
    if torch.backends.mps.is_available():
        return Choice("fp32", "precision fp32: MPS gains nothing from bf16")
    return measured_choice(product_rates(min(width, MAX_WIDTH)))


def model_width(model: str | dict[str, Any]) -> int:
    """Return the width of a recipe's image tower, else of its text tower; DEFAULT_WIDTH where neither is known.

    Args:
        model: as in a recipe: fields, a JSON file or folder of open_clip's format, or a name.
    """
    fields: Any = model
    if isinstance(model, str):
        name = model.removeprefix("open_clip:").removeprefix("local-dir:")
        file = Path(name) / "open_clip_config.json" if Path(name).is_dir() else Path(name)
        try:
            if file.suffix == ".json":
                fields = json.loads(file.read_text(encoding="utf-8"))
            else:
                fields = None if ":" in name else open_clip.get_model_config(name.replace("/", "-"))
        except (OSError, ValueError, RecursionError):  # building the model reports it
            fields = None
    if isinstance(fields, dict):
        fields = fields.get("model_cfg", fields)
    for tower in ("vision_cfg", "text_cfg"):
        part = fields.get(tower) if isinstance(fields, dict) else None
        width = part.get("width") if isinstance(part, dict) else None
        if isinstance(width, int) and 0 < width <= 1 << 14:
            return width
    return DEFAULT_WIDTH
