"""One shard, examined: what is wrong with each of its samples, and what is lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from data_prep.shards.task import key_digest
from data_prep.validate.kinds import Finding, Found, severity
from data_prep.validate.layout import Layout, Unit, unique
from data_prep.validate.members import Checks, Members, Sound, examine


@dataclass
class ShardReport:
    """What one shard came to. `good` + `mendable` + `bad` = `samples`; `lost` ones beyond that cannot even be named."""

    name: str
    samples: int = 0
    good: int = 0
    mendable: int = 0
    bad: int = 0
    lost: int = 0
    estimated: bool = False  # `lost` is a guess from the bytes that follow the damage
    verified: int = 0  # samples whose checksums were compared
    bytes: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # kind -> how often
    findings: list[Finding] = field(default_factory=list)  # at most `max_findings` of a kind
    members: Counter[str] = field(default_factory=Counter)  # extension -> samples
    digests: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))  # [samples] of the sanitised keys

    def add(self, finding: Finding, most: int) -> None:
        self.counts[finding.kind] += 1
        if self.counts[finding.kind] <= most:
            self.findings.append(finding)


@dataclass(frozen=True)
class Examine:
    """A shard's name -> its report. Pure, so that any process may do it."""

    checks: Checks
    max_findings: int = 100

    def __call__(self, name: str) -> ShardReport:
        with Layout(name) as layout:
            report = ShardReport(name, lost=layout.lost, estimated=layout.estimated, bytes=layout.size)
            for finding in layout.found:
                report.add(finding, self.max_findings)
            digests = bytearray()
            sound = Sound(layout, self.checks)
            used: set[str] = set()
            incomplete = False
            for i, key in enumerate(layout.index.keys):
                if key not in used and sound(i):
                    used.add(key)
                    digests += key_digest(key)
                    report.samples += 1
                    incomplete = False
                    continue
                for unit in unique(layout.units_of(i), used):
                    digests += key_digest(unit.key)
                    found = judge(unit, layout, self.checks)
                    for kind, offset, detail in found:
                        report.add(Finding(name, unit.name, offset if offset >= 0 else unit.offset, kind, detail), self.max_findings)
                    worst = {severity(kind) for kind, _, _ in found}
                    report.samples += 1
                    report.bad += "bad" in worst
                    report.mendable += "mend" in worst and "bad" not in worst
                    report.members.update(list(unit.places))
                    incomplete = any(kind == "missing_member" for kind, _, _ in found)
            report.members += sound.members
            if report.counts["cut"] and report.samples and incomplete and layout.estimated:
                report.lost -= 1  # the cut went through the last sample, which has been counted
            report.good = report.samples - report.bad - report.mendable
            report.digests = np.frombuffer(bytes(digests), np.uint64)
            if layout.index.checksum is not None and (self.checks.checksums or not layout.trusted):
                report.verified = len(layout.index)
            if not report.samples and not report.lost:
                report.add(Finding(name, "", 0, "empty_shard", f"a tar of {layout.size} bytes without samples"), self.max_findings)
        return report


def judge(unit: Unit, layout: Layout, checks: Checks) -> list[Found]:
    """Everything wrong with a unit. Behind damage only checksums tell samples from debris."""
    if not layout.trusted and not checks.checksums:
        checks = Checks(**{**vars(checks), "checksums": True})
    return unit.found + list(examine(Members(layout.file, unit.places), checks, layout.size))
