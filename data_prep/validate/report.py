"""Aggregation of per-shard reports into a verdict, and its printing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep import files
from data_prep.shards.read import Shard
from data_prep.validate.counts import compare
from data_prep.validate.kinds import KINDS, Finding, severity
from data_prep.validate.shard import ShardReport
from mmpretrain.data.schema import ShardError
from mmpretrain.tracking.console import plain

_ORDER = {"bad": 0, "mend": 1, "note": 2}
MAX_NAMED = 20  # samples with a key of another shard whose keys are looked up


@dataclass
class Verdict:
    """Totals over shards: `good` + `mendable` + `bad` + `lost` = `total`. `estimated`: `lost` is extrapolated from bytes."""

    need: list[str]
    shards: int = 0
    samples: int = 0
    good: int = 0
    mendable: int = 0
    bad: int = 0
    lost: int = 0
    estimated: bool = False
    verified: int = 0
    bytes: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    members: Counter[str] = field(default_factory=Counter)
    repaired: dict[str, Any] | None = None

    @property
    def total(self) -> int:
        return self.samples + self.lost

    @property
    def clean(self) -> bool:
        return all(severity(kind) == "note" for kind in self.counts)

    def add(self, finding: Finding, max_findings: int) -> None:
        """Counts a finding, and keeps at most `max_findings` of a kind."""
        self.counts[finding.kind] += 1
        if self.counts[finding.kind] <= max_findings:
            self.findings.append(finding)

    def as_json(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("shards", "total", "good", "mendable", "bad", "lost")}
        findings = [finding.as_json() for finding in self.findings]
        return {
            "verdict": "clean" if self.clean else "findings",
            **numbers,
            "lost_is_estimated": self.estimated,
            "verified": self.verified,
            "bytes": self.bytes,
            "need": self.need,
            "members": dict(sorted(self.members.items())),
            "counts": dict(sorted(self.counts.items())),
            "findings": findings,
            "findings_left_out": sum(self.counts.values()) - len(findings),
            "repaired": self.repaired,
        }


def summarise(reports: list[ShardReport], need: list[str], max_findings: int) -> tuple[Verdict, list[tuple[int, ...]]]:
    """Aggregates per-shard reports.

    Args:
        reports: in the order of the shards.
        need: the required members.
        max_findings: findings kept of each kind.

    Returns:
        (the verdict, and for each shard the numbers of samples whose keys occur in an earlier shard).
    """
    verdict = Verdict(need)
    _against_counts(reports, verdict, max_findings)
    for report in reports:
        verdict.shards += 1
        for name in ("samples", "good", "mendable", "bad", "lost", "verified", "bytes"):
            setattr(verdict, name, getattr(verdict, name) + getattr(report, name))
        verdict.estimated |= report.estimated and report.lost > 0
        left_out = report.counts.copy()
        for finding in report.findings:
            left_out[finding.kind] -= 1
            verdict.add(finding, max_findings)
        verdict.counts += left_out
        verdict.members += report.members
    clashes = _across(reports)
    room = MAX_NAMED
    for report, clashing in zip(reports, clashes):
        verdict.findings += _name(report.name, clashing[:room])
        room -= len(clashing[:room])
    verdict.counts["duplicate_across_shards"] = sum(map(len, clashes))
    verdict.counts = +verdict.counts
    return verdict, clashes


def _against_counts(reports: list[ShardReport], verdict: Verdict, max_findings: int) -> None:
    """Adds findings of count files, and corrects the estimated losses of damaged shards by them."""
    folders: dict[str, list[ShardReport]] = {}
    for report in reports:
        folders.setdefault(report.name.rpartition("/")[0] or ("/" if report.name.startswith("/") else "."), []).append(report)
    for folder, inside in folders.items():
        known, findings = compare(folder, {report.name.rpartition("/")[2]: report.samples for report in inside})
        for finding in findings:
            verdict.add(finding, max_findings)
        for report in inside:
            count = known.get(report.name.rpartition("/")[2])
            if report.estimated and count is not None:
                report.lost, report.estimated = max(count - report.samples, 0), False


def _across(reports: list[ShardReport]) -> list[tuple[int, ...]]:
    digests = np.concatenate([np.zeros(0, np.uint64), *(report.digests for report in reports)])
    _, first = np.unique(digests, return_index=True)
    repeated = np.ones(len(digests), bool)
    repeated[first] = False
    ends = np.cumsum([len(report.digests) for report in reports])
    return [tuple(np.flatnonzero(repeated[end - len(r.digests) : end]).tolist()) for r, end in zip(reports, ends)]


def _name(shard: str, numbers: tuple[int, ...]) -> list[Finding]:
    if not numbers:
        return []
    try:
        with Shard(shard) as opened:
            keys = [opened.key(i) if i < len(opened) else "" for i in numbers]
    except (ShardError, OSError):
        keys = [""] * len(numbers)
    return [
        Finding(shard, key, -1, "duplicate_across_shards", f"sample {i}: an earlier shard has its key") for i, key in zip(numbers, keys)
    ]


def show(verdict: Verdict, console: Any) -> None:
    """Prints a table of kinds, each with an example and its remedy, and the verdict in one line."""
    from rich.table import Table
    from rich.text import Text

    if verdict.counts:
        table = Table("", "kind", "times", "for instance", "what to do")
        style = {"bad": "red", "mend": "yellow", "note": "dim"}
        for kind in sorted(verdict.counts, key=lambda kind: (_ORDER[severity(kind)], kind)):
            example = next((f for f in verdict.findings if f.kind == kind), None)
            text = ""
            if example is not None:
                location = f" at byte {example.offset}" if example.offset >= 0 else ""
                text = f"{example.shard}{'/' if example.key else ''}{example.key}{location}: {example.detail}"
            cells = [severity(kind), kind, str(verdict.counts[kind]), plain(text)[:400], KINDS[kind][1]]
            table.add_row(*(Text(cell) for cell in cells), style=style[severity(kind)])
        console.print(table)
    console.print(Text(sentence(verdict)))


def sentence(verdict: Verdict) -> str:
    """Formats the verdict in one line."""
    parts = [f"{verdict.good} good"]
    if verdict.mendable:
        parts.append(f"{verdict.mendable} to repair")
    if verdict.bad:
        parts.append(f"{verdict.bad} bad")
    if verdict.lost:
        parts.append(f"{'about ' if verdict.estimated else ''}{verdict.lost} lost with their shards")
    word = "clean" if verdict.clean else "NOT clean"
    checked = f"; {verdict.verified} checked by checksum" if verdict.verified else "; no checksums compared"
    text = f"{word}: {verdict.total} samples in {verdict.shards} shards: {' + '.join(parts)}{checked}"
    if verdict.need:
        text += f"; needed: {', '.join(verdict.need)}"
    if verdict.repaired is not None:
        done = verdict.repaired
        text += f". Repaired: {done['good']} good + {done['bad']} bad = {done['total']}, in {plain(done['out'])}"
    return text + "."


def repaired(verdict: Verdict, out: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """Compares the repaired shards with the verdict. Raises ShardError where the numbers of good samples differ."""
    good, bad = manifest["num_samples"], verdict.samples - manifest["num_samples"]
    if good != verdict.good + verdict.mendable:
        raise ShardError(
            f"{out}: {good} samples were written, {verdict.good + verdict.mendable} were found good. Did the shards change meanwhile?"
        )
    skipped = files.join(out, "skipped.jsonl") if bad or verdict.lost else None
    return {"out": out, "good": good, "bad": bad + verdict.lost, "total": verdict.total, "listed_in": skipped}
