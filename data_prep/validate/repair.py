"""`validate --repair`: the good samples of a shard as records, the bad ones as lines of skipped.jsonl."""

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
    """One shard. `clashes` are its samples, by number, whose sanitised keys an earlier shard has too."""

    number: int
    name: str
    clashes: tuple[int, ...]


@dataclass(frozen=True)
class Repair:
    """Shard -> records and skipped samples; together as many as validation counted."""

    checks: Checks

    def __call__(self, task: ToRepair) -> Iterator[Record | Skipped]:
        clashes = set(task.clashes)
        with Layout(task.name) as layout:
            where = shard_label(task.name)
            for finding in layout.found:
                if severity(finding.kind) == "bad":
                    yield Skipped(where, finding.kind, f"byte {finding.offset}: {finding.detail}"[:500])
            for i, unit in enumerate(unique(layout.units(), set())):
                bad = [found for found in judge(unit, layout, self.checks) if severity(found[0]) == "bad"]
                members = Members(layout.file, unit.places)
                data = {}
                try:
                    data = {} if bad else {extension: members(extension) for extension in kept(unit.places)}
                except BadSample as error:  # the disk failed since
                    bad = [(error.reason, unit.offset, error.detail)]
                if bad:
                    kind, offset, detail = bad[0]
                    yield Skipped(f"{where}/{unit.name}".encode(errors="replace").decode(), kind, f"byte {offset}: {detail}"[:500])
                else:
                    yield Record(f"{unit.key[: MAX_KEY - 20]}-s{task.number}" if i in clashes else unit.key, data)


def repair(out: str, checks: Checks, tasks: list[ToRepair], **options: Any) -> dict[str, Any]:
    """Write the good samples of `tasks` to `out`; returns the manifest."""
    return build(out, Repair(checks), tasks, plan={"command": "validate --repair", "checks": repr(checks)}, **options)
