"""Recipes: what is refused, where the message points, and what a continuation may change."""

import pytest

from mmpretrain import config as recipes
from mmpretrain.options import OptionError
from tests import runs


def recipe(tmp_path, **changes):
    return runs.recipe(tmp_path, tmp_path / "run", **changes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint.keep=0", r"option checkpoint\.keep=0: expected at least 1"),
        ("checkpoint.every=0", "checkpoint.every=0"),
        ("accumulate=0", "accumulate=0"),
        ("log_every=0", "log_every=0"),
        ("loader_threads=0", "loader_threads=0"),
        ("threads=0", "threads=0"),
        ("prefetch=0", "prefetch=0"),
        ("steps=-1", "steps=-1.*at least 0"),
        ("sources.pairs.batch_size=0", r"sources\.pairs\.batch_size=0"),
        ("sources.photos.image.size=0", r"sources\.photos\.image\.size=0"),
        ("optim.clip_grad_norm=0", r"optim\.clip_grad_norm=0\.0: expected more than 0"),
        ("optim.lr=nan", r"optim\.lr=nan"),
        ("objectives.clip.weight=-1", r"objectives\.clip\.weight=-1"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused(tmp_path, override, message):
    path = runs.write_recipe(tmp_path / "r.yaml", recipe(tmp_path))
    with pytest.raises(OptionError, match=message):
        recipes.load(path, [override])


def test_the_line_of_the_recipe_is_named(tmp_path):
    path = runs.write_recipe(tmp_path / "r.yaml", recipe(tmp_path, log_every=0))
    line = path.read_text().splitlines().index("log_every: 0") + 1
    with pytest.raises(OptionError, match=rf"log_every=0 \(.*r\.yaml, line {line}\): expected at least 1"):
        recipes.load(path)


def test_null_and_the_smallest_numbers_pass(tmp_path):
    path = runs.write_recipe(tmp_path / "r.yaml", recipe(tmp_path))
    config = recipes.load(path, ["optim.clip_grad_norm=null", "steps=0", "checkpoint.keep=1", "max_skipped_steps=0"])
    assert config.optim.clip_grad_norm is None
    assert config.steps == 0


def test_how_a_source_is_read_may_change_but_not_what(tmp_path):
    old = recipes.plain(recipes.assemble(recipe(tmp_path)))
    free = {"max_bad_fraction": 0.5, "max_consecutive_bad": 7, "cache_dir": "elsewhere", "cache_bytes": 5, "verify": False}
    changed = recipe(tmp_path)
    changed["sources"]["pairs"] |= free
    assert recipes.differences(old, recipes.plain(recipes.assemble(changed))) == []
    changed["sources"]["pairs"]["caption"] = "json:text"
    (line,) = recipes.differences(old, recipes.plain(recipes.assemble(changed)))
    assert line.startswith("sources.pairs.caption")
