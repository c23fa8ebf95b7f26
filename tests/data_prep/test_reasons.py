"""Every reason that `skipped.jsonl` may hold is explained in docs/data.md, and nothing is that no code gives."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from data_prep.copies import RULES
from data_prep.dedup.report import IN_EVALUATION
from data_prep.filter.rules import Rules
from data_prep.validate.kinds import KINDS

ROOT = Path(__file__).resolve().parents[2]
GIVEN = {"BadSample": 0, "Skipped": 1, "Stop": 1, "read": 1, "drop": 1}  # the call -> which argument is the reason
CODE = [*ROOT.glob("data_prep/**/*.py"), *(ROOT / "mmpretrain" / "data" / f"{name}.py" for name in ("decode", "formats", "tar", "index"))]


def literals(node: ast.AST) -> Iterator[str]:
    """The reasons that a file gives as text."""
    for call in ast.walk(node):
        if not isinstance(call, ast.Call):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        given = call.args[GIVEN[name] : GIVEN[name] + 1] if name in GIVEN else []
        given += [keyword.value for keyword in call.keywords if keyword.arg == "reason"]
        yield from (value.value for value in given if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value)


def test_reasons_are_documented() -> None:
    known = {text for path in CODE if "demo" not in path.parts for text in literals(ast.parse(path.read_text()))}
    assert {"bad_row", "zeros", "checksum", "missing_sidecar", "unknown_image", "max_repeats", "score"} <= known  # all forms are seen
    known |= {field.name for field in fields(Rules)} - {"languages", "caption"} | {"language"}
    known = known - set(RULES) | {f"{rule}_copy" for rule in RULES if rule} | {IN_EVALUATION}
    known |= {kind for kind, (severity, _) in KINDS.items() if severity == "bad"}
    chapter = (ROOT / "docs" / "data.md").read_text().split("## What is left out, and why")[1].split("\n## ")[0]
    rows = [line for line in chapter.splitlines() if line.startswith("| `")]
    explained = {reason for row in rows for reason in re.findall(r"`(\w+)`", row.split(" | ")[0])}
    assert known - explained == set()
    assert explained - known == set()
