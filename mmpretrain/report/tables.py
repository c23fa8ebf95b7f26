"""Tables of the report, from the raw records of a run."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmpretrain.tracking.jsonl import latest_results

_FRACTION = re.compile(r"acc\d*$|recall|precision|f1|auc|mean_ap|\bmap|chance|purity|consistency|share", re.IGNORECASE)
_BASELINE = re.compile(r"(chance|random|majority|baseline|scratch)_(.+)")
_BASELINE_NAMES = {"random": "random weights", "scratch": "from scratch", "majority": "majority class"}
_BOUND = re.compile(r"(.+)_(low|high)")


def number(value: Any) -> float:
    """A JSON number, or NaN for null and anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def show(value: Any, metric: str = "") -> str:
    """A cell: fractions as percent, other numbers to four digits, null as a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int | float):
        if is_fraction(metric, value):
            return f"{100 * value:.1f} %"
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return str(value)


def is_fraction(metric: str, value: float) -> bool:
    return bool(_FRACTION.search(metric)) and 0 <= value <= 1


def baselines_of(line: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """metric -> {baseline: value}, from `random_acc1` beside `acc1`, a metric `chance`, or a field `baselines`.

    `baselines` is {"chance": 0.1}, which is for acc1, or {"chance": {"acc1": 0.1, "acc5": 0.5}}.
    """
    metrics = line.get("metrics") or {}
    found: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        if match := _BASELINE.fullmatch(key):
            if match[2] in metrics:
                found.setdefault(match[2], {})[match[1]] = number(value)
        elif key == "chance" and "acc1" in metrics:
            found.setdefault("acc1", {})["chance"] = number(value)
    given = line.get("baselines")
    for name, values in given.items() if isinstance(given, Mapping) else ():
        for metric, value in (values if isinstance(values, Mapping) else {"acc1": values}).items():
            found.setdefault(str(metric), {})[str(name)] = number(value)
    return found


def chance(metric: str, n: Any, num_classes: int | None) -> float:
    """What guessing scores: for accuracies over `num_classes` balanced classes, for recall@k among `n` images; NaN if not known."""
    if match := re.fullmatch(r"(?:image|text)_retrieval_recall@(\d+)", metric):
        k, among = int(match[1]), n
    elif match := re.fullmatch(r"acc(\d+)", metric):
        k, among = int(match[1]), num_classes
    elif metric in ("mean_per_class_recall", "binding_acc"):
        k, among = 1, num_classes if metric == "mean_per_class_recall" else 2  # binding: two captions a picture
    else:
        return math.nan
    return k / among if isinstance(among, int) and k < among else math.nan  # the best 5 of 4 are always right: nothing to compare


def headline(results: Sequence[Mapping[str, Any]], num_classes: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """One entry per evaluator and data set, from its last line: its metrics, each with baselines and interval if it has any.

    num_classes: evaluator's name -> classes of its data set, where known: from it follows what guessing would score.
    """
    groups = []
    for line in latest_results(results):
        metrics = {str(k): number(v) for k, v in (line.get("metrics") or {}).items()}
        baselines = baselines_of(line)
        beside = {f"{b}_{m}" for m, named in baselines.items() for b in named} | ({"chance"} if "acc1" in metrics else set())
        bounds = {k for k in metrics if (m := _BOUND.fullmatch(k)) and m[1] in metrics}
        rows = []
        for metric, value in metrics.items():
            if metric in beside or metric in bounds:
                continue
            fraction = is_fraction(metric, value)
            beside_it = dict(baselines.get(metric, {}))
            guess = chance(metric, line.get("n"), (num_classes or {}).get(str(line.get("name"))))
            if math.isfinite(guess):
                beside_it.setdefault("chance", guess)
            low, high = (metrics.get(f"{metric}_{end}", math.nan) for end in ("low", "high"))
            interval = f"{show(low, metric)} to {show(high, metric)}" if math.isfinite(low + high) else ""
            marks = [
                {
                    "name": _BASELINE_NAMES.get(name, name),
                    "text": show(base, metric),
                    "at": round(100 * base, 2) if fraction and 0 <= base <= 1 else None,
                }
                for name, base in beside_it.items()
            ]
            bar = round(100 * value, 2) if fraction else None
            rows.append({"metric": metric, "text": show(value, metric), "bar": bar, "baselines": marks, "interval": interval})
        groups.append({**{k: line.get(k) for k in ("name", "evaluator", "dataset", "n", "step", "seed")}, "rows": rows})
    return groups


def confusion(rows: Any, largest: int = 15) -> dict[str, Any] | None:
    """classes, counts [C, C] (rows: true) and the largest confusions; None if `rows` is not one row per true class:

    [{"true class": "cat", "cat": 9, "dog": 1}, ...], as `evaluators.metrics.confusion_tables` gives them.
    """
    try:
        classes = [str(r["true class"]) for r in rows]
        counts = np.array([[number(r[c]) for c in classes] for r in rows])
    except (KeyError, TypeError, AttributeError):
        return None
    if counts.shape != (len(classes), len(classes)) or not classes or not np.isfinite(counts).all():
        return None
    total = counts.sum(1)
    wrong = sorted(((counts[i, j], i, j) for i, j in np.argwhere(counts > 0) if i != j), key=lambda w: (-w[0], w[1], w[2]))
    top = [
        {"true": classes[i], "predicted": classes[j], "count": int(n), "share": f"{100 * n / total[i]:.0f} %"}
        for n, i, j in wrong[:largest]
    ]
    return {"classes": classes, "counts": counts, "top": top, "n": int(counts.sum()), "right": int(np.trace(counts))}


_PREDICTION = {"key": ("key",), "truth": ("truth", "label"), "predicted": ("predicted",), "score": ("score",)} | {
    "correct": ("correct", "right"),
    "thumbnail": ("thumbnail", "image"),
}


def are_predictions(rows: Any) -> bool:
    """Whether every row is one of {key, truth or label, predicted, score, correct or right, thumbnail or image}."""
    needed = [_PREDICTION[name] for name in ("truth", "predicted", "correct")]
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        return False
    return all(any(name in row for name in names) for row in rows for names in needed)


def predictions(rows: Sequence[Mapping[str, Any]], each: int = 18) -> dict[str, Any]:
    """At most `each` examples that are right and as many that are wrong, thumbnails as data addresses."""
    shown: dict[str, Any] = {"right": [], "wrong": []}
    counts: Counter[str] = Counter()
    for row in rows:
        example = {name: next((row[n] for n in names if n in row), None) for name, names in _PREDICTION.items()}
        side = "right" if example["correct"] else "wrong"
        counts[side] += 1
        if counts[side] <= each:
            score = example["score"]
            example["score"] = f"{score:.2f}" if isinstance(score, float) else "" if score is None else show(score)
            shown[side].append({**example, "image": thumbnail(example["thumbnail"])})
    return {**shown, "num_right": counts["right"], "num_wrong": counts["wrong"]}


def thumbnail(text: Any) -> str | None:
    """Base64 of a PNG or JPEG -> its data address; None for anything else."""
    if not isinstance(text, str):
        return None
    try:
        content = base64.b64decode(text.split(",", 1)[1] if text.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError, IndexError):
        return None
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg" if content.startswith(b"\xff\xd8") else None
    return kind and f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def plain_table(rows: Any, max_rows: int = 50) -> dict[str, Any] | None:
    """Convert a list of dicts to columns and text cells, at most `max_rows` rows, without thumbnails."""
    if not isinstance(rows, list) or not rows or not all(isinstance(r, Mapping) for r in rows):
        return None
    columns = [c for c in dict.fromkeys(k for row in rows for k in row) if c not in ("thumbnail", "image")][:30]
    cells = [[show(row.get(c), str(c)) for c in columns] for row in rows[:max_rows]]
    return {"columns": columns, "rows": cells, "total": len(rows)}


def data_summary(data: Any) -> list[dict[str, Any]]:
    """source -> {shards, samples, rows_per_step, epochs_seen, skipped, captions}; any other number or text is shown as well."""
    sources = []
    for name, facts in data.items() if isinstance(data, Mapping) else ():
        if isinstance(facts, Mapping):
            shown = {str(k).replace("_", " "): show(v) for k, v in facts.items() if isinstance(v, str | int | float)}
            captions = facts.get("captions") or facts.get("example_captions") or []
            sources.append({"name": name, "facts": shown, "captions": [str(c) for c in captions][:10]})
    return sources


def skipped_summary(records: Sequence[Mapping[str, Any]], max_rows: int = 50) -> dict[str, Any]:
    counts = Counter((str(r.get("source", "")), str(r.get("reason", ""))) for r in records)
    by_reason = [{"source": s, "reason": reason, "count": n} for (s, reason), n in counts.most_common()]
    return {"total": len(records), "counts": plain_table(by_reason, 200), "first": plain_table([dict(r) for r in records], max_rows)}


def costs(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What each objective takes alone and adds to the others: medians over the run's measurements."""
    found: dict[str, list[float]] = {}
    for line in metrics:
        for name, value in line.items():
            if name.rpartition("/")[2].startswith("cost_"):
                found.setdefault(name, []).append(number(value))
    medians = {name: float(np.nanmedian(values)) for name, values in found.items()}
    if "cost_s" not in medians:
        return None
    whole = {"objective": "all together", "seconds alone": medians["cost_s"], "alone": "100 %", "added to the others": ""}
    rows = [whole | {"activations kept, MB": medians.get("cost_memory_mb")}]
    for name in dict.fromkeys(n.rpartition("/")[0] for n in medians if "/" in n):
        # Fractions of medians: a pass is short, and one measurement of it noisy.
        alone, without = (medians.get(f"{name}/{key}") for key in ("cost_alone_s", "cost_without_s"))
        if alone is None or without is None:  # measured by a version that wrote other numbers
            continue
        added = max(0.0, 1 - without / medians["cost_s"])
        row = {"objective": name, "seconds alone": alone, "alone": f"{100 * alone / medians['cost_s']:.0f} %"}
        row["added to the others"] = f"{100 * added:.0f} %"
        rows.insert(-1, row | {"activations kept, MB": medians.get(f"{name}/cost_memory_mb")})
    return plain_table(rows)
