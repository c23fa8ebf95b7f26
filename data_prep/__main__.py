"""`python -m data_prep`: build, index, demo."""

from __future__ import annotations

import typer

from data_prep import build
from data_prep.demo import demo
from data_prep.index import index

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False, help="Make and index training shards.")
app.add_typer(build.app, name="build")
app.command("index", epilog="python -m data_prep index 'shards/theirs/{00000..00099}.tar'")(index)
app.command("demo", epilog="python -m data_prep demo data/demo")(demo)

if __name__ == "__main__":
    app(prog_name="python -m data_prep")
