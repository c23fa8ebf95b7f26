"""Golden losses of every shipped recipe; tests/golden/__init__.py explains how they are taken and rewritten."""

import json
import math
import warnings
from pathlib import Path

import pytest

from tests import golden


@pytest.fixture(scope="module")
def measured(request, tmp_path_factory):
    """A folder with a .jsonl file of each recipe whose test was selected: all trained by one process, which imports PyTorch once."""
    selected = {
        item.callspec.params.get("name") for item in request.session.items if item.path == Path(__file__) and hasattr(item, "callspec")
    }
    folder = tmp_path_factory.mktemp("golden")
    golden.measure([name for name in golden.RECIPES if name in selected], folder)
    return folder


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if g.slow else n for n, g in golden.RECIPES.items()])
def test_losses_and_gradient_norms_of_twenty_steps_are_the_recorded_ones(name, measured):
    recorded = golden.read(golden.FOLDER / f"{name}.jsonl")
    [(kind, lines)] = golden.read(measured / f"{name}.jsonl").items()
    exact = kind in recorded
    expected = recorded[kind] if exact else next(iter(recorded.values()))
    if not exact:
        warnings.warn(
            f"no golden losses of {name} for {kind!r}: compared to {golden.TOLERANCE} with {next(iter(recorded))!r}. "
            f"Record them with code that passes: python -m tests.golden --add {name}",
            stacklevel=1,
        )
    assert len(expected) == golden.STEPS
    differing = golden.differences(expected, lines, 0.0 if exact else golden.TOLERANCE)
    remedy = f"If the change is meant to move losses, or a library was upgraded: python -m tests.golden {name}"
    assert not differing, "\n".join([f"{len(differing)} values of {name} differ ({kind}).", *differing[:10], remedy])


def test_every_shipped_recipe_has_golden_losses():
    shipped = {path.relative_to(golden.ROOT / "configs").as_posix() for path in (golden.ROOT / "configs").rglob("*.yaml")}
    assert shipped == {plan.recipe for plan in golden.RECIPES.values()}, (
        "add the recipe to RECIPES in tests/golden, then: python -m tests.golden NAME"
    )


def test_a_last_digit_differs_and_a_tolerance_forgives_it():
    expected = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]
    moved = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": math.nextafter(2.25, 3)}]
    assert golden.differences(expected, expected) == []
    assert golden.differences(expected, moved) == ["step 2, loss: 2.2500000000000004, expected 2.25"]
    assert golden.differences(expected, moved, 1e-4) == []


def test_missing_steps_missing_losses_and_nan_are_differences():
    expected = [{"step": 1, "loss": 2.5, "clip/loss": 2.5}, {"step": 2, "loss": 2.25, "clip/loss": 2.25}]
    assert golden.differences(expected, [{"step": 1, "loss": math.nan}], 1e-4) == [
        "step 1, loss: nan, expected 2.5",
        "step 1, clip/loss: None, expected 2.5",
        "step 2, step: None, expected 2",
        "step 2, loss: None, expected 2.25",
        "step 2, clip/loss: None, expected 2.25",
        "1 steps, expected 2",
    ]


def test_a_golden_file_gives_every_float_back_as_it_was(tmp_path):
    value = 0.1 + 0.2
    kinds = {"a": [{"step": 1, "loss": value}], "b": [{"step": 1, "loss": math.nextafter(value, 1)}]}
    golden.write(tmp_path / "x.jsonl", kinds)
    assert golden.read(tmp_path / "x.jsonl") == kinds
    assert [json.loads(text)["kind"] for text in (tmp_path / "x.jsonl").read_text().splitlines()] == ["a", "b"]
