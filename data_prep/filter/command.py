"""`filter`: the samples of shards that pass stated rules, as DataComp's filters and a user's own."""

from __future__ import annotations

from operator import itemgetter
from typing import Annotated, Any

import numpy as np
import typer

from data_prep.cli import Engine, JsonOutput, Licence, Processes, command_line, input_errors, shard_names
from data_prep.subset import Numbering, Selection, show, write_rest


def _judge(names: list[str], rules: Any, max_repeats: int | None, engine: str, processes: int | None) -> tuple[Selection, list[str]]:
    """The rules on single samples, then repeats among those that passed them."""
    from data_prep.filter.rules import Judge, repeated

    judged, digests, damage = Selection(Numbering(names)), [], []
    stage = Judge(rules, max_repeats is not None)
    for first, (_, dropped, part, broken) in judged.samples.run(stage, itemgetter(0), engine=engine, processes=processes, title="judging"):
        for index, rule, detail in dropped:
            judged.drop(first + index, rule, detail)
        damage += broken
        digests.append(part)
    if max_repeats is not None:
        left = judged.left()
        for sample in left[repeated(np.concatenate([*digests, np.zeros(0, np.uint64)])[left], max_repeats)].tolist():
            judged.drop(sample, "max_repeats", f"its caption came {max_repeats} times before")
    return judged, damage


def _score(judged: Selection, model: str, caption: str, least: float | None, fraction: float | None, save: str | None) -> None:
    """Score what is left under a model, and drop the low ones.

    In this process, in batches: see `embed`. Samples that cannot be scored are dropped with the reason.
    """
    from data_prep.embed import Encoder
    from data_prep.filter.rules import save_scores, too_low

    left = judged.left()
    scores = np.full(len(left), np.nan, np.float32)
    keys: dict[int, str] = {}  # only where they are saved
    encoder = Encoder(model)
    for batch in encoder.batches(judged.samples.places(left), caption):
        for sample, error in batch.bad:
            judged.drop(sample, error.reason, error.detail)
        if batch.samples:
            scores[np.searchsorted(left, batch.samples)] = encoder.similarities(batch).numpy()
            if save is not None:
                keys |= dict(zip(batch.samples, batch.keys))
    scored = ~np.isnan(scores)
    left, scores = left[scored], scores[scored]
    if save is not None:
        save_scores(save, ((name, keys[sample], float(score)) for (sample, name, _), score in zip(judged.samples.places(left), scores)))
    if least is not None or fraction is not None:
        dropped, limit = too_low(scores, least, fraction)
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
    """Shard specs -> counts: samples, good, and dropped by rule; with `out`, shards of the good ones and skipped.jsonl.

    `rules`: a `rules.Rules`. good + dropped = samples. Samples are judged first and written in a second pass over the shards, in which
    their bytes pass through. Raises ShardError, InputError, OptionError, FileExistsError (see shards.build).
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
        asked = {"max_repeats": max_repeats, "score": score, "min_score": min_score, "keep_top": keep_top}
        plan = {"filter": repr(rules), **asked}
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
        int | None, typer.Option("--max-repeats", min=1, help="the first so many samples with the same caption, over the whole set")
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
    """Keep the samples that pass every rule given; each of the others has a line in OUT/skipped.jsonl with the rule that dropped it."""
    from data_prep.filter.rules import Predicate, Rules

    if (score is None) != (min_score is None and keep_top is None and save_scores is None) or (
        min_score is not None and keep_top is not None
    ):
        raise typer.BadParameter("--score MODEL goes with one of --min-score and --keep-top, or with --save-scores alone")
    with input_errors(TypeError, RuntimeError):
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
