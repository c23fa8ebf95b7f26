"""What the README and docs/ show: their commands, Python blocks and recipes, and the marks of what the tests do not run.

A command is a line of a fenced block without a language (a backslash continues it, two spaces and # end it), or a code span that begins
like one. A line `<!-- not run: COMMAND | REASON -->` of a page marks one that cannot run in a test; `tests/test_docs.py` lists the same.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_COMMAND = re.compile(r"(uvx? |pip |python |torchrun |make |accelerate launch \S*\.py|(\.ci/run)$|(train|(scripts|examples)/[\w/]+)\.py )")
_MARK = re.compile(r"^<!-- not run: (.*?) \| (.*?) -->$", re.MULTILINE)


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """Contents of the page's fenced blocks of a language; "" for those that name none."""
    return [body for name, body in _FENCE.findall(text(page)) if name == language]


def commands(page: str) -> list[str]:
    """Every command of the page, in order of appearance, each once."""
    lines = [line.split("  # ")[0].strip() for body in blocks(page, "") for line in body.replace("\\\n", " ").splitlines()]
    prose = _MARK.sub("", _FENCE.sub("", text(page)))
    spans = [" ".join(span.split()) for span in _SPAN.findall(prose)]
    found = [*lines, *(span for span in spans if _COMMAND.match(span))]
    return list(dict.fromkeys(" ".join(command.split()) for command in found if command and not command.startswith("#")))


def not_run(page: str) -> dict[str, str]:
    """Command -> why no test runs it, as the page states it."""
    return dict(_MARK.findall(text(page)))


def languages(page: str) -> set[str]:
    """The languages that the page's fenced blocks name."""
    return {name for name, _ in _FENCE.findall(text(page))}
