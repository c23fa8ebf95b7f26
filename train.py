"""Train a recipe: accelerate launch train.py [RECIPE.yaml] [key=value ...]"""

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("recipe", nargs="?", default=None, help="a YAML recipe; default: configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, dots for nesting")
    parser.add_argument("--print-config", action="store_true", help="show the resolved recipe and stop")
    parser.add_argument("-h", "--help", action="store_true", help="every option with its documentation")
    arguments = parser.parse_args()

    from mmpretrain import config as recipes

    if arguments.help:
        parser.print_help()
        print(recipes.help_text())
        return 0
    overrides = arguments.overrides
    recipe = arguments.recipe
    if recipe is not None and "=" in recipe:
        recipe, overrides = None, [recipe, *overrides]
    demo = Path(__file__).parent / "configs" / "demo.yaml"
    try:
        config = recipes.load(recipe or demo, overrides)
        if arguments.print_config:
            print(recipes.dump(config))
            return 0
        if recipe is None:
            from data_prep.demo import ensure_demo

            ensure_demo("data/demo")
        from mmpretrain.trainer import train

        return train(config)
    except recipes.OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
