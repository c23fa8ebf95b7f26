"""The command `filter`: the samples of shards that pass rules, such as DataComp's filters and a user's own."""

from __future__ import annotations

from operator import itemgetter
from typing import Annotated, Any

import numpy as np
import typer

from data_prep.cli import Engine, JsonOutput, Licence, Processes, command_line, input_errors, shard_names
from data_prep.subset import Numbering, Selection, show, write_rest


def _judge(names: list[str], rules: Any, max_repeats: int | None, engine: str, processes: int | None) -> tuple[Selection, list[str]]:
    """Applies the rules on single samples, then `max_repeats` among those that pass."""
    from data_prep.filter.rules import Judge, repeated

    judged, digests, damage = Selection(Numbering(names)), [], []
    stage = Judge(rules, max_repeats is not None)
    for first, (_, dropped, part, damaged) in judged.samples.run(stage, itemgetter(0), engine=engine, processes=processes, title="judging"):
        for index, rule, detail in dropped:
            judged.drop(first + index, rule, detail)
        damage += damaged
        digests.append(part)
    if max_repeats is not None:
        left = judged.left()
        for sample in left[repeated(np.concatenate([*digests, np.zeros(0, np.uint64)])[left], max_repeats)].tolist():
            judged.drop(sample, "max_repeats", f"its caption came {max_repeats} times before")
    return judged, damage


def _score(judged: Selection, model: str, caption: str, min_score: float | None, keep_top: float | None, save_to: str | None) -> None:
    """Scores the remaining samples under a model, and drops those with low scores.

    Runs in this process, in batches: see `embed`. Samples that cannot be scored are dropped with the reason.
    """
    from data_prep.embed import Encoder
    from data_prep.filter.rules import save_scores, too_low

    left = judged.left()
    scores = np.full(len(left), np.nan, np.float32)
    keys: dict[int, str] = {}  # only where scores are saved
    encoder = Encoder(model)
    for batch in encoder.batches(judged.samples.places(left), caption):
        for sample, error in batch.bad:
            judged.drop(sample, error.reason, error.detail)
        if batch.samples:
            scores[np.searchsorted(left, batch.samples)] = encoder.similarities(batch).numpy()
            if save_to is not None:
                keys |= dict(zip(batch.samples, batch.keys))
    scored = ~np.isnan(scores)
    left, scores = left[scored], scores[scored]
    if save_to is not None:
        save_scores(save_to, ((name, keys[sample], float(score)) for (sample, name, _), score in zip(judged.samples.places(left), scores)))
    if min_score is not None or keep_top is not None:
        dropped, limit = too_low(scores, min_score, keep_top)
        for sample, score in zip(left[dropped].tolist(), scores[dropped].tolist()):
            judged.drop(sample, "score", f"{score:.4f}; {limit}")


def select(
    shards: list[str],
    out: str | None = None,
    *,
    rules: Any = None,
    max_repeats: int | None = None,
    score: str | None = None,
    min_score: float | None = None,
    keep_top: float | None = None,
    save_scores: str | None = None,
    engine: str = "local",
    processes: int | None = None,
    command: str | None = None,
    licence: str | None = None,
) -> dict[str, Any]:
    """Counts the samples that pass the rules and, with `out`, writes them to shards.

    Samples are judged first; a second pass over the shards copies those that pass, byte for byte.

    Args:
        shards: shard specs.
        out: a folder or fsspec URL for the shards and skipped.jsonl; None: only count.
        rules: a `rules.Rules`.
        max_repeats: samples kept of those with the same caption.
        score: a model for image-text scores, see `embed.Encoder`.
        min_score: keep scores of at least this.
        keep_top: keep this fraction, with the best scores.
        save_scores: a .parquet or .jsonl file for the scores.
        engine: see `engine.run`.
        processes: see `engine.run`.
        command: the command line, for the manifest.
        licence: of the data, for the manifest.

    Returns:
        "samples", "good" and "dropped" (rule -> count), where good + dropped = samples; "damage" of shards; "written".

    Raises:
        ShardError: a shard cannot be read.
        InputError: an option must be corrected.
        OptionError: `score` does not name a model.
        OutputError: `out` holds something else, see `shards.build`.
    """
    from data_prep import captions
    from data_prep.filter.rules import Rules

    rules = rules or Rules()
    if rules.languages:
        captions.check(rules.languages)
    names = list(dict.fromkeys(shard_names(shards)))
    judged, damage = _judge(names, rules, max_repeats, engine, processes)
    if score is not None:
        _score(judged, score, rules.caption, min_score, keep_top, save_scores)
    counts, samples = judged.dropped_by(), len(judged.samples)
    result: dict[str, Any] = {"samples": samples, "good": samples - sum(counts.values()), "dropped": counts}
    if damage:
        result["damage"] = damage
    if out is not None:
        set_options = {"max_repeats": max_repeats, "score": score, "min_score": min_score, "keep_top": keep_top}
        plan = {"filter": repr(rules), **set_options}
        run = {"engine": engine, "processes": processes, "command": command, "licence": licence}
        result["written"] = write_rest(judged, out, plan, **run)["num_samples"]
    return result


