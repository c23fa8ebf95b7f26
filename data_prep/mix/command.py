"""The command `mix`: epochs, tokens, repeats and expected time of a recipe's data mixture, before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_prep.cli import input_errors
from mmpretrain.errors import MMPretrainError, file_errors

if TYPE_CHECKING:
    from mmpretrain.config.recipe import Config
    from mmpretrain.data.source import Source
    from mmpretrain.model import PretrainModel


def mix_of(config: Config, samples_per_s: float | None = None) -> dict[str, Any]:
    """Describes the data mixture of a recipe as plain data.

    Args:
        config: the recipe.
        samples_per_s: rows per second; None: as measured in the recipe's run_dir.

    Returns:
        "run_dir", "steps", "rows_per_step", "rows", "sources", "time" (with "seconds") and "warnings".

    Raises:
        OptionError: the recipe cannot work.
        ShardError: no source can be opened.
    """
    from data_prep.mix.tokens import tokens
    from mmpretrain.mixture import amounts, of_recipe, of_source, shared

    model = _model(config)
    views = model.views()
    labelled = {config.objectives[name].source for name, objective in model.objectives.items() if objective.wants_label}
    opened, warnings = _sources(config, views, labelled)
    steps = _steps(config, opened)
    rows = sum(source.batch_size for source in config.sources.values())
    sources = {}
    for name, options in config.sources.items():
        line: dict[str, Any] = {
            "rows_per_step": options.batch_size,
            "share": options.batch_size / rows,
            "objectives": [key for key, objective in config.objectives.items() if objective.source == name],
            "rows": None if steps is None else steps * options.batch_size,
        }
        if name in opened:
            line |= amounts(opened[name], line["rows"])
            line |= tokens(model, name, opened[name], line["rows"])
            warnings += of_source(name, opened[name], line)
        sources[name] = line
    warnings += shared(opened) + of_recipe(config, steps)
    time, time_warnings = _time(config, steps, rows, samples_per_s)
    return {
        "run_dir": config.run_dir,
        "steps": steps,
        "rows_per_step": rows,
        "rows": None if steps is None else steps * rows,
        "sources": sources,
        "time": time,
        "warnings": warnings + time_warnings,
    }


def _model(config: Config) -> PretrainModel:
    """Builds the towers and objectives without weights: only views and token counts are needed."""
    import torch

    from mmpretrain.assembly import build_model

    try:
        with torch.device("meta"):
            return build_model(config, resumed=True)[0]
    except (NotImplementedError, RuntimeError):  # a tower that computes when built
        return build_model(config, resumed=True)[0]


def _sources(config: Config, views: dict[str, Any], labelled: set[str]) -> tuple[dict[str, Source], list[str]]:
    """Opens the sources; those that fail become warnings, so that one call reports them all."""
    from mmpretrain.data.schema import ShardError
    from mmpretrain.data.source import Source

    opened, warnings = {}, []
    for name, options in config.sources.items():
        try:
            with file_errors():
                opened[name] = Source(name, options, views[name], name in labelled, config.seed)
        except MMPretrainError as error:
            text = str(error)
            warnings.append(text if f"source {name!r}" in text else f"source {name!r}: {text}")
    if not opened:
        raise ShardError("no source can be opened:\n  " + "\n  ".join(warnings))
    return opened, warnings


def _steps(config: Config, opened: dict[str, Source]) -> int | None:
    """Returns the number of steps; None where it depends on a source that cannot be opened."""
    from mmpretrain.assembly import total_steps

    if config.epochs is not None and config.epochs.source in config.sources and config.epochs.source not in opened:
        return None
    return total_steps(config, opened)


def _time(config: Config, steps: int | None, rows: int, samples_per_s: float | None) -> tuple[dict[str, Any], list[str]]:
    """Estimates the seconds of the whole run, at the given speed or else at that measured in its run folder."""
    from mmpretrain.tracking.jsonl import read_jsonl

    if samples_per_s is not None:
        return _duration(samples_per_s, "given", steps, rows), []
    metrics = Path(config.run_dir) / "metrics.jsonl"
    lines = [line for line in read_jsonl(metrics, strict=False) if isinstance(line.get("samples_per_s"), int | float)]
    rates = sorted(line["samples_per_s"] for line in lines[len(lines) // 2 :] if line["samples_per_s"] > 0)
    if not rates:
        return {"samples_per_s": None, "seconds": None, "measured": None}, []
    warnings = []
    seen, step = lines[-1].get("samples_seen"), lines[-1].get("step")
    if isinstance(seen, int) and isinstance(step, int) and step and seen != step * rows:
        warnings.append(f"{metrics} was measured with {seen / step:.0f} rows a step, the recipe has {rows}: the time is only an estimate.")
    return _duration(rates[len(rates) // 2], str(metrics), steps, rows), warnings


def _duration(rate: float, measured: str, steps: int | None, rows: int) -> dict[str, Any]:
    return {"samples_per_s": rate, "seconds": None if steps is None else steps * rows / rate, "measured": measured}


def mix(
    recipe: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a YAML recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, dots for nesting")] = None,
    samples_per_s: Annotated[
        float | None, typer.Option("--samples-per-s", min=1e-9, help="rows per second; default: as measured in the recipe's run_dir")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """Print the data mixture of a recipe: rows, epochs, tokens, repeats, expected time."""
    from mmpretrain.config import recipe as recipes

    with input_errors():
        mixture = mix_of(recipes.load(recipe, overrides or []), samples_per_s)
    if as_json:
        typer.echo(json.dumps(mixture, ensure_ascii=False))
        return
    from data_prep.mix.report import show

    show(mixture)
