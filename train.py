"""Train a recipe: accelerate launch train.py [RECIPE.yaml] [key=value ...]"""

import argparse
import sys
from pathlib import Path

from mmpretrain import blanks


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("recipe", nargs="?", default=None, help="a YAML recipe; default: configs/demo.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, dots for nesting")
    parser.add_argument("--print-config", action="store_true", help="show the resolved recipe and stop")
    parser.add_argument("-h", "--help", action="store_true", help="every option with its documentation")
    arguments = parser.parse_intermixed_args()  # options may stand anywhere among the overrides

    if arguments.help or arguments.print_config:  # shown without the libraries that compute: in half a second, not in ten
        blanks.install()
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
        return run(config, demo=recipe is None or Path(recipe).resolve() == demo.resolve())
    except recipes.OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(config, demo: bool) -> int:
    """Train. What is known to go wrong is one line, and status 1; anything else keeps its traceback."""
    from mmpretrain.checkpoint import CheckpointError
    from mmpretrain.data.schema import BadSampleBudgetError, ShardError
    from mmpretrain.machine import hold
    from mmpretrain.trainer import TrainingError, train

    try:
        if demo:
            from data_prep.demo import ensure_demo
            from data_prep.demo_baselines import nearest_neighbour_baselines

            with hold("data/.demo.lock"):  # one process writes them; the others of this machine wait, and find them
                found = nearest_neighbour_baselines(ensure_demo("data/demo"))
            if "test" in config.evaluators:
                config.evaluators["test"].baselines |= {k: found[k] for k in ("colour_histogram_knn", "raw_pixel_knn")}
        return train(config)
    except (BadSampleBudgetError, CheckpointError, ShardError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
