"""Console output of a run: a progress line, tables, and text without control characters."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text


def plain(text: object) -> str:
    """Return `text` without control characters: a caption or key of an untrusted shard must not control the terminal."""
    kept = (" " if c in "\n\t\r" or unicodedata.category(c) in ("Zl", "Zp") else c for c in str(text))
    return "".join(c for c in kept if unicodedata.category(c) not in ("Cc", "Cf", "Cs"))


def duration(seconds: float) -> str:
    """Format seconds: 3723 -> "1:02:03"."""
    minutes, s = divmod(int(max(seconds, 0)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


class Progress:
    """One live console line; where the output is not a terminal, a plain line at most every `every_s` seconds."""

    def __init__(self, total_steps: int, console: Console | None = None, every_s: float = 10.0):
        self.total_steps, self.every_s = total_steps, every_s
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._printed_at = -math.inf

    def update(self, step: int, losses: Mapping[str, float], samples_per_s: float, wait_share: float, step_s: float) -> None:
        """Show the state of a step.

        Args:
            step: number of steps made.
            losses: to show, by name.
            samples_per_s: speed.
            wait_share: part of the step's time, in 0..1, that it waited for data.
            step_s: seconds per step.
        """
        parts = [f"step {step}/{self.total_steps}"]
        parts += [f"{plain(name)} {value:.4g}" for name, value in losses.items()]
        parts += [f"{samples_per_s:.0f} samples/s", f"data wait {wait_share:.0%}", f"ETA {duration((self.total_steps - step) * step_s)}"]
        line = "  ".join(parts)
        if self.console.is_terminal:
            if self._live is None:
                self._live = Live(console=self.console, auto_refresh=False)
                self._live.start()
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
            return
        now = self.console.get_time()
        if now - self._printed_at >= self.every_s or step >= self.total_steps:
            self._printed_at = now
            self.print(line)

    def print(self, item: str | Table) -> None:
        """Print above the live line. Strings lose control characters, and their square brackets are not markup."""
        self.console.print(Text("\n".join(plain(line) for line in item.split("\n"))) if isinstance(item, str) else item)

    def close(self) -> None:
        """Remove the live line."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def console_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """Make a table of rows with any columns; a row of results.jsonl gives one line per metric. Text is not markup."""
    lines = [line for row in rows for line in _by_metric(row)]
    columns = list(dict.fromkeys(k for line in lines for k in line))
    table = Table(title=Text(plain(title)) if title else None)
    for column in columns:
        table.add_column(Text(plain(column)), overflow="fold")
    for line in lines:
        cells = (line.get(c) for c in columns)
        table.add_row(*(Text("" if v is None else f"{v:.4f}" if isinstance(v, float) else plain(v)) for v in cells))
    return table


def _by_metric(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if not isinstance(row.get("metrics"), Mapping):
        return [row]
    who = {k: v for k, v in row.items() if k not in ("metrics", "model", "seed", "baselines")}  # what distinguishes the lines
    return [{**who, "metric": metric, "value": value} for metric, value in row["metrics"].items()]
