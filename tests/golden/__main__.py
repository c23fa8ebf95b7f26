"""Rewrite golden losses: python -m tests.golden [--add] [NAME ...]"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests import golden


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(golden.RECIPES)}")
    parser.add_argument("--add", action="store_true", help="keep what other kinds of arithmetic gave, for this code as it is")
    arguments = parser.parse_args()
    names = arguments.names or list(golden.RECIPES)
    unknown = [name for name in names if name not in golden.RECIPES]
    if unknown:
        parser.error(f"no golden recipe {', '.join(unknown)}; there are {', '.join(golden.RECIPES)}")
    with tempfile.TemporaryDirectory() as folder:
        golden.measure(names, Path(folder))
        for name in names:
            path = golden.FOLDER / f"{name}.jsonl"
            kept = golden.read(path) if arguments.add and path.exists() else {}
            golden.write(path, kept | golden.read(Path(folder) / path.name))
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
