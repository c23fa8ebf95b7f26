"""A subset of the samples of shards: numbered over all shards, some dropped with a reason, the rest written to shards again.

`filter` and `dedup` decide which samples to drop; everything else about a subset is here.
"""

from __future__ import annotations

import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import typer

from data_prep import engine as engines
from data_prep import files
from data_prep.records import Record, RecordError, Skipped
from data_prep.shards.build import build
from data_prep.shards.read import Place, Shard, Span, spans
from data_prep.shards.task import key_digest, key_digests
from mmpretrain.data.cache import remote_index
from mmpretrain.data.index import open_index
from mmpretrain.data.schema import BadSample, ShardError
from mmpretrain.data.shard_names import is_remote

Result = TypeVar("Result")
CARRIED = ("classnames.txt", "zeroshot_classification_templates.txt")  # files of a shard set that hold for a subset too


@dataclass(frozen=True)
class Part:
    """A shard and the samples to leave out of it: (sample, reason, detail), ascending."""

    name: str
    count: int  # samples that were judged
    drops: tuple[tuple[int, str, str], ...] = ()
    state: str = field(default="", compare=False)  # of the shard's file: a changed file makes another build


def keep(part: Part) -> Iterator[Record | Skipped]:
    """Yields the kept samples, byte for byte, and for each of the others the rule that dropped it.

    Raises ShardError where the shard has changed since it was judged, or a key cannot be written.
    """
    drops = {sample: (reason, detail) for sample, reason, detail in part.drops}
    with Shard(part.name) as shard:
        if len(shard) != part.count:
            raise ShardError(f"{part.name}: {len(shard)} samples, but {part.count} when it was judged. Shards must not change meanwhile.")
        for damage in shard.index.damage:
            yield Skipped(part.name, damage.reason, f"at byte {damage.offset}: {damage.detail}; about {damage.lost} samples lost")
        for member in shard.index.left_out or ():
            yield Skipped(f"{part.name}/{member.key}", member.reason, str(member))
        for sample in range(len(shard)):
            where = f"{part.name}/{shard.key(sample)}"
            if sample in drops:
                yield Skipped(where, *drops[sample])
                continue
            try:
                record = shard.read(sample)
            except BadSample as error:  # in a member that no rule read
                yield Skipped(where, error.reason, error.detail)
                continue
            try:
                record.check()
            except RecordError as error:
                raise ShardError(f"{part.name}: {error} `python -m data_prep build shards` replaces such keys: run it first.") from error
            yield record


def check_keys(parts: Callable[[], Iterable[Part]]) -> None:
    """Raises RecordError for a key of two kept samples, before anything is written; keys of unindexed remote shards are not checked."""
    digests = [key_digests(key for _, key in _kept_keys(part)) for part in parts()]
    ordered = np.sort(np.concatenate([np.zeros(0, np.uint64), *digests]))
    repeated = {digest.tobytes() for digest in ordered[1:][ordered[1:] == ordered[:-1]]}
    seen: dict[str, str] = {}
    for part in parts() if repeated else ():
        for place, key in _kept_keys(part):
            if key_digest(key) in repeated and seen.setdefault(key, place) != place:
                raise RecordError(
                    f"key {key!r} comes twice, in {seen[key].rpartition('#')[0]} and {part.name}: keys must be unique over the whole data "
                    "set. Where each shard counts from 0, run `python -m data_prep build shards --keys shard` on them first."
                )


def _kept_keys(part: Part) -> Iterator[tuple[str, str]]:
    """Yields (shard#number, key) of the kept samples."""
    index = remote_index(part.name) if is_remote(part.name) else open_index(files.place(part.name), save_new=False)
    drops = {sample for sample, _, _ in part.drops}
    for sample, key in enumerate(index.keys if index is not None else ()):
        if sample not in drops:
            yield f"{part.name}#{sample}", key


def write_rest(
    selection: Selection,
    out: str,
    plan: dict[str, Any],
    *,
    engine: str = "local",
    processes: int | None = None,
    command: str | None = None,
    licence: str | None = None,
) -> dict[str, Any]:
    """Writes the samples that are not dropped.

    Args:
        selection: the dropped samples.
        out: a folder or fsspec URL.
        plan: the options of the command that made the selection.
        engine: see `engine.run`.
        processes: see `engine.run`.
        command: the command line, for the manifest.
        licence: of the data, for the manifest.

    Returns:
        The manifest.

    Raises:
        RecordError: two kept samples have the same key; raised before anything is written.
        OutputError: `out` holds something else; see `build`.
    """
    check_keys(selection.parts)
    run: dict[str, Any] = {"engine": engine, "processes": processes, "command": command, "licence": licence}
    return build(out, keep, selection.parts(), plan=plan, texts=carried(selection.samples.names), **run)


def carried(names: Iterable[str]) -> dict[str, str]:
    """Reads the class names and templates beside the shards, which are copied to the output, where all shards are in one folder."""
    folders = {name.rpartition("/")[0] or "." for name in names}
    if len(folders) != 1:
        return {}
    places = {name: files.join(next(iter(folders)), name) for name in CARRIED}
    texts = {}
    for name, place in places.items():
        if files.exists(place):
            try:
                texts[name] = files.read_bytes(place).decode("utf-8")
            except UnicodeDecodeError as error:
                raise ShardError(f"{place} is not UTF-8 ({error}): convert it") from error
    return texts


