"""Tables and figures of evaluators beyond their metrics, stored beside the run's results for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmpretrain.atomic import write_atomically
from mmpretrain.tracking.jsonl import file_name, jsonable
from mmpretrain.types import Result


def save_result_extras(run_dir: str | Path, name: str, step: int | None, result: Result) -> Path | None:
    """Write report/NAME-STEP.json (tables) and report/NAME-STEP.FIGURE.svg. None if the result has neither.

    name: the evaluator's name in the recipe. step: None for an evaluation outside training, which the report takes as the newest.
    A table named "predictions" has rows {key, truth, predicted, score, correct, thumbnail}, the thumbnail a PNG or JPEG in base64;
    for the form of a confusion table see `mmpretrain.report.tables.confusion`.
    """
    if not result.tables and not result.figures:
        return None
    folder = Path(run_dir) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    stem = file_name(name, step)
    figures = {}
    for title, figure in result.figures.items():
        path = folder / f"{stem}.{file_name(title, 0).removesuffix('-00000000')}.svg"
        figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
        figures[title] = path.name
    content = {"name": name, "step": step, "dataset": result.dataset, "n": result.n, "metrics": result.metrics}
    content |= {"tables": result.tables, "figures": figures}
    path = folder / f"{stem}.json"
    write_atomically(path, json.dumps(jsonable(content), ensure_ascii=False).encode("utf-8", "replace"))
    return path


def load_extras(run_dir: str | Path) -> list[dict[str, Any]]:
    """The newest extras of each evaluator, by name; unreadable files are left out. Figures come as SVG bytes."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(run_dir).glob("report/*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError, RecursionError):
            continue
        if not isinstance(content, dict) or not isinstance(content.get("tables", {}), dict):
            continue
        name = str(content.get("name", path.stem))
        if name in newest and _when(newest[name]) > _when(content):
            continue
        files = content.get("figures")
        figures = {}
        for title, file in files.items() if isinstance(files, dict) else ():
            figure = path.parent / Path(str(file)).name  # a name inside this folder, whatever the file says
            if figure.suffix == ".svg" and figure.is_file():
                figures[title] = figure.read_bytes()
        newest[name] = {"tables": {}, **content, "name": name, "figures": figures}
    return [newest[name] for name in sorted(newest)]


def _when(content: dict[str, Any]) -> float:
    step = content.get("step")
    return float(step) if isinstance(step, int | float) else float("inf")
