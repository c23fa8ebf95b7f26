"""Repair of shards: good samples are written as records, bad ones listed in skipped.jsonl."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_prep.records import Record, Skipped
from data_prep.shards.build import build
from data_prep.validate.kinds import severity
from data_prep.validate.layout import MAX_KEY, Layout, unique
from data_prep.validate.members import Checks, Members, kept
from data_prep.validate.shard import judge
from mmpretrain.data.schema import BadSample
from mmpretrain.data.shards import shard_label


@dataclass(frozen=True)
class ToRepair:
    """One shard. `clashes`: numbers of its samples whose sanitised keys occur in an earlier shard."""

    number: int
    name: str
    clashes: tuple[int, ...]


@dataclass(frozen=True)
class Repair:
    """The task of a worker: yields the records and skipped samples of a shard, as many as validation counted."""

    checks: Checks

    def __call__(self, task: ToRepair) -> Iterator[Record | Skipped]:
        clashes = set(task.clashes)
        with Layout(task.name, self.checks.image_member) as layout:
            where = shard_label(task.name)
            for finding in layout.findings:
                if severity(finding.kind) == "bad":
                    yield Skipped(where, finding.kind, f"byte {finding.offset}: {finding.detail}"[:500])
            for i, unit in enumerate(unique(layout.units(), set())):
                bad = [problem for problem in judge(unit, layout, self.checks) if severity(problem[0]) == "bad"]
                members = Members(layout.file, unit.places)
                data = {}
                try:
                    data = {} if bad else {extension: members(extension) for extension in kept(unit.places)}
                except BadSample as error:  # the disk has failed since
                    bad = [(error.reason, unit.offset, error.detail)]
                if bad:
                    kind, offset, detail = bad[0]
                    yield Skipped(f"{where}/{unit.name}".encode(errors="replace").decode(), kind, f"byte {offset}: {detail}"[:500])
                else:
                    yield Record(f"{unit.key[: MAX_KEY - 20]}-s{task.number}" if i in clashes else unit.key, data)


def repair(out: str, checks: Checks, tasks: list[ToRepair], **options: Any) -> dict[str, Any]:
    """Writes the good samples of `tasks` to `out`; returns the manifest. See `shards.build` for the options and errors."""
    return build(out, Repair(checks), tasks, plan={"command": "validate --repair", "checks": repr(checks)}, **options)