def show(result: dict[str, Any], out: str | None, as_json: bool) -> None:
    """Prints how many samples each rule dropped; good + dropped = all. Exits with status 1 where no sample is left to write."""
    if as_json:
        typer.echo(json.dumps(result, ensure_ascii=False))
    else:
        _print_table(result)
    if out is not None and not result["good"]:
        typer.echo(f"error: no sample is left to write to {out}", err=True)
        raise typer.Exit(1)


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "samples")
    for rule, count in result["dropped"].items():
        table.add_row(rule, f"{count:,}")
    table.add_row("good", f"{result['good']:,}")
    table.add_row("all", f"{result['samples']:,}")
    Console().print(table)
    for line in result.get("damage", []):
        typer.echo(f"damaged: {line}", err=True)
    if "evaluation" in result:
        evaluation = result["evaluation"]
        line = f"{evaluation['in_training']} of {evaluation['samples']} evaluation samples have a copy among the training samples"
        typer.echo(line + (f"; not comparable: {evaluation['unusable']}" if evaluation["unusable"] else ""))
    if "not_embedded" in result:
        first = result["not_embedded"][0]
        typer.echo(f"{len(result['not_embedded'])} samples were not compared by embedding, first {first['sample']}: {first['reason']}")


class Numbering:
    """The samples of shards, numbered over all of them in order."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.counts = np.zeros(len(names), np.int64)  # samples of each shard, known once `run` has read it
        self._keys: tuple[str, list[str]] = ("", [])

    def run(
        self, stage: Callable[[Span], Result], count: Callable[[Result], int], *, engine: str, processes: int | None, title: str
    ) -> Iterator[tuple[int, Result]]:
        """Applies a stage to every sample, in spans, and counts the samples.

        Args:
            stage: see `engine.run`; it numbers samples within their shard.
            count: result -> samples of its span.
            engine: see `engine.run`.
            processes: see `engine.run`.
            title: of the progress bar.

        Yields:
            (number of the first sample of the span's shard, result), in order.
        """
        tasks, number = list(spans(self.names)), {name: i for i, name in enumerate(self.names)}
        total = 0
        for span, result in zip(tasks, engines.run(stage, tasks, engine=engine, processes=processes, title=title), strict=True):
            self.counts[number[span.name]] += count(result)
            yield total - span.start, result
            total += count(result)

    @property
    def starts(self) -> np.ndarray:
        """int64 [shards + 1]: the number of the first sample of each shard, and the number of samples."""
        return np.r_[0, np.cumsum(self.counts)]

    def __len__(self) -> int:
        return int(self.counts.sum())

    def shards_of(self, samples: np.ndarray) -> np.ndarray:
        """Maps samples, int64 [n], to the numbers of their shards, int64 [n]."""
        return np.searchsorted(self.starts, samples, side="right") - 1

    def places(self, samples: np.ndarray) -> Iterator[Place]:
        """Locates samples, int64 [n], in the same order."""
        starts = self.starts
        for sample, shard in zip(samples.tolist(), self.shards_of(samples).tolist()):
            yield Place(sample, self.names[shard], sample - int(starts[shard]))

    def place(self, sample: int) -> Place:
        """Locates one sample."""
        return next(self.places(np.array([sample])))

    def key(self, sample: int) -> str:
        """Returns shard/key of a sample. Caches the keys of one shard."""
        place = self.place(sample)
        if self._keys[0] != place.shard:
            index = remote_index(place.shard) if is_remote(place.shard) else None
            if index is None:
                with Shard(place.shard) as shard:
                    index = shard.index
            self._keys = place.shard, index.keys
        return f"{place.shard}/{self._keys[1][place.index]}"


class Selection:
    """The dropped samples, each with a rule and a detail. Takes 18 bytes of memory each; the details are in a temporary file."""

    def __init__(self, samples: Numbering) -> None:
        self.samples = samples
        self._samples, self._rules, self._places = array("q"), array("H"), array("q")
        self._numbers: dict[str, int] = {}  # of rules
        self._details = tempfile.TemporaryFile()  # noqa: SIM115 (closed with this object)

    def drop(self, sample: int, rule: str, detail: str) -> None:
        """Drops a sample that was not dropped before."""
        self._samples.append(sample)
        self._rules.append(self._numbers.setdefault(rule, len(self._numbers)))
        self._places.append(self._details.tell())
        data = detail.encode("utf-8", "surrogatepass")
        self._details.write(len(data).to_bytes(4, "little") + data)

    def dropped_by(self) -> dict[str, int]:
        """Returns rule -> number of dropped samples, sorted by rule."""
        counts = Counter(self._rules)
        return {rule: counts[number] for rule, number in sorted(self._numbers.items())}

    def left(self) -> np.ndarray:
        """Returns the samples that are not dropped: int64 [n], ascending."""
        good = np.ones(len(self.samples), bool)
        good[np.array(self._samples, np.int64)] = False
        return np.flatnonzero(good)

    def parts(self) -> Iterator[Part]:
        """Yields, shard by shard, the samples to leave out of it."""
        samples, rules = np.array(self._samples, np.int64), list(self._numbers)
        order = np.argsort(samples)
        starts = self.samples.starts
        edges = np.searchsorted(samples[order], starts)
        for name, count, start, low, high in zip(self.samples.names, self.samples.counts.tolist(), starts.tolist(), edges, edges[1:]):
            drops = tuple((self._samples[i] - start, rules[self._rules[i]], self._detail(i)) for i in order[low:high].tolist())
            yield Part(name, count, drops, files.states([name]))

    def _detail(self, i: int) -> str:
        self._details.seek(self._places[i])
        return self._details.read(int.from_bytes(self._details.read(4), "little")).decode("utf-8", "surrogatepass")
