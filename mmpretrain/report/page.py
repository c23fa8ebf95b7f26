"""The page of the report: the records of a run folder, notes on what needs attention, and the template."""

from __future__ import annotations

import base64
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from mmpretrain.atomic import write_atomically
from mmpretrain.report import plots, tables
from mmpretrain.report.extras import load_extras
from mmpretrain.tracking.console import duration
from mmpretrain.tracking.jsonl import read_jsonl

_NOT_SCALARS = {"step", "samples_seen", "samples_per_s", "data_wait_s", "step_s", "lr"}


def write_report(run_dir: str | Path, summary: Mapping[str, Any] | None = None) -> Path:
    """Write RUN/report.html, one file that needs nothing else, from what lies in the run folder; whatever is missing is left out.

    summary (all optional): "name"; "data": source -> {shards, samples, rows_per_step, epochs_seen, skipped, captions};
        "versions": package -> version; every other number or text becomes a fact at the top ("device", "parameters", ...).
    """
    run_dir, summary = Path(run_dir), dict(summary or {})
    metrics = read_jsonl(run_dir / "metrics.jsonl", strict=False)
    results = read_jsonl(run_dir / "results.jsonl", strict=False)
    skipped = read_jsonl(run_dir / "skipped.jsonl", strict=False)
    config = run_dir / "config.yaml"
    config_text = config.read_text(encoding="utf-8", errors="replace") if config.exists() else ""
    extras = [_extra(content) for content in load_extras(run_dir)]
    headline = tables.headline(results, {e["name"]: len(e["confusions"][0]["classes"]) for e in extras if e["confusions"]})
    context = {
        "name": str(summary.get("name") or run_dir.resolve().name),
        "facts": _facts(metrics, summary),
        "notes": _notes(metrics, headline, skipped),
        "headline": headline,
        "over_time": _results_over_time(results),
        "losses": _loss_charts(metrics),
        "speed": _speed_charts(metrics),
        "costs": tables.costs(metrics),
        "others": _other_charts(metrics),
        "pictures": _pictures(run_dir / "images"),
        "extras": extras,
        "data": tables.data_summary(summary.get("data")),
        "skipped": tables.skipped_summary(skipped),
        "config": config_text,
        "versions": _versions(config_text, summary),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["count"] = tables.show
    path = run_dir / "report.html"
    # A lone surrogate in a caption cannot be encoded: a question mark rather than no report.
    write_atomically(path, environment.get_template("report.html.jinja").render(context).encode("utf-8", "replace"))
    return path


def _column(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """steps and values of one scalar, over the lines that have it; null is NaN."""
    lines = [line for line in metrics if name in line and math.isfinite(tables.number(line.get("step")))]
    return np.array([line["step"] for line in lines], float), np.array([tables.number(line[name]) for line in lines], float)


def _scalars(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(k for line in metrics for k in line)
    return [name for name in names if name not in _NOT_SCALARS and not name.rpartition("/")[2].startswith("cost_")]


def _losses(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in _scalars(metrics) if name == "loss" or name.endswith("/loss")]


def _facts(metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    if metrics:
        facts["steps"] = tables.show(metrics[-1].get("step"))
        facts["samples seen"] = tables.show(metrics[-1].get("samples_seen"))
        steps, took = _column(metrics, "step_s")
        if len(took):
            inside = float(np.nansum(took * np.diff(steps, prepend=0)))
            facts["time in steps"] = duration(inside)
            _, probes = _column(metrics, "cost_probe_s")
            if len(probes) and inside > 0:
                facts["measuring costs adds"] = f"{100 * np.nansum(probes) / inside:.1f} %"
    _, rate = _column(metrics, "samples_per_s")
    if np.isfinite(rate).any():
        facts["samples/s, median"] = f"{np.nanmedian(rate):,.0f}"
    _, share = _wait_share(metrics)
    if np.isfinite(share).any():
        facts["waiting for data"] = f"{100 * np.nanmedian(share):.1f} %"
    _, loss = _column(metrics, "loss")
    if len(loss := loss[np.isfinite(loss)]) > 1:
        facts["loss, first to last"] = f"{loss[0]:.4g} → {loss[-max(len(loss) // 50, 1) :].mean():.4g}"
    shown = {k: v for k, v in summary.items() if k != "name" and isinstance(v, str | int | float)}
    return facts | {str(k).replace("_", " "): tables.show(v) for k, v in shown.items()}


def _wait_share(metrics: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    lines = [line for line in metrics if tables.number(line.get("step_s")) > 0 and "data_wait_s" in line]
    steps, wait = _column(lines, "data_wait_s")
    return steps, wait / np.array([tables.number(line["step_s"]) for line in lines if math.isfinite(tables.number(line.get("step")))])


def _notes(metrics: Sequence[Mapping[str, Any]], headline: Sequence[Mapping[str, Any]], skipped: Sequence) -> list[str]:
    """What a reader should look at first."""
    notes = []
    if not metrics:
        notes.append("No step was logged: the run stopped before its first line in metrics.jsonl.")
    for name in _losses(metrics):
        steps, values = _column(metrics, name)
        if len(bad := steps[~np.isfinite(values)]):
            notes.append(f"{name} was not finite in {len(bad)} of {len(values)} logged steps, first at step {bad[0]:.0f}.")
    _, share = _wait_share(metrics)
    if np.isfinite(share).any() and np.nanmedian(share) > 0.2:
        notes.append(
            f"{100 * np.nanmedian(share):.0f} % of the time went into waiting for data: give the loader more threads or smaller images."
        )
    for group in headline:
        for row in group["rows"]:
            for mark in row["baselines"]:
                ceiling = mark["name"].startswith(("supervised", "ceiling"))  # what cannot be expected to be reached
                if not ceiling and row["bar"] is not None and mark["at"] is not None and row["bar"] <= mark["at"]:
                    notes.append(f"{group['name']}: {row['metric']} of {row['text']} is no better than {mark['name']} ({mark['text']}).")
    if skipped:
        notes.append(f"{len(skipped):,} samples were skipped; the reasons are under “Skipped samples”.")
    return notes


def _chart(title: str, steps: np.ndarray, values: np.ndarray, **options: Any) -> dict[str, Any]:
    draw = {title: (steps, values)}
    log = None
    if plots.suits_log(values):
        log = plots.curves(draw, f"{title}, logarithmic", log_y=True, **options)
    finite = values[np.isfinite(values)]
    last = tables.show(float(finite[-1])) if len(finite) else "never finite"
    return {"title": title, "svg": plots.curves(draw, title, **options), "log": log, "last": last}


def _loss_charts(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [_chart(name, *_column(metrics, name), smoothed=True) for name in _losses(metrics)]


def _speed_charts(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    charts = []
    for title, name in (("learning rate", "lr"), ("samples per second", "samples_per_s")):
        steps, values = _column(metrics, name)
        if np.isfinite(values).any():
            charts.append(
                {
                    "title": title,
                    "svg": plots.curves({title: (steps, values)}, title, smoothed=name != "lr", from_zero=True),
                    "log": None,
                    "last": "",
                }
            )
    steps, share = _wait_share(metrics)
    if np.isfinite(share).any():
        title = "share of the step spent waiting for data"
        charts.append(
            {
                "title": title,
                "svg": plots.curves({title: (steps, share)}, title, smoothed=True, percent=True, from_zero=True),
                "log": None,
                "last": "",
            }
        )
    return charts


def _other_charts(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    names = [name for name in _scalars(metrics) if name not in _losses(metrics)]
    columns = ((name, *_column(metrics, name)) for name in names)
    return [_chart(name, steps, values, smoothed=True) for name, steps, values in columns if np.isfinite(values).any()][:60]


def _results_over_time(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A chart for each evaluator that ran at two steps or more: its fractions, or else its first metric."""
    lines = defaultdict(list)
    for line in results:
        if math.isfinite(tables.number(line.get("step"))) and isinstance(line.get("metrics"), dict):
            lines[str(line.get("name"))].append(line)
    charts = []
    for name, group in lines.items():
        if len({line["step"] for line in group}) < 2:
            continue
        rows = [row for g in tables.headline(group) for row in g["rows"]]
        fractions = [row["metric"] for row in rows if row["bar"] is not None][:5]
        chosen = fractions or [row["metric"] for row in rows][:1]
        series = {}
        for metric in chosen:
            points = [(line["step"], tables.number(line["metrics"].get(metric))) for line in group]
            series[metric] = tuple(zip(*points))
        base = tables.baselines_of(group[-1]).get(chosen[0], {}) if chosen else {}
        marks = {f"{k} ({chosen[0]})": v for k, v in base.items() if math.isfinite(v)}
        svg = plots.curves(series, f"{name} over training", percent=bool(fractions), baselines=marks)
        charts.append({"title": name, "svg": svg, "log": None, "last": ""})
    return charts


def _pictures(folder: Path) -> list[dict[str, Any]]:
    """Collect images/NAME-STEP.png: for each name the newest picture, and the first for comparison."""
    versions_of = defaultdict(list)
    for path in sorted(folder.glob("*.png")):
        if match := re.fullmatch(r"(.+)-(\d{8,}|final)\.png", path.name):
            versions_of[match[1]].append((math.inf if match[2] == "final" else int(match[2]), path))
    pictures = []
    for name, versions in sorted(versions_of.items()):
        versions.sort()
        chosen = versions[-1:] + versions[:1] * (len(versions) > 1)
        shown = [
            {"step": "the end" if math.isinf(step) else f"step {step:,}", "data": base64.b64encode(path.read_bytes()).decode()}
            for step, path in chosen
        ]
        pictures.append({"name": name, "shown": shown, "reconstruction": "reconstruction" in name.lower()})
    return pictures


def _extra(content: Mapping[str, Any]) -> dict[str, Any]:
    """One evaluator's confusion matrices, example predictions, curves, figures, and whatever other tables it has."""
    extra: dict[str, Any] = {"name": content["name"], "step": content.get("step"), "confusions": [], "predictions": None}
    extra |= {"charts": [], "tables": {}, "figures": {k: base64.b64encode(svg).decode() for k, svg in content["figures"].items()}}
    covered = set()
    for title, rows in content["tables"].items():
        matrix = tables.confusion(rows) if title.endswith(("confusion", "confusion_matrix")) else None
        if matrix:
            label = title.replace("_", " ").removesuffix(" matrix").capitalize() + " matrix"
            picture = plots.heat_map(matrix["classes"], matrix["counts"], f"{content['name']}: {label}")
            extra["confusions"].append({**matrix, "title": label, "svg": picture, "top": tables.plain_table(matrix["top"])})
            covered.add(title.removesuffix("_matrix") + "s")  # the evaluator's own list of the largest is the same
        elif title in ("predictions", "examples") and tables.are_predictions(rows):
            extra["predictions"] = tables.predictions(rows)
        elif chart := _curve(f"{content['name']}: {title}", rows):
            extra["charts"].append(chart)
        elif table := tables.plain_table(rows):
            extra["tables"][title] = table
    extra["tables"] = {title: table for title, table in extra["tables"].items() if title not in covered}
    return extra


def _curve(title: str, rows: Any) -> dict[str, Any] | None:
    """A chart of rows {"step": ..., one number: ...}, such as the loss of a fine-tuning."""
    if not isinstance(rows, list) or len(rows) < 2 or not all(isinstance(r, Mapping) and len(r) == 2 and "step" in r for r in rows):
        return None
    name = next(k for k in rows[0] if k != "step")
    steps, values = (np.array([tables.number(row.get(k)) for row in rows]) for k in ("step", name))
    return _chart(title, steps, values, smoothed=True) if np.isfinite(steps).all() else None


def _versions(config_text: str, summary: Mapping[str, Any]) -> dict[str, str]:
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        config = None
    versions: dict[str, Any] = {}
    for place in (config, summary):
        for key in ("environment", "versions"):
            if isinstance(place, Mapping) and isinstance(place.get(key), Mapping):
                versions |= place[key]
    return {str(k): str(v) for k, v in versions.items()}