def filter_(
    shards: Annotated[list[str], typer.Argument(help="shards: paths, globs, brace ranges, folders, URLs")],
    out: Annotated[str | None, typer.Option("--out", help="folder or URL for the shards of what passes; default: only count")] = None,
    min_side: Annotated[int | None, typer.Option("--min-side", min=1, help="pixels of the shorter side, at least")] = None,
    max_aspect: Annotated[float | None, typer.Option("--max-aspect", min=1, help="longer side over shorter side, at most")] = None,
    min_words: Annotated[int | None, typer.Option("--min-words", min=0, help="words of a caption, at least")] = None,
    max_words: Annotated[int | None, typer.Option("--max-words", min=1, help="words of a caption, at most")] = None,
    min_chars: Annotated[int | None, typer.Option("--min-chars", min=0, help="characters of a caption, at least")] = None,
    max_chars: Annotated[int | None, typer.Option("--max-chars", min=1, help="characters of a caption, at most")] = None,
    language: Annotated[
        str | None, typer.Option("--language", help="captions in one of these languages: en, or en,de (extra `prep`)")
    ] = None,
    max_repeats: Annotated[
        int | None, typer.Option("--max-repeats", min=1, help="keep the first N samples with the same caption, over the whole set")
    ] = None,
    where: Annotated[
        str | None, typer.Option("--where", metavar="FILE.py:FUNCTION", help="your function of a sample: True keeps it. Its code is run")
    ] = None,
    score: Annotated[
        str | None, typer.Option("--score", metavar="MODEL", help="image-text cosine under a model: a run, an open_clip folder or name")
    ] = None,
    min_score: Annotated[float | None, typer.Option("--min-score", help="keep scores of at least this")] = None,
    keep_top: Annotated[float | None, typer.Option("--keep-top", min=0, max=1, help="keep this fraction, the best scores")] = None,
    save_scores: Annotated[str | None, typer.Option("--save-scores", help="write shard, key, score to FILE.parquet or FILE.jsonl")] = None,
    caption: Annotated[str, typer.Option("--caption", help="the member that holds the caption, or json:FIELD")] = "txt",
    licence: Licence = None,
    engine: Engine = "local",
    processes: Processes = None,
    json_output: JsonOutput = False,
) -> None:
    """Keep the samples that pass every given rule; OUT/skipped.jsonl lists the others, each with the rule that dropped it."""
    from data_prep.filter.rules import Predicate, Rules

    if (score is None) != (min_score is None and keep_top is None and save_scores is None) or (
        min_score is not None and keep_top is not None
    ):
        raise typer.BadParameter("--score MODEL goes with one of --min-score and --keep-top, or with --save-scores alone")
    with input_errors():
        predicate = None if where is None else Predicate.read(where)
        languages = () if language is None else tuple(code.strip() for code in language.split(","))
        lengths = (min_side, max_aspect, min_words, max_words, min_chars, max_chars)
        result = select(
            shards,
            out,
            rules=Rules(*lengths, languages, predicate, caption),
            max_repeats=max_repeats,
            score=score,
            min_score=min_score,
            keep_top=keep_top,
            save_scores=save_scores,
            engine=engine,
            processes=processes,
            command=command_line(),
            licence=licence,
        )
    show(result, out, json_output)
