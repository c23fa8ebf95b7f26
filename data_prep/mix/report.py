"""Tables of a recipe's data mixture, for the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmpretrain.tracking.console import duration, plain


def amount(value: float | None) -> str:
    """Formats a number in three digits: 1,234,567 -> "1.23 M"; None (unknown) is a dash."""
    if value is None:
        return "–"
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            return f"{value / (1e3 if letter == 'k' else unit):.3g} {letter}"
    return f"{value:,.0f}"


def times(value: float | None) -> str:
    """Formats a number of epochs; None (unknown) is a dash."""
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:,.1f}"


def _repeats(line: Mapping[str, Any]) -> str:
    low, high = line.get("seen_at_least"), line.get("seen_at_most")
    return "–" if low is None else f"{low}×" if low == high else f"{low}–{high}×"


def table(mixture: Mapping[str, Any]) -> Table:
    """Builds the table with a column per source, and one for their sums."""
    sources = mixture["sources"]
    result = Table(show_edge=False, pad_edge=False)
    result.add_column("")
    for name in sources:
        result.add_column(Text(plain(name)), justify="right", overflow="fold")
    several = len(sources) > 1
    if several:
        result.add_column("together", justify="right")

    def row(title: str, cells: list[str], together: str = "") -> None:
        result.add_row(*(Text(plain(cell)) for cell in [title, *cells, *[together] * several]))

    lines = list(sources.values())
    row("objectives", [", ".join(line["objectives"]) for line in lines])
    row("rows per step", [f"{line['rows_per_step']:,}" for line in lines], f"{mixture['rows_per_step']:,}")
    row("share of the rows", [f"{line['share']:.1%}" for line in lines])
    row("samples", [amount(line.get("samples")) for line in lines])
    row("rows in all", [amount(line["rows"]) for line in lines], amount(mixture["rows"]))
    row("epochs", [times(line.get("epochs")) for line in lines])
    row("each sample seen", [_repeats(line) for line in lines])
    for kind in ("image", "text"):
        tokens = [line.get(f"{kind}_tokens") for line in lines]
        row(f"{kind} tokens", [amount(n) for n in tokens], amount(None if None in tokens else sum(tokens)))
    return result


def parts_table(name: str, line: Mapping[str, Any]) -> Table:
    """Builds the table of the parts of a blended source."""
    result = Table(title=Text(f"parts of {plain(name)}"), title_justify="left", show_edge=False, pad_edge=False)
    for column in ("shards", "share", "samples", "epochs"):
        result.add_column(column, justify="left" if column == "shards" else "right", overflow="fold")
    for part in line["parts"]:
        more = f" and {part['shards'] - 1} more" if part["shards"] > 1 else ""
        cells = [part["first"] + more, f"{part['share']:.1%}", amount(part["samples"]), times(part["epochs"])]
        result.add_row(*(Text(plain(cell)) for cell in cells))
    return result


def show(mixture: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints a mixture as `mix_of` returns it: tables, time and warnings."""
    console = console or Console()
    console.print(table(mixture))
    for name, line in mixture["sources"].items():
        if len(line.get("parts", [])) > 1:
            console.print("", parts_table(name, line), sep="\n")
    steps = "–" if mixture["steps"] is None else f"{mixture['steps']:,}"
    time = mixture["time"]
    if time["seconds"] is not None:
        by = "as given" if time["measured"] == "given" else f"measured in {time['measured']}"
        line = f"{steps} steps, about {duration(time['seconds'])} at {time['samples_per_s']:,.0f} samples/s, {by}"
    else:
        line = f"{steps} steps; to estimate the time give --samples-per-s, or run a few steps first"
    console.print(Text("\n" + plain(line)))
    for warning in mixture["warnings"]:
        console.print(Text(f"• {plain(warning)}", style="yellow"))
