"""Examination of one shard: the problems of each sample, and lost samples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from data_prep.shards.task import key_digest
from data_prep.validate.kinds import Finding, Problem, severity
from data_prep.validate.layout import Layout, Unit, unique
from data_prep.validate.members import Checks, Members, Sound, examine


@dataclass
class ShardReport:
    """Report of one shard: `good` + `mendable` + `bad` = `samples`; `lost` samples come on top and have no names."""

    name: str
    samples: int = 0
    good: int = 0
    mendable: int = 0
    bad: int = 0
    lost: int = 0
    estimated: bool = False  # `lost` is extrapolated from the bytes behind the damage
    verified: int = 0  # samples whose checksums were compared
    bytes: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # kind -> findings
    findings: list[Finding] = field(default_factory=list)  # at most `max_findings` of a kind
    members: Counter[str] = field(default_factory=Counter)  # extension -> samples
    digests: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))  # [samples] of the sanitised keys

    def add(self, finding: Finding, max_findings: int) -> None:
        """Counts a finding, and keeps at most `max_findings` of a kind."""
        self.counts[finding.kind] += 1
        if self.counts[finding.kind] <= max_findings:
            self.findings.append(finding)


@dataclass(frozen=True)
class Examine:
    """The task of a worker: examines a shard."""

    checks: Checks
    max_findings: int = 100

    def __call__(self, name: str) -> ShardReport:
        with Layout(name, self.checks.image_member) as layout:
            report = ShardReport(name, lost=layout.lost, estimated=layout.estimated, bytes=layout.size)
            for finding in layout.findings:
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
                    problems = judge(unit, layout, self.checks)
                    for kind, offset, detail in problems:
                        report.add(Finding(name, unit.name, offset if offset >= 0 else unit.offset, kind, detail), self.max_findings)
                    severities = {severity(kind) for kind, _, _ in problems}
                    report.samples += 1
                    report.bad += "bad" in severities
                    report.mendable += "mend" in severities and "bad" not in severities
                    report.members.update(list(unit.places))
                    incomplete = any(kind == "missing_member" for kind, _, _ in problems)
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


def judge(unit: Unit, layout: Layout, checks: Checks) -> list[Problem]:
    """Returns the problems of a unit. Behind damage, checksums are always verified: only they identify intact samples."""
    if not layout.trusted and not checks.checksums:
        checks = Checks(**{**vars(checks), "checksums": True})
    return unit.problems + list(examine(Members(layout.file, unit.places), checks, layout.size))
