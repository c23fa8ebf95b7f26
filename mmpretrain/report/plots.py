"""Curves and heat maps as inline SVG whose text and lines take the page's colours, light or dark."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.colors
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# Colours that no plot uses otherwise; each becomes a CSS colour in the finished SVG.
_TEXT, _GRID, _BAD = "#010101", "#020202", "#030303"
_SERIES = [f"#0{i}0404" for i in range(1, 7)]
_CSS = {_TEXT: "currentColor", _GRID: "var(--grid)", _BAD: "var(--bad)"} | {c: f"var(--series{i})" for i, c in enumerate(_SERIES, 1)}
_STYLE: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mmpretrain",
    "text.parse_math": False,  # names come from recipes and shards: a "$" is a dollar
    "font.size": 10,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "grid.color": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
Values = Sequence[float] | np.ndarray
MAX_POINTS = 400  # what a chart of this width can show


def smooth(y: np.ndarray, window: float) -> np.ndarray:
    """Mean over `window` points around each, fewer towards the ends but as many on each side: no lag. NaN is passed over."""
    index = np.arange(len(y))
    half = np.minimum(np.minimum(index, index[::-1]), int(window) // 2)
    finite = np.isfinite(y)
    total, count = (np.concatenate([[0], np.cumsum(v)]) for v in (np.where(finite, y, 0.0), finite))
    n = count[index + half + 1] - count[index - half]
    return np.where(n > 0, (total[index + half + 1] - total[index - half]) / np.maximum(n, 1), np.nan)


def thin(x: np.ndarray, y: np.ndarray, points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most 2 * points of the curve: the lowest and the highest value of each bin, so that no spike is lost."""
    if len(x) <= 2 * points:
        return x, y
    keep = []
    for part in np.array_split(np.arange(len(x)), points):
        finite = part[np.isfinite(y[part])]
        keep += sorted({finite[np.argmin(y[finite])], finite[np.argmax(y[finite])]}) if len(finite) else [part[0]]
    return x[keep], y[keep]


def suits_log(values: Values) -> bool:
    """Positive throughout and spanning more than a factor of 10."""
    y = np.asarray([v for v in values if np.isfinite(v)], dtype=float)
    return len(y) > 2 and bool(y.min() > 0) and y.max() / y.min() > 10


def curves(
    series: Mapping[str, tuple[Values, Values]],
    label: str,
    log_y: bool = False,
    smoothed: bool = False,
    percent: bool = False,
    from_zero: bool = False,
    baselines: Mapping[str, float] | None = None,
) -> str:
    """series: name -> (steps, values); NaN leaves a gap and a cross on the axis. -> `<svg>...</svg>`."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for i, (name, (steps, values)) in enumerate(series.items()):
            colour = _SERIES[i % len(_SERIES)]
            x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
            bad = ~np.isfinite(y)
            if smoothed and len(x) >= 20:
                axes.plot(*thin(x, y), color=colour, linewidth=0.8, alpha=0.35)
                axes.plot(*thin(x, smooth(y, len(x) / 25)), color=colour, linewidth=2, label=name)
            else:
                marker = "o" if len(x) <= 30 else None
                axes.plot(*thin(x, y), color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=name)
            if bad.any():
                axes.plot(x[bad][:100], np.full(min(bad.sum(), 100), 0.03), "x", color=_BAD, transform=axes.get_xaxis_transform())
        for i, (name, value) in enumerate((baselines or {}).items()):
            axes.axhline(value, color=_TEXT, linewidth=1, linestyle=("--", ":", "-.")[i % 3], label=name)
        if log_y:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5), numticks=9))
            axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")  # the usual one writes mathematics, which is off
            axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        if percent:
            axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.3g} %")
        elif not log_y:
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=False)
        axes.xaxis.set_major_formatter(lambda v, _: _count(v))
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.grid(axis="y", linewidth=0.6)
        if len(series) > 1 or baselines:
            figure.legend(loc="outside lower center", frameon=False, fontsize=9, ncols=2)
        return _svg(figure, label)


def heat_map(classes: Sequence[str], counts: np.ndarray, label: str) -> str:
    """counts [C, C], rows the true classes, each shaded by its share of the row. Names up to 40 classes, numbers up to 14."""
    counts = np.asarray(counts, dtype=float)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(3.2 + 0.32 * len(classes), 9)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(size, size), layout="constrained")
        axes = figure.add_subplot()
        shade = matplotlib.colors.LinearSegmentedColormap.from_list("shade", [(0.16, 0.42, 0.8, 0.0), (0.16, 0.42, 0.8, 1.0)])
        axes.imshow(share**0.6, cmap=shade, vmin=0, vmax=1, interpolation="nearest")  # the power lifts rare confusions into sight
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        if len(classes) <= 40:
            names = [c if len(c) <= 20 else c[:19] + "…" for c in map(str, classes)]
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
        if len(classes) <= 14:
            for i, j in np.argwhere(counts > 0):
                colour = "#ffffff" if share[i, j] > 0.5 else _TEXT
                axes.text(j, i, f"{counts[i, j]:.0f}", ha="center", va="center", fontsize=8, color=colour)
        return _svg(figure, label)


def _count(value: float) -> str:
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit * 10 or (abs(value) >= unit and value % unit == 0):
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _svg(figure: Figure, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    box = text.partition('viewBox="')[2].partition('"')[0]
    title = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    text = re.sub(r"<svg[^>]*>", lambda _: f'<svg viewBox="{box}" role="img" aria-label="{title}">', text, count=1)
    text = re.sub(r"<style.*?</style>|font-family: [^;\"]*;?", "", text, flags=re.DOTALL)  # else it would style the whole page
    own = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=4).hexdigest()
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>s{own}-", text)  # two charts on a page must not share an id
    for sentinel, colour in _CSS.items():
        text = text.replace(sentinel, colour)
    return text
