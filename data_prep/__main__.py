"""The command line `python -m data_prep`. The module of a command is imported only when that command runs."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from click import Command, Context
from typer.core import TyperGroup
from typer.main import get_command

# command -> (module, function or typer app, example)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "build": ("data_prep.build.commands", "app", ""),
    "index": ("data_prep.index", "index", "python -m data_prep index 'shards/theirs/{00000..00099}.tar'"),
    "validate": ("data_prep.validate.command", "validate", "python -m data_prep validate shards/pairs --repair shards/repaired"),
    "stats": ("data_prep.stats.command", "stats", "python -m data_prep stats shards/pairs --out pairs.html"),
    "filter": ("data_prep.filter.command", "filter_", "python -m data_prep filter shards/pairs --out shards/kept --min-side 200"),
    "dedup": ("data_prep.dedup.command", "dedup", "python -m data_prep dedup shards/pairs --out shards/unique"),
    "shuffle": ("data_prep.shuffle", "shuffle", "python -m data_prep shuffle data/demo/pairs --out data/shuffled"),
    "mix": ("data_prep.mix.command", "mix", "python -m data_prep mix configs/demo.yaml"),
    "demo": ("data_prep.demo.command", "demo", "python -m data_prep demo data/demo"),
}


class Commands(TyperGroup):
    """A command group that imports only the module of the command that is run."""

    def list_commands(self, ctx: Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, name, example = COMMANDS[cmd_name]
        target: Any = getattr(import_module(module), name)
        if not isinstance(target, typer.Typer):
            single = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
            single.command(cmd_name, epilog=example)(target)
            target = single
        command: Any = get_command(target)  # typer may carry a click of its own
        command.name = cmd_name
        return command


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


@app.callback()
def main() -> None:
    """Make, check and index training shards."""


if __name__ == "__main__":
    app(prog_name="python -m data_prep")
