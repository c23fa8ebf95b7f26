"""Accuracies without a model: by hand, on any data, and as an option of a recipe and of the command line."""

import json

import numpy as np
import pytest
import yaml
from accelerate import Accelerator

from mmpretrain.config.recipe import assemble, dump
from mmpretrain.evaluators import OptionError, build_evaluator
from mmpretrain.evaluators.base import result_line
from mmpretrain.evaluators.baselines import NEIGHBOURS, colour_histogram, measure, neighbour_hits, raw_pixels
from mmpretrain.evaluators.data.datasets import DataConfig, open_dataset
from tests import runs
from tests.evaluators.fake import COLOURS, ColourModel, colour_folder, picture, write

MEASURED = ["colour_histogram", "raw_pixels"]


def test_votes_by_hand():
    train, labels = np.array([[0.0], [1.0], [2.0], [10.0]], dtype=np.float32), np.array([0, 1, 1, 2])
    hits = neighbour_hits(train, labels, np.array([[0.4], [9.0]], dtype=np.float32), np.array([0, 2]))
    assert dict(zip(NEIGHBOURS, hits.tolist())) == {1: 2, 5: 0, 20: 0, 50: 0}  # all four vote: class 1 has two


def test_a_query_does_not_vote_for_itself():
    rows, labels = np.array([[0.0], [0.1], [5.0]], dtype=np.float32), np.array([0, 1, 2])
    assert neighbour_hits(rows, labels, rows, labels)[0] == 3
    assert neighbour_hits(rows, labels, rows, labels, own=np.arange(3))[0] == 0


def test_raw_pixels_and_histogram_by_hand():
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    image[:2, :2] = 255
    assert raw_pixels(image, side=2).tolist() == [1.0] * 3 + [0.0] * 9
    histogram = colour_histogram(image)
    assert histogram[511] == pytest.approx(0.5)  # a quarter of the pixels, square root
    assert (histogram**2).sum() == pytest.approx(1.0)


def test_classes_are_matched_by_name_and_a_damaged_image_is_left_out(tmp_path):
    train = colour_folder(tmp_path / "train", ["yellow", "green", "red"], per_class=3)
    test = colour_folder(tmp_path / "test", ["blue", "green", "red"])
    write(test / "red" / "damaged.png", b"no picture")
    sets = [open_dataset(DataConfig(str(folder)), "classification") for folder in (train, test)]
    found = measure(MEASURED, *sets, Accelerator(cpu=True), threads=2)
    assert found == {"colour_histogram_knn": pytest.approx(4 / 6), "raw_pixel_knn": pytest.approx(4 / 6)}  # no neighbour is blue
    alone = measure(MEASURED, None, sets[1], Accelerator(cpu=True), threads=2)  # each image's neighbours are the others
    assert alone == {"colour_histogram_knn": 1.0, "raw_pixel_knn": 1.0}


@pytest.mark.parametrize("kind", ["zero_shot", "knn", "linear_probe"])
def test_images_of_any_size_in_a_folder_get_baselines(kind, tmp_path):
    folder = colour_folder(tmp_path / "train", list(COLOURS), per_class=4)
    other = tmp_path / "test"
    for i, colour in enumerate(COLOURS):
        write(other / colour / "0.jpeg", picture(colour, "jpeg", (9 + i, 40 - i)))
    options = ["baselines=colour_histogram,raw_pixels", f"data={other}", f"train={folder}"]
    evaluator = build_evaluator(kind, [*options, *(["c=1"] if kind == "linear_probe" else [])])
    evaluator.preflight()
    result = evaluator(ColourModel(), Accelerator(cpu=True))
    assert result.baselines == {"colour_histogram_knn": 1.0, "raw_pixel_knn": 1.0}
    line = result_line(kind, kind, evaluator.config, ColourModel(), result)
    assert line["baselines"] == result.baselines
    assert line["metrics"]["acc1"] == 1.0
    without = build_evaluator(kind, options[1:])
    assert "baselines" not in result_line(kind, kind, without.config, ColourModel(), without(ColourModel(), Accelerator(cpu=True)))


def test_baselines_are_measured_once_for_the_same_data(tmp_path, monkeypatch):
    folder = colour_folder(tmp_path, ["red", "blue"], per_class=3)
    evaluator = build_evaluator("zero_shot", {"data": str(folder), "baselines": ["colour_histogram"]})
    first = evaluator(ColourModel(), Accelerator(cpu=True)).baselines
    monkeypatch.setattr("mmpretrain.evaluators.baselines.neighbour_hits", lambda *a: pytest.fail("measured again"))
    assert evaluator(ColourModel(), Accelerator(cpu=True)).baselines == first == {"colour_histogram_knn": 1.0}


def test_an_unknown_baseline_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(OptionError, match="did you mean 'colour_histogram'"):
        build_evaluator("zero_shot", ["data=x", "baselines=color_histogram"])
    with pytest.raises(OptionError, match=r"evaluators\.e\.baselines.*did you mean 'raw_pixels'"):
        assemble(runs.recipe(tmp_path, tmp_path, evaluators={"e": {"kind": "knn", "data": "x", "baselines": ["raw_pixel"]}}))


def test_numbers_known_from_elsewhere_keep_their_earlier_spelling(tmp_path):
    options = {"kind": "knn", "data": "x", "baselines": {"ceiling": 0.9}}
    config = assemble(runs.recipe(tmp_path, tmp_path, evaluators={"e": options}))
    assert config.evaluators["e"].reference == {"ceiling": 0.9}
    assert config.evaluators["e"].options.baselines == []
    assert '"reference": {"ceiling": 0.9}' in json.dumps(yaml.safe_load(dump(config)))
