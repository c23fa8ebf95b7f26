"""The demo's scenes: pure functions of (seed, split, index), balanced, and their class independent of everything else."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from data_prep.demo import scenes as demo
from data_prep.demo.render import render
from data_prep.demo.scenes import CLASSES, HELD_OUT, NUM_TRAINED, SHAPES, SIDE, SPLITS, TEXTURES, sample

INSIGNIFICANT = 1e-4  # the seed is fixed, so this is no matter of luck from run to run


@pytest.fixture(scope="module")
def scenes() -> demo.Scenes:
    return sample(0, "pairs", np.arange(42 * 100))


def test_sizes_are_those_the_benchmark_promises():
    assert NUM_TRAINED >= 40
    assert SPLITS["pairs"].count >= 10_000
    assert SPLITS["photos"].count >= 2 * SPLITS["pairs"].count
    assert SPLITS["test"].count >= 2_000
    assert len({split.number for split in SPLITS.values()}) == len(SPLITS)


def test_held_out_classes_are_new_company_for_known_words():
    trained = CLASSES[:NUM_TRAINED]
    assert not set(trained) & set(HELD_OUT)
    assert {texture for texture, _ in trained} == set(TEXTURES)
    assert {shape for _, shape in trained} == set(SHAPES)
    assert len(set(CLASSES)) == len(SHAPES) * len(TEXTURES)


@pytest.mark.parametrize("split", ["pairs", "photos"])
def test_training_never_draws_a_held_out_class_not_even_as_distractor(split: str):
    assert sample(3, split, np.arange(2000)).category.max() < NUM_TRAINED


def test_held_out_split_draws_all_of_them_and_nothing_else_as_main_object():
    label = sample(0, "heldout", np.arange(600)).label
    assert np.bincount(label).tolist() == [0] * NUM_TRAINED + [100] * len(HELD_OUT)


def test_classes_are_balanced(scenes: demo.Scenes):
    assert np.bincount(scenes.label).tolist() == [100] * NUM_TRAINED


def test_one_to_four_objects_and_the_main_one_is_the_largest(scenes: demo.Scenes):
    assert set(scenes.present.sum(1)) == {1, 2, 3, 4}
    assert scenes.present[:, 0].all()
    assert (scenes.radius[:, :1] > scenes.radius[:, 1:]).all()
    assert (scenes.category[:, 0] == scenes.label).all()


@pytest.mark.parametrize("field", ["colour", "second", "background", "background_kind", "count"])
def test_class_is_independent_of_named_nuisances(scenes: demo.Scenes, field: str):
    value = scenes.present.sum(1) if field == "count" else getattr(scenes, field)
    value = value[:, 0] if value.ndim == 2 else value
    for label in (scenes.label, demo.CLASS_SHAPE[scenes.label], demo.CLASS_TEXTURE[scenes.label]):
        table = np.zeros((label.max() + 1, value.max() + 1))
        np.add.at(table, (label, value), 1)
        assert stats.chi2_contingency(table[:, table.any(0)]).pvalue > INSIGNIFICANT


@pytest.mark.parametrize("field", ["radius", "x", "y", "angle", "texture_angle", "period", "light", "noise"])
def test_class_is_independent_of_measured_nuisances(scenes: demo.Scenes, field: str):
    value = getattr(scenes, field)
    value = value[:, 0] if value.ndim == 2 else value
    for label in (scenes.label, demo.CLASS_SHAPE[scenes.label], demo.CLASS_TEXTURE[scenes.label]):
        assert stats.kruskal(*(value[label == c] for c in np.unique(label))).pvalue > INSIGNIFICANT


def test_a_scene_does_not_depend_on_its_batch():
    alone, together = sample(7, "pairs", np.array([5])), sample(7, "pairs", np.arange(3, 12))
    image, instance = render(alone)
    images, instances = render(together)
    assert np.abs(image[0].astype(int) - images[2]).max() <= 1  # sums in another order may round a pixel differently
    assert (instance[0] == instances[2]).mean() > 0.999
    assert np.array_equal(alone.rgb[0], together.rgb[2])


def test_seeds_and_splits_draw_apart():
    index = np.arange(4)
    drawn = [sample(seed, split, index).x for seed in (0, 1) for split in SPLITS]
    for i, one in enumerate(drawn):
        assert all(not np.isclose(one[:, 0], other[:, 0]).any() for other in drawn[:i])


def test_object_colours_contrast_with_each_other_and_with_the_background(scenes: demo.Scenes):
    assert demo._CONTRASTS[scenes.colour, scenes.second].all()
    assert demo._CONTRASTS[scenes.colour, scenes.background[:, None]].all()


def test_every_class_shows_its_own_pixels():
    """All classes at one place, in one size and colour, without noise, differ in many pixels: neither shape nor texture is lost."""
    scenes = sample(0, "pairs", np.arange(len(CLASSES)))
    scenes.category[:, 0] = np.arange(len(CLASSES))
    scenes.present[:, 1:] = False
    for name in ("radius", "x", "y", "angle", "texture_angle", "texture_phase", "period", "rgb", "background_rgb", "light"):
        getattr(scenes, name)[:] = getattr(scenes, name)[0]
    scenes.x[:], scenes.y[:], scenes.radius[:], scenes.noise[:], scenes.background_kind[:] = SIDE / 2, SIDE / 2, 18, 0, 0
    images = render(scenes)[0].astype(int)
    for i in range(len(CLASSES)):
        for j in range(i):
            assert (np.abs(images[i] - images[j]).max(-1) > 60).sum() >= 60, (CLASSES[i], CLASSES[j])


def test_each_split_has_the_backgrounds_it_names_and_shifted_ones_are_new():
    trained = set(SPLITS["pairs"].backgrounds) | set(SPLITS["photos"].backgrounds)
    assert not trained & set(SPLITS["shifted"].backgrounds)
    for split in ("pairs", "photos", "shifted"):
        drawn = sample(0, split, np.arange(200))
        assert set(drawn.background_kind) == set(range(len(SPLITS[split].backgrounds)))
        assert render(sample(0, split, np.arange(40)))[0].std() > 10
