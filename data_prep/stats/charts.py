"""Histograms and curves as inline SVG, in the colours of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 16, 34


@dataclass(frozen=True)
class Bin:
    """One bar of a histogram."""

    low: float
    high: float  # exclusive
    count: int
    label: str


def nice_step(span: float, parts: int) -> float:
    """Chooses a step of 1, 2 or 5 times a power of ten that divides `span` into about `parts`."""
    raw = max(span, 1e-12) / parts
    power = 10.0 ** math.floor(math.log10(raw))
    return power * next(m for m in (1, 2, 5, 10) if m * power >= raw * 0.999)


def short(value: float) -> str:
    """Formats a number in about three digits: 1,234 -> "1.23k"."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"


def linear_bins(values: Mapping[int, int], max_bins: int = 32, keep: float = 0.995) -> list[Bin]:
    """Bins integers at equal widths.

    Args:
        values: value -> count.
        max_bins: approximate number of bins.
        keep: values beyond this quantile share one last bin, so that outliers do not flatten the others.
    """
    total, seen, cut = sum(values.values()), 0, max(values)
    for value in sorted(values):
        seen += values[value]
        if seen >= keep * total:
            cut = value
            break
    low = min(values)
    width = max(1, math.ceil(nice_step(cut - low + 1, max_bins)))
    start = low // width * width
    count = (cut - start) // width + 1
    counts = [0] * (count + 1)
    for value, n in values.items():
        counts[min((value - start) // width, count)] += n
    bins = []
    for i, n in enumerate(counts):
        lo = start + i * width
        label = f"{lo:,}" if width == 1 else f"{lo:,} to {lo + width - 1:,}"
        bins.append(Bin(lo, lo + width, n, label if i < count else f"{lo:,} or more"))
    return bins if counts[-1] else bins[:-1]


def log_bins(values: Mapping[int, int], steps: int, value_of: Callable[[int], float], label: Callable[[float, float], str]) -> list[Bin]:
    """Bins values at equal widths of their logarithm.

    Args:
        values: key -> count.
        steps: bins per doubling.
        value_of: key -> log2 of the value.
        label: (low, high) of a bin -> its label.
    """
    counts: dict[int, int] = {}
    for key, n in values.items():
        index = math.floor(value_of(key) * steps + 1e-9)
        counts[index] = counts.get(index, 0) + n
    edges = range(min(counts), max(counts) + 1)
    return [Bin(i / steps, (i + 1) / steps, counts.get(i, 0), label(2 ** (i / steps), 2 ** ((i + 1) / steps))) for i in edges]


def _frame(inner: list[str], label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}" class="plot">{"".join(inner)}</svg>'


def _y_axis(top: float) -> tuple[list[str], Callable[[float], float]]:
    step = nice_step(top, 3)
    ceiling = max(step * math.ceil(top / step - 1e-9), 1e-9)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / ceiling

    parts = []
    for i in range(round(ceiling / step) + 1):
        height = y(i * step)
        parts.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>')
        if step >= 1 or i == 0:
            parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{short(i * step)}</text>')
    return parts, y


def _spaced(ticks: Sequence[tuple[float, str]], min_gap: float = 34) -> list[tuple[float, str]]:
    """Selects ticks, (x, text), that do not overlap."""
    kept: list[tuple[float, str]] = []
    for position, text in ticks:
        if not kept or position - kept[-1][0] >= max(min_gap, 4 * (len(text) + len(kept[-1][1]))):
            kept.append((position, text))
    return kept


def _tick(position: float, text: str) -> str:
    """Draws a tick's text centred below x, or further left at the edge of the chart."""
    return f'<text x="{min(position, WIDTH - 3.5 * len(text)):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>'


def histogram(
    bins: Sequence[Bin],
    label: str,
    axis: str,
    ticks: Sequence[tuple[float, str]] | None = None,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Draws bars with tooltips.

    Args:
        bins: adjacent bins, ascending.
        label: description for screen readers.
        axis: title of the x axis.
        ticks: (value, text) below the axis; None: at round numbers.
        marks: (value, text) of dashed vertical lines.
    """
    low, high = bins[0].low, bins[-1].high
    if high - low < 8 * (bins[0].high - bins[0].low):  # few bins: bars of moderate width, centred
        spare = (8 * (bins[0].high - bins[0].low) - (high - low)) / 2
        low, high = low - spare, high + spare
    parts, y = _y_axis(max(b.count for b in bins))

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)

    for b in bins:
        if b.count:
            left, right, upper = x(b.low), x(b.high), min(y(b.count), HEIGHT - BOTTOM - 1)
            gap = 1 if right - left > 4 else 0
            tip = f"<title>{escape(b.label)}: {b.count:,}</title>"
            size = f'x="{left:.1f}" y="{upper:.1f}" width="{max(right - left - gap, 0.5):.1f}" height="{HEIGHT - BOTTOM - upper:.1f}"'
            parts.append(f'<rect class="b" {size}>{tip}</rect>')
    if ticks is None:
        step = max(1, nice_step(high - low, 6))
        first = math.ceil(low / step)
        ticks = [(i * step, f"{i * step:,.0f}") for i in range(first, math.floor(high / step) + 1) if i * step >= 0]
    for px, text in _spaced([(x(place), text) for place, text in ticks if low <= place <= high]):
        parts.append(f'<line class="g" x1="{px:.1f}" x2="{px:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>')
        parts.append(_tick(px, text))
    for place, text in marks:
        if low <= place <= high:
            px = x(place)
            anchor = "end" if px > WIDTH * 0.6 else "start"
            parts.append(f'<line class="m" x1="{px:.1f}" x2="{px:.1f}" y1="{TOP - 4}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(
                f'<text class="k" x="{px + (-4 if anchor == "end" else 4):.1f}" y="{TOP - 4}" text-anchor="{anchor}">{escape(text)}</text>'
            )
    parts.append(f'<text class="s" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(axis)}</text>')
    return _frame(parts, label)


def curve(points: Sequence[tuple[float, float]], label: str, axis: str) -> str:
    """Draws one line from (0, 0) through `points`."""
    parts, y = _y_axis(points[-1][1])
    right = points[-1][0]

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / right

    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in [(0.0, 0.0), *points])
    parts.append(f'<polyline class="c" points="{path}"/>')
    step = nice_step(right, 5)
    for position, text in _spaced([(x(i * step), short(i * step)) for i in range(math.floor(right / step) + 1)]):
        parts.append(_tick(position, text))
    parts.append(f'<text class="s" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(axis)}</text>')
    return _frame(parts, label)
