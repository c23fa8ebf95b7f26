"""Warnings about a recipe's data mixture."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mmpretrain.data.fields import member_of

if TYPE_CHECKING:
    from mmpretrain.config.recipe import Config
    from mmpretrain.data.source import Source

FEW_EPOCHS, MANY_EPOCHS = 1.0, 50.0


def amounts(source: Source, rows: int | None) -> dict[str, Any]:
    """Compute samples, epochs and repeats of a source and of each part of its blend.

    Args:
        source: opened.
        rows: of the source in the whole run; None: not known.
    """
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


def of_source(name: str, source: Source, line: dict[str, Any]) -> list[str]:
    """Return the warnings about one source: too few or many epochs, repeats within a batch, missing or unusable members.

    Args:
        name: of the source.
        source: opened.
        line: its amounts, as `data_prep mix` computes them: "parts", "rows_per_step", and statistics of captions.
    """
    warnings = []
    for part in line["parts"]:
        where = f"source {name!r}" + (f", part {part['first']}" if len(line["parts"]) > 1 else "")
        if part["epochs"] is not None and part["epochs"] < FEW_EPOCHS:
            warnings.append(f"{where}: {part['epochs']:.2f} epochs: {1 - part['epochs']:.0%} of its samples are never seen.")
        if part["epochs"] is not None and part["epochs"] > MANY_EPOCHS:
            warnings.append(f"{where}: {part['epochs']:.0f} epochs: every sample comes so often that overfitting is likely.")
        rows = line["rows_per_step"] * part["share"]
        if rows > part["samples"]:
            warnings.append(f"{where}: {rows:.0f} rows a step from {part['samples']} samples: the same sample comes twice in one batch.")
    budget = source.config.max_bad_fraction
    for kind, option in (("text", "caption"), ("label", "label")):
        if not source._wants[kind]:
            continue
        extension = member_of(str(getattr(source.config, option)))
        for shards in source.shard_sets:
            lacking = shards.looked_at - shards.extension_counts.get(extension, 0)
            if lacking > 0:
                end = (
                    f" That is more than max_bad_fraction {budget:g}: the run will stop."
                    if lacking > 10 + budget * shards.looked_at
                    else ""
                )
                warnings.append(
                    f"source {name!r}, {shards.names[0]}: {lacking} of {shards.looked_at} samples have no {extension}, which an objective "
                    f"needs; others are read in their place.{end}"
                )
    sampled = line.get("captions_sampled", 0)
    if bad := line.get("unusable_captions", 0):
        warnings.append(f"source {name!r}: {bad} of the samples looked at have no usable caption in {source.config.caption}.")
    if line.get("over_context", 0) > 0.01:
        warnings.append(f"source {name!r}: {line['over_context']:.0%} of {sampled} captions are cut at {line['context_length']} tokens.")
    return warnings


def shared(opened: dict[str, Source]) -> list[str]:
    """Return a warning for shards that several sources read: their epochs add up."""
    if len(opened) < 2:  # a source may name a million shards
        return []
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


def of_recipe(config: Config, steps: int | None) -> list[str]:
    """Return the warnings about the recipe as a whole."""
    warnings = []
    if steps is not None and config.optim.warmup_steps >= steps:
        warnings.append(
            f"optim.warmup_steps is {config.optim.warmup_steps} of only {steps} steps: the learning rate never gets to its peak."
        )
    return warnings


def of_run(config: Config, sources: dict[str, Source]) -> list[str]:
    """Return the warnings that open a run: those of `data_prep mix` that need no look at the samples.

    Args:
        config: resolved; `steps` is given.
        sources: opened.
    """
    warnings = []
    for name, source in sources.items():
        rows = config.sources[name].batch_size
        line = amounts(source, None if config.steps is None else config.steps * rows) | {"rows_per_step": rows}
        warnings += of_source(name, source, line)
    return warnings + shared(sources) + of_recipe(config, config.steps)
