"""The command `stats`: a self-contained HTML report of a shard set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from data_prep.cli import Engine, Processes, input_errors, shard_names


def report(
    shards: list[str],
    *,
    caption: str = "txt",
    label: str | None = "cls",
    sample: int | None = None,
    engine: str = "local",
    processes: int | None = None,
    page: bool = True,
) -> tuple[dict[str, Any], str]:
    """Summarises shards.

    Args:
        shards: shard specs.
        caption: the member with the caption, or json:FIELD.
        label: the member with the class, or json:FIELD; None: none.
        sample: read only about N samples, chosen by hashes of their keys and sizes; the counts of samples, members and
            bytes still cover all.
        engine: see `engine.run`.
        processes: see `engine.run`.
        page: render the HTML page.

    Returns:
        (numbers as plain data, the HTML page or "").

    Raises:
        InputError: a spec names no shard.
    """
    from data_prep import engine as engines
    from data_prep.stats.collect import Count, Stage
    from data_prep.stats.duplicates import find_duplicates
    from data_prep.stats.numbers import numbers
    from data_prep.stats.page import render
    from data_prep.stats.summary import Summary

    names = shard_names(shards)
    share = 1.0
    if sample is not None:
        total = sum(engines.run(Count(), names, engine=engine, processes=processes, title="counting"))
        share = min(1.0, sample / max(total, 1))
    summary = Summary()
    for part in engines.run(Stage(caption, label, share), names, engine=engine, processes=processes, title="reading shards"):
        summary.merge(part)
    duplicates = find_duplicates(summary.pictures, names, engine=engine, processes=processes)
    data = numbers(summary, names, share, caption, label, duplicates)
    html = render(summary, data, duplicates, engine=engine, processes=processes) if page else ""
    # Lone surrogates in keys or captions cannot be written and become question marks.
    return json.loads(json.dumps(data, ensure_ascii=False).encode("utf-8", "replace")), html


def stats(
    shards: Annotated[list[str], typer.Argument(help="shards: paths, globs, brace ranges, folders, URLs")],
    out: Annotated[str, typer.Option("--out", help="the page to write; a path or URL")] = "report.html",
    json_out: Annotated[str | None, typer.Option("--json", help="also write the numbers as JSON to this file; - prints them")] = None,
    sample: Annotated[
        int | None,
        typer.Option("--sample", min=1, help="read about N samples, chosen by hashes of their keys and sizes; default: all"),
    ] = None,
    caption: Annotated[str, typer.Option("--caption", help="the member that holds the caption, or json:FIELD")] = "txt",
    label: Annotated[str, typer.Option("--label", help="the member that holds the class, or json:FIELD; nothing where none does")] = "cls",
    engine: Engine = "local",
    processes: Processes = None,
) -> None:
    """Write a report of a shard set: counts, images, captions, classes, the worst samples, duplicates."""
    from data_prep import files

    with input_errors():
        data, page = report(shards, caption=caption, label=label or None, sample=sample, engine=engine, processes=processes)
        files.write_text(out, page)
        if json_out not in (None, "-"):
            files.write_json(json_out, data)
    if json_out == "-":
        typer.echo(json.dumps(data, ensure_ascii=False))
        return
    bad = sum(data["problems"].values())
    typer.echo(
        f"{data['samples']} samples in {data['shards']} shards; {data['images']['decoded']} images, {data['captions']['captions']} captions"
    )
    if bad:
        typer.echo(f"{bad} problems: {', '.join(f'{n} {reason}' for reason, n in data['problems'].items())}")
    typer.echo(f"see {Path(out) if '://' not in out else out}")
