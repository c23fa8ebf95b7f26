"""Train a recipe: accelerate launch train.py [RECIPE.yaml] [key=value ...]"""

import argparse
import sys
from pathlib import Path

from mmpretrain import cpu, import_stubs
from mmpretrain.errors import MMPretrainError, file_errors

cpu.bound_spinning()  # read when torch is imported, which everything below may do


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("recipe", nargs="?", default=None, help="a YAML recipe; default: configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, dots for nesting")
    parser.add_argument("--print-config", action="store_true", help="show the resolved recipe and stop")
    parser.add_argument("--plugin", action="append", default=[], metavar="MODULE", help="a module whose classes the recipe may name")
    parser.add_argument("-h", "--help", action="store_true", help="every option with its documentation")
    arguments = parser.parse_intermixed_args()  # options may stand anywhere among the overrides

    shown_only = arguments.help or arguments.print_config
    overrides = arguments.overrides
    recipe = arguments.recipe
    if recipe is not None and "=" in recipe:
        recipe, overrides = None, [recipe, *overrides]
    default = Path(__file__).parent / "configs" / "demo.yaml"
    recipe = recipe or default
    demo = None
    if shown_only:  # without the libraries that compute: in half a second, not in ten
        import_stubs.install()
    elif Path(recipe).resolve() == default.resolve():
        from data_prep.demo.background import DemoData

        demo = DemoData("data/demo")  # begins to write its shards, while this process imports
    from mmpretrain import plugins
    from mmpretrain.config import recipe as recipes

    if arguments.help:
        parser.print_help()
        print(recipes.help_text())
        return 0
    try:
        plugins.allow(arguments.plugin)
        config = recipes.load(recipe, overrides)
        if arguments.print_config:
            print(recipes.dump(config))
            return 0
        with file_errors():
            return run(config, demo)
    except MMPretrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    finally:
        if demo is not None:
            demo.stop()


def run(config, demo) -> int:
    """Train; the libraries that compute are imported here."""
    from mmpretrain.trainer import train

    if demo is not None:
        return train(config, demo.prepare(config))
    return train(config)


if __name__ == "__main__":
    sys.exit(main())
