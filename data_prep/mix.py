"""`mix`: what a recipe's sources amount to, before a step is made: epochs over each, tokens, repeats, expected time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mmpretrain.config import Config
    from mmpretrain.data.source import Source
    from mmpretrain.model import PretrainModel

SAMPLE = 512  # captions of a source whose tokens are counted
FEW_EPOCHS, MANY_EPOCHS = 1.0, 50.0


def mix_of(config: Config, samples_per_s: float | None = None) -> dict[str, Any]:
    """A recipe -> its mixture as plain data: "steps", "rows_per_step", "sources", "time", "warnings".

    Raises OptionError for a recipe that cannot work, ShardError where no source can be opened.
    """
    model, note = _model(config)
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
            line |= _amounts(opened[name], line["rows"])
            line |= _tokens(model, config, name, opened[name], line["rows"])
            warnings += _source_warnings(name, opened[name], line)
        sources[name] = line
    warnings += _shared(opened) + _recipe_warnings(config, steps)
    time, told = _time(config, steps, rows, samples_per_s)
    return {
        "run_dir": config.run_dir,
        "steps": steps,
        "rows_per_step": rows,
        "rows": None if steps is None else steps * rows,
        "sources": sources,
        "time": time,
        "warnings": warnings + told + ([note] if note else []),
    }


def _model(config: Config) -> tuple[PretrainModel, str | None]:
    """The towers and objectives without their weights: only the views and token counts are asked for."""
    import torch

    from mmpretrain.assembly import build_model

    try:
        with torch.device("meta"):
            return build_model(config, resumed=True)[0], None
    except (NotImplementedError, RuntimeError):  # a tower that computes while it is built
        return build_model(config, resumed=True)[0], None


def _sources(config: Config, views: dict[str, Any], labelled: set[str]) -> tuple[dict[str, Source], list[str]]:
    """Those that open; what is wrong with the others is a warning, so that one run names all."""
    from mmpretrain.data.schema import ShardError
    from mmpretrain.data.source import Source
    from mmpretrain.options import OptionError

    found, warnings = {}, []
    for name, options in config.sources.items():
        try:
            found[name] = Source(name, options, views[name], name in labelled, config.seed)
        except (OptionError, ShardError, ValueError, OSError) as error:
            text = str(error)
            warnings.append(text if f"source {name!r}" in text else f"source {name!r}: {text}")
    if not found:
        raise ShardError("no source can be opened:\n  " + "\n  ".join(warnings))
    return found, warnings


def _steps(config: Config, opened: dict[str, Source]) -> int | None:
    """None where it takes a source that cannot be opened to know."""
    from mmpretrain.assembly import total_steps

    if config.epochs is not None and config.epochs.source in config.sources and config.epochs.source not in opened:
        return None
    return total_steps(config, opened)


def _amounts(source: Source, rows: int | None) -> dict[str, Any]:
    """Samples, epochs and repeats of a source and of each part of its blend."""
    quotas = source._blend.quotas
    parts = []
    for shards, order, quota in zip(source.shard_sets, source._orders, quotas.tolist()):
        part_rows = None if rows is None else rows * quota / int(quotas.sum())
        parts.append(
            {
                "shards": len(shards.names),
                "first": shards.names[0],
                "share": quota / int(quotas.sum()),
                "samples": order.total,
                "epochs": None if part_rows is None else part_rows / order.total,
            }
        )
    epochs = None if rows is None else rows / source.num_samples
    return {
        "samples": source.num_samples,
        "shards": sum(part["shards"] for part in parts),
        "epochs": epochs,
        "seen_at_least": None if any(p["epochs"] is None for p in parts) else min(math.floor(p["epochs"]) for p in parts),
        "seen_at_most": None if any(p["epochs"] is None for p in parts) else max(math.ceil(p["epochs"]) for p in parts),
        "parts": parts,
    }


def _tokens(model: PretrainModel, config: Config, name: str, source: Source, rows: int | None) -> dict[str, Any]:
    """Tokens that the towers read of a source: an encode that several objectives share is one."""
    images, texts, known = 0, 0, True
    for encode in model.plan:
        if encode.source != name:
            continue
        if encode.view.modality == "text":
            texts += 1
            continue
        patch = model._tower(encode).patch_size
        known &= patch is not None
        patches = (encode.view.size // patch) ** 2 if patch else 0
        dropped = round(encode.mask.ratio * patches) if encode.mask is not None and encode.mask.mode == "drop" else 0
        images += patches - dropped
    found: dict[str, Any] = {
        "image_encodes": sum(e.source == name and e.view.modality == "image" for e in model.plan),
        "text_encodes": texts,
    }
    found["image_tokens_per_row"] = images if known else None
    found["text_tokens_per_row"] = 0.0
    if texts:
        view = next(e.view for e in model.plan if e.source == name and e.view.modality == "text")
        counts, found["unusable_captions"] = caption_tokens(source, view.tokenizer)
        cut = [min(n, view.context_length) for n in counts]
        found["captions_sampled"] = len(counts)
        found["over_context"] = sum(n > view.context_length for n in counts) / max(len(counts), 1)
        found["context_length"] = view.context_length
        found["text_tokens_per_row"] = texts * sum(cut) / len(cut) if cut else None
    for kind in ("image", "text"):
        each = found[f"{kind}_tokens_per_row"]
        found[f"{kind}_tokens"] = None if each is None or rows is None else round(each * rows)
    return found


def caption_tokens(source: Source, tokenizer: str, most: int = SAMPLE) -> tuple[list[int], int]:
    """Tokens (begin and end among them) of captions spread evenly over the source as it is dealt, and how many samples had none usable."""
    import numpy as np

    from data_prep.samples import captions
    from data_prep.writer import Record
    from mmpretrain.data.schema import BadSample

    count = counter(tokenizer)
    found, bad = [], 0
    slots = np.unique(np.linspace(0, max(source.num_samples - 1, 0), most).astype(np.int64))
    component, own = source._blend.locate(slots)
    for c, slot in zip(component.tolist(), own.tolist()):
        place = source._orders[c].locate(np.array([slot]))
        shards = source.shard_sets[c]
        key, members, opened = shards.members(int(place.shard[0]), int(place.sample[0]))
        extension = source.config.caption.partition(":")[0]
        try:
            texts = captions(Record(key, {e: shards.read(opened, m) for e, m in members.items() if e == extension}), source.config.caption)
        except BadSample:
            bad += 1
            continue
        found += [count(text) for text in texts]
    return found, bad


def counter(name: str) -> Any:
    """Text -> its tokens before any cut."""
    from data_prep.stats_text import num_tokens
    from mmpretrain.data.text import get_tokenizer

    if name == "clip":
        return num_tokens
    tokenizer = get_tokenizer(name)

    def count(text: str) -> int:
        ids = tokenizer.encode([text], 1024)[0]
        if tokenizer.eot is not None and bool((ids == tokenizer.eot).any()):
            return int((ids == tokenizer.eot).int().argmax()) + 1
        return int((ids != 0).sum())

    return count


def _source_warnings(name: str, source: Source, line: dict[str, Any]) -> list[str]:
    found = []
    for part in line["parts"]:
        where = f"source {name!r}" + (f", part {part['first']}" if len(line["parts"]) > 1 else "")
        if part["epochs"] is not None and part["epochs"] < FEW_EPOCHS:
            found.append(f"{where}: {part['epochs']:.2f} epochs: {1 - part['epochs']:.0%} of its samples are never seen.")
        if part["epochs"] is not None and part["epochs"] > MANY_EPOCHS:
            found.append(f"{where}: {part['epochs']:.0f} epochs: every sample comes so often that overfitting is likely.")
        rows = line["rows_per_step"] * part["share"]
        if rows > part["samples"]:
            found.append(f"{where}: {rows:.0f} rows a step from {part['samples']} samples: the same sample comes twice in one batch.")
    budget = source.config.max_bad_fraction
    wanted = [(kind, str(getattr(source.config, option)).partition(":")[0]) for kind, option in (("text", "caption"), ("label", "label"))]
    for kind, extension in wanted:
        for shards in source.shard_sets if source._wants[kind] else ():
            lacking = shards.looked_at - shards.found.get(extension, 0)
            if lacking > 0:
                end = (
                    f" That is more than max_bad_fraction {budget:g}: the run will stop."
                    if lacking > 10 + budget * shards.looked_at
                    else ""
                )
                found.append(
                    f"source {name!r}, {shards.names[0]}: {lacking} of {shards.looked_at} samples have no {extension}, which an objective "
                    f"needs; others are read in their place.{end}"
                )
    sampled = line.get("captions_sampled", 0)
    if bad := line.get("unusable_captions", 0):
        found.append(f"source {name!r}: {bad} of the samples looked at have no usable caption in {source.config.caption}.")
    if line.get("over_context", 0) > 0.01:
        found.append(f"source {name!r}: {line['over_context']:.0%} of {sampled} captions are cut at {line['context_length']} tokens.")
    return found


def _shared(opened: dict[str, Source]) -> list[str]:
    """Shards that several sources read: seen more often than any single line of the table says."""
    readers: dict[str, list[str]] = {}
    for name, source in opened.items():
        split = source.config.split
        for shards in source.shard_sets:
            for shard in shards.names:
                readers.setdefault(shard + (f" ({split.part})" if split else ""), []).append(name)
    groups: dict[tuple[str, ...], int] = {}
    for names in readers.values():
        if len(unique := tuple(dict.fromkeys(names))) > 1:
            groups[unique] = groups.get(unique, 0) + 1
    return [f"sources {' and '.join(names)} read the same {count} shards: their epochs add up." for names, count in groups.items()]


def _recipe_warnings(config: Config, steps: int | None) -> list[str]:
    found = []
    if steps is not None and config.optim.warmup_steps >= steps:
        found.append(f"optim.warmup_steps is {config.optim.warmup_steps} of only {steps} steps: the learning rate never gets to its peak.")
    return found


def _time(config: Config, steps: int | None, rows: int, samples_per_s: float | None) -> tuple[dict[str, Any], list[str]]:
    """Seconds for the whole run, at the speed given, or else at the one that its run folder holds."""
    from mmpretrain.tracking import read_jsonl

    if samples_per_s is not None:
        return _at(samples_per_s, "given", steps, rows), []
    metrics = Path(config.run_dir) / "metrics.jsonl"
    lines = [line for line in read_jsonl(metrics, strict=False) if isinstance(line.get("samples_per_s"), int | float)]
    rates = sorted(line["samples_per_s"] for line in lines[len(lines) // 2 :] if line["samples_per_s"] > 0)
    if not rates:
        return {"samples_per_s": None, "seconds": None, "measured": None}, []
    warnings = []
    seen, step = lines[-1].get("samples_seen"), lines[-1].get("step")
    if isinstance(seen, int) and isinstance(step, int) and step and seen != step * rows:
        warnings.append(f"{metrics} was measured with {seen / step:.0f} rows a step, the recipe has {rows}: the time is only a guess.")
    return _at(rates[len(rates) // 2], str(metrics), steps, rows), warnings


def _at(rate: float, measured: str, steps: int | None, rows: int) -> dict[str, Any]:
    return {"samples_per_s": rate, "seconds": None if steps is None else steps * rows / rate, "measured": measured}


def mix(
    recipe: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="a YAML recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, dots for nesting")] = None,
    samples_per_s: Annotated[
        float | None, typer.Option("--samples-per-s", min=1e-9, help="rows per second; default: as measured in the recipe's run_dir")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the result as JSON")] = False,
) -> None:
    """What a recipe's sources amount to: rows, epochs, tokens, repeats, expected time."""
    from mmpretrain import config as recipes
    from mmpretrain.data.schema import ShardError
    from mmpretrain.options import OptionError

    try:
        found = mix_of(recipes.load(recipe, overrides or []), samples_per_s)
    except (OptionError, ShardError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    from data_prep.mix_table import show

    show(found)
