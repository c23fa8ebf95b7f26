"""The objective protocol: what is refused at the start, spans of the run, mixing, frozen networks, plug-ins, flags read late."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from mmpretrain import distributed, launch, plugins, rng, trainer
from mmpretrain.config import recipe as recipes
from mmpretrain.config.build import OptionError
from mmpretrain.heads import GlobalBatchNorm, use_global_statistics
from mmpretrain.mixing import mix_pictures, partners
from mmpretrain.model import PretrainModel, check_outputs
from mmpretrain.objectives import OBJECTIVES, Objective
from mmpretrain.objectives.base import Augment
from mmpretrain.trainer import train
from mmpretrain.types import Encode, MixSpec
from tests import runs, tiny


def build(objective):
    return PretrainModel(tiny.towers(), {"own": objective}, {"own": 1.0})


class Own(Objective):
    def __init__(self, **encode) -> None:
        super().__init__()
        self.needs = {"image": Encode("pairs", tiny.context(tiny.towers()).image_view(Augment()), **encode)}
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, image):
        return {"loss": image.pooled.mean() * self.weight}


def test_a_misspelt_network_is_an_error_with_the_nearest_name():
    with pytest.raises(ValueError, match="network 'teachr'; did you mean 'teacher'"):
        build(Own(network="teachr"))


def test_reading_an_output_that_was_not_asked_for_says_what_to_add():
    model = build(Own())
    batch = tiny.batch(model, double=False)
    with pytest.raises(ValueError, match=r"objective 'own' reads image\.pooled, but its Encode asks for \['features'\]: add 'pooled'"):
        model(batch)


def test_other_argument_names_are_refused():
    class Wrong(Own):
        def forward(self, picture):
            return {}

    with pytest.raises(ValueError, match=r"forward takes \['picture'\], but its needs are \['image'\]"):
        build(Wrong())


@pytest.mark.parametrize(
    ("outputs", "message"),
    [({"accuracy": torch.ones(())}, "without a loss"), ({"loss": torch.ones(()), "each": torch.ones(3)}, "each must be scalar")],
)
def test_what_an_objective_returns_is_checked(outputs, message):
    with pytest.raises(ValueError, match=message):
        check_outputs("own", outputs)


def test_per_row_with_batch_norm_is_refused_under_accumulate(tmp_path, monkeypatch):
    class Normed(OBJECTIVES["mae"]):
        def __init__(self, config, context):
            super().__init__(config, context)
            self.norm = GlobalBatchNorm(config.width)

    monkeypatch.setitem(OBJECTIVES.known, "normed", Normed)
    data = runs.shards(tmp_path / "data")
    objectives = {"normed": {"source": "photos", **tiny.OPTIONS["mae"]}, "clip": {"source": "pairs"}}
    with pytest.raises(OptionError, match="'normed' runs chunk by chunk with a BatchNorm"):
        train(recipes.assemble(runs.recipe(data, tmp_path / "run", objectives=objectives, accumulate=2)))


# -- spans --------------------------------------------------------------------------------------------------------------


def spanned(tmp_path, name="run", **changes):
    objectives = {
        "clip": {"source": "pairs"},
        "simclr": {"source": "photos", "start": 0.5},
        "masked_text": {"source": "pairs", "weight": 0.1, "stop": 0.25},
    }
    return runs.recipe(tmp_path / "data", tmp_path / name, objectives=objectives, **changes)


def test_outside_its_span_an_objective_has_no_view_no_forward_and_no_step(tmp_path, monkeypatch):
    runs.shards(tmp_path / "data")
    seen, forward = [], PretrainModel.forward

    def notes(self, batch, *names):
        if step_of:
            seen.append((step_of[-1], {s: len(rows.views) for s, rows in batch.items()}, list(self.active)))
        return forward(self, batch, *names)

    step_of, real = [], trainer.set_learning_rate
    monkeypatch.setattr(trainer, "set_learning_rate", lambda o, c, step, n: (step_of.append(step), real(o, c, step, n))[1])
    monkeypatch.setattr(PretrainModel, "forward", notes)
    train(recipes.assemble(spanned(tmp_path, cost_every=0, checkpoint={"every": 1, "keep": 20})))
    assert [(step, views) for step, views, _ in seen] == [
        (step, {"pairs": 3 if step < 3 else 2, "photos": 2 if step >= 6 else 0}) for step in range(12)
    ]
    assert [active for *_, active in seen] == [
        ["clip", *(["simclr"] if step >= 6 else []), *(["masked_text"] if step < 3 else [])] for step in range(12)
    ]
    lines = runs.logged(tmp_path / "run")
    assert [("simclr/loss" in line, "masked_text/loss" in line) for line in lines] == [(i >= 6, i < 3) for i in range(12)]

    from mmpretrain.checkpoint import load_tensors

    states = [load_tensors(tmp_path / "run" / "checkpoints" / f"step-{step:08d}", "objectives") for step in range(1, 13)]
    head, decoder = "simclr.projection_head.0.weight", "masked_text.decoder.weight"
    assert all(torch.equal(state[head], states[0][head]) for state in states[:6])
    assert not torch.equal(states[5][head], states[6][head])
    assert all(torch.equal(state[decoder], states[2][decoder]) for state in states[2:])
    assert not torch.equal(states[1][decoder], states[2][decoder])


@pytest.mark.parametrize("stop", [2, 5, 8])
def test_a_resume_between_spans_is_bit_identical(tmp_path, stop):
    runs.shards(tmp_path / "data")
    train(recipes.assemble(spanned(tmp_path, "whole")))
    with runs.broken_off(stop):
        train(recipes.assemble(spanned(tmp_path, "broken")))
    train(recipes.assemble(spanned(tmp_path, "broken")))
    runs.assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_an_empty_span_is_refused(tmp_path):
    runs.shards(tmp_path / "data")
    objectives = {"clip": {"source": "pairs", "start": 0.5, "stop": 0.5}}
    with pytest.raises(OptionError, match=r"start 0\.5 is not before stop 0\.5"):
        recipes.assemble(runs.recipe(tmp_path / "data", tmp_path / "run", objectives=objectives))


# -- mixing -------------------------------------------------------------------------------------------------------------


def test_mixed_pictures_are_the_shares_that_are_reported():
    pixels = torch.rand(64, 3, 10, 12, dtype=torch.float64)
    seeds = rng.combine(5, torch.arange(64))
    mixed, share = mix_pictures(MixSpec(mixup=0.8), pixels, seeds)
    assert torch.equal(share[::2], share[1::2])
    for i in range(64):
        torch.testing.assert_close(mixed[i], share[i].double() * pixels[i] + (1 - share[i].double()) * pixels[i ^ 1])
    mixed, share = mix_pictures(MixSpec(cutmix=1.0), pixels, seeds)
    for i in range(64):
        own = (mixed[i] == pixels[i]).all(0)
        assert ((mixed[i] == pixels[i ^ 1]).all(0) | own).all()
        assert own.float().mean().item() == pytest.approx(share[i].item(), abs=1e-6)
    assert torch.equal(partners(torch.arange(6)), torch.tensor([1, 0, 3, 2, 5, 4]))


def test_both_kinds_of_mixing_take_turns():
    seeds = rng.combine(5, torch.arange(2000))
    pixels = torch.arange(2000.0)[:, None, None, None].expand(-1, 3, 4, 4)
    mixed, _ = mix_pictures(MixSpec(mixup=1.0, cutmix=1.0), pixels, seeds)
    blended = (mixed != pixels) & (mixed != partners(pixels))
    assert 0.4 < blended.flatten(1).any(1).float().mean().item() < 0.6


def test_mixing_does_not_depend_on_chunks():
    pixels, seeds = torch.rand(8, 3, 4, 4), rng.combine(5, torch.arange(8))
    whole = mix_pictures(MixSpec(mixup=0.4, cutmix=0.6), pixels, seeds)
    for part in (slice(0, 4), slice(4, 8), slice(2, 4)):
        for a, b in zip(mix_pictures(MixSpec(mixup=0.4, cutmix=0.6), pixels[part], seeds[part]), whole):
            assert torch.equal(a, b[part])
    with pytest.raises(ValueError, match="3 rows on a rank"):
        mix_pictures(MixSpec(mixup=0.4), pixels[:3], seeds[:3])


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_beta_has_the_mean_and_variance_of_its_distribution(alpha):
    drawn = rng.beta(rng.combine(1, torch.arange(40_000)), "x", alpha)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.01)
    assert drawn.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


# -- frozen networks ----------------------------------------------------------------------------------------------------


def test_a_frozen_network_is_encoded_at_its_own_size_and_never_moves(tmp_path, monkeypatch):
    data = runs.shards(tmp_path / "data")
    train(
        recipes.assemble(
            runs.recipe(
                data,
                tmp_path / "first",
                steps=2,
                objectives={"clip": {"source": "pairs"}},
                sources={"pairs": {"shards": str(data / "pairs" / "*.tar"), "batch_size": 8}},
            )
        )
    )

    class Distil(Objective):
        def __init__(self, config, context):
            super().__init__()
            view, theirs = context.image_view(Augment()), context.image_view(Augment(), network="old")
            self.needs = {
                "image": Encode(config.source, view),
                "target": Encode(config.source, theirs, network="old"),
            }
            self.head = nn.Linear(context.embed_dim, context.network("old", "distil").embed_dim)

        def forward(self, image, target):
            assert target.view.data.shape[-1] == 8
            assert not target.features.requires_grad
            return {"loss": (self.head(image.features) - target.features).square().mean()}

    monkeypatch.setitem(OBJECTIVES.known, "distil", Distil)
    recipe = runs.recipe(data, tmp_path / "run", steps=3, objectives={"distil": {"source": "pairs"}}, teacher=None)
    del recipe["sources"]["photos"]
    recipe["networks"] = {"old": {"model": tiny.MODEL, "init_from": str(tmp_path / "first"), "image_size": 8}}
    assert train(recipes.assemble(recipe)) == 0
    recipe["networks"] = {"older": recipe["networks"]["old"]}
    recipe["run_dir"] = str(tmp_path / "other")
    with pytest.raises(OptionError, match=r"network 'old'.*did you mean 'older'"):
        train(recipes.assemble(recipe))


# -- BatchNorm towers ---------------------------------------------------------------------------------------------------


def test_global_statistics_of_one_rank_are_torchs():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()).double()
    theirs = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()).double()
    theirs.load_state_dict(ours.state_dict())
    assert use_global_statistics(ours) == 1
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    for module in (ours, theirs):
        module(x).square().mean().backward()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


# -- plug-ins -----------------------------------------------------------------------------------------------------------

PLUGIN = """
from mmpretrain.objectives.simclr import SimCLR


