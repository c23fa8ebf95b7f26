"""The command `dedup`: copies among images, or of evaluation images, and the shards without them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from data_prep.cli import Engine, JsonOutput, Processes, command_line, input_errors, shard_names
from data_prep.records import InputError


def deduplicate(
    shards: list[str],
    out: str | None = None,
    *,
    against: list[str] | None = None,
    options: Any = None,
    page: str | None = None,
    engine: str = "local",
    processes: int | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Finds copies and, with `out`, writes the shards without them.

    Args:
        shards: specs of the training shards.
        out: a folder or fsspec URL for the shards; None: only report.
        against: specs of the evaluation shards.
        options: a `find.Options`.
        page: an HTML file that shows the clusters.
        engine: see `engine.run`.
        processes: see `engine.run`.
        command: the command line, for the manifest.

    Returns:
        The report, see `dedup.report`.

    Raises:
        InputError: an option must be corrected.
        OptionError: `options.embedding` does not name a model.
        ShardError: a shard cannot be read.
        OutputError: `out` holds something else, see `shards.build`.
    """
    from data_prep import files
    from data_prep.dedup.find import Options, find
    from data_prep.dedup.report import labels_of, report, selection
    from data_prep.subset import write_rest

    options = options or Options()
    names, evaluation = shard_names(shards), shard_names(against) if against else []
    repeated = sorted(set(names) & set(evaluation) | {name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"{repeated[0]} is named twice: every sample of it would be a copy of itself. Name each shard once.")
    findings = find(names, evaluation, options, engine_name=engine, processes=processes)
    labels = labels_of(findings)
    result = report(findings, labels)
    if page is not None:
        from data_prep.dedup.report import render

        files.write_text(page, render(findings, result, labels))
    if out is not None:
        plan = {"dedup": result["options"], "against": evaluation}
        manifest = write_rest(selection(findings, labels), out, plan, engine=engine, processes=processes, command=command)
        result["written"] = manifest["num_samples"]
    return result


def dedup(
    shards: Annotated[list[str], typer.Argument(help="shards: paths, globs, brace ranges, folders, URLs")],
    out: Annotated[
        str | None, typer.Option("--out", help="write the shards without copies to this folder or URL; default: only report")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="evaluation shards; training samples that are in them are dropped; may be repeated"),
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="only equal pixels, unless --near or --embedding is given too")] = False,
    near: Annotated[
        int | None, typer.Option("--near", min=0, max=32, help="maximum hash distance of candidates, in bits of 64; default: 10")
    ] = None,
    difference: Annotated[
        float, typer.Option("--difference", min=0, max=255, help="maximum local difference of near copies, of 255")
    ] = 17.0,
    embedding: Annotated[
        str | None,
        typer.Option("--embedding", metavar="MODEL", help="also by the cosine under a model: a run, an open_clip folder or name"),
    ] = None,
    threshold: Annotated[float, typer.Option("--threshold", min=0, max=1, help="minimum cosine of copies by --embedding")] = 0.95,
    keep: Annotated[str, typer.Option("--keep", help="of copies, keep the: first, largest, or longest-caption")] = "first",
    within: Annotated[bool, typer.Option(help="also find copies within the training shards")] = True,
    caption: Annotated[
        str, typer.Option("--caption", help="the member that holds the caption, or json:FIELD, for longest-caption")
    ] = "txt",
    report: Annotated[str | None, typer.Option("--report", help="write the clusters and counts to this JSON file")] = None,
    page: Annotated[str | None, typer.Option("--page", help="write an HTML page that shows the clusters side by side")] = None,
    engine: Engine = "local",
    processes: Processes = None,
    json_output: JsonOutput = False,
) -> None:
    """Find copies among images: equal pixels, the same picture re-encoded, resized or brightened, or alike under a model.

    Equal pixels always count. Without --exact, --near and --embedding, near copies are found too. With --against, nothing of the
    evaluation shards is removed: training samples that are in them are.
    """
    from data_prep import files
    from data_prep.copies import KEEP
    from data_prep.dedup.find import Options
    from data_prep.perceptual import HASH_DISTANCE
    from data_prep.subset import show

    if keep not in KEEP:
        raise typer.BadParameter(f"--keep {keep!r}: expected {', '.join(KEEP)}")
    if not within and not against:
        raise typer.BadParameter("--no-within leaves nothing to compare without --against")
    near = HASH_DISTANCE if near is None and not exact and embedding is None else near
    options = Options(near, difference, embedding, threshold, keep, within, caption)
    run = {"against": against, "options": options, "page": page, "engine": engine, "processes": processes, "command": command_line()}
    with input_errors():
        result = deduplicate(shards, out, **run)
        if report is not None:
            files.write_json(report, result)
    show(result, out, json_output)