class Mine(SimCLR):
    pass
"""


def test_a_recipe_imports_nothing_unless_the_module_was_named(tmp_path, monkeypatch):
    runs.shards(tmp_path / "data")
    (tmp_path / "their_package.py").write_text("import pathlib\npathlib.Path(__file__).with_name('ran').touch()\n" + PLUGIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_allowed", set())
    objectives = {"mine": {"kind": "their_package:Mine", "source": "photos"}, "clip": {"source": "pairs"}}
    recipe = runs.recipe(tmp_path / "data", tmp_path / "run", objectives=objectives, steps=2)
    with pytest.raises(OptionError, match="--plugin their_package"):
        recipes.assemble(recipe)
    assert not (tmp_path / "ran").exists()
    plugins.allow(["their_package"])
    assert train(recipes.assemble(recipe)) == 0
    assert "mine/loss" in runs.logged(tmp_path / "run")[-1]
    with pytest.raises(OptionError, match="expected a module"):
        plugins.allow(["not a module"])
    OBJECTIVES._loaded.pop("their_package:Mine")
    sys.modules.pop("their_package")


def test_installed_packages_offer_objectives_as_entry_points(monkeypatch):
    class Point:
        name = "offered"

        @staticmethod
        def load():
            return OBJECTIVES["simclr"]

    monkeypatch.setattr(plugins, "entry_points", lambda group: [Point] if group == "mmpretrain.objectives" else [])
    assert "offered" in OBJECTIVES
    assert OBJECTIVES["offered"] is OBJECTIVES["simclr"]
    assert "other" not in OBJECTIVES
    OBJECTIVES._loaded.pop("offered")


# -- flags that are read late -------------------------------------------------------------------------------------------


def late(monkeypatch):
    setup = trainer.setup

    def reads_late(*arguments):
        run = setup(*arguments)
        run.late = True
        return run

    monkeypatch.setattr(trainer, "setup", reads_late)


def test_reading_flags_a_step_late_changes_nothing(tmp_path, monkeypatch):
    data = runs.shards(tmp_path / "data")
    train(recipes.assemble(runs.recipe(data, tmp_path / "now")))
    late(monkeypatch)
    train(recipes.assemble(runs.recipe(data, tmp_path / "late")))
    a, b = runs.weights(tmp_path / "now"), runs.weights(tmp_path / "late")
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert (np.abs(value - b[name]) <= np.maximum(1e-6 * np.abs(b[name]), 1e-8)).all(), name


@pytest.mark.parametrize("bad", [3, 12])
def test_a_nan_read_late_moves_nothing_and_reaches_no_checkpoint(tmp_path, monkeypatch, bad):
    """Step 3 is saved at once, step 12 is the last."""
    data = runs.shards(tmp_path / "data")
    late(monkeypatch)
    forward, real, now = PretrainModel.forward, trainer.set_learning_rate, []
    monkeypatch.setattr(trainer, "set_learning_rate", lambda o, c, step, n: (now.append(step + 1), real(o, c, step, n))[1])

    def poisoned(self, *arguments):
        loss, logs = forward(self, *arguments)
        return (loss * float("nan") if now[-1:] == [bad] else loss), logs

    monkeypatch.setattr(PretrainModel, "forward", poisoned)
    assert train(recipes.assemble(runs.recipe(data, tmp_path / "run", cost_every=0, checkpoint={"every": 1, "keep": 20}))) == 0
    from mmpretrain.checkpoint import checkpoints, load_tensors

    saved = checkpoints(tmp_path / "run" / "checkpoints")
    steps = [int(path.name[5:]) for path in saved]
    assert (bad in steps) == (bad == 12)
    for path in saved:
        for stem in ("model", "objectives", "teacher"):
            assert all(math.isfinite(v.double().sum().item()) for v in load_tensors(path, stem).values())
    if bad == 12:  # the last step made no update
        a, b = (load_tensors(path, "model") for path in saved[:2])
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_flags_of_one_process_stay_where_they_are():
    flags = torch.tensor([True, False, True])
    assert distributed.any_rank_later(flags).tolist() == [True, False, True]
    assert launch is not None
