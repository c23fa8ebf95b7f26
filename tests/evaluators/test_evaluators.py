import base64
import json
import threading
import time

import pytest
import torch
from accelerate import Accelerator

from mmpretrain.evaluators import EVALUATORS, build_evaluator, features, linear_probe
from mmpretrain.evaluators.base import OptionError, make_config
from mmpretrain.evaluators.data.datasets import DataConfig, open_dataset
from mmpretrain.evaluators.features import encode_images
from mmpretrain.evaluators.knn import knn_votes
from mmpretrain.evaluators.models import TowerModel
from mmpretrain.evaluators.zero_shot import class_embeddings, read_templates
from mmpretrain.types import Encoded, Model
from tests.evaluators.fake import COLOURS, ColourModel, colour_folder, picture, shard, write
from tests.tiny import towers


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def run(kind: str, accelerator, model=None, **options):
    return build_evaluator(kind, {"threads": 2, **options})(model or ColourModel(), accelerator)


def test_the_fake_is_a_model():
    assert isinstance(ColourModel(), Model)


def test_zero_shot_knows_colours(tmp_path, accelerator):
    colour_folder(tmp_path, list(COLOURS), 3)
    result = run("zero_shot", accelerator, data=str(tmp_path), batch_size=4, templates=["a {} picture", "{c}"])
    assert result.metrics == {"acc1": 1.0, "acc5": 1.0, "mean_per_class_recall": 1.0, "chance": pytest.approx(1 / 6)}
    assert result.n == 18


def test_wrong_labels_are_wrong_whatever_the_order(tmp_path, accelerator):
    """Folders named green and red hold each other's pictures, and class names come in any order: never above zero."""
    colour_folder(tmp_path, ["red", "green"], 2, {"red": "green", "green": "red"})
    for classes in (["red", "green"], ["green", "red"], None):
        assert run("zero_shot", accelerator, data=str(tmp_path), classes=classes).metrics["acc1"] == 0.0


def test_mean_per_class_recall_and_acc1_differ_on_unbalanced_data(tmp_path, accelerator):
    colour_folder(tmp_path, ["red"], 3)
    write(tmp_path / "blue" / "0.png", picture("red"))
    result = run("zero_shot", accelerator, data=str(tmp_path))
    assert result.metrics["acc1"] == 0.75
    assert result.metrics["mean_per_class_recall"] == 0.5
    assert result.tables["confusions"] == [{"true": "blue", "predicted": "red", "count": 1, "fraction": 1.0}]
    wrong = [row for row in result.tables["predictions"] if not row["correct"]]
    assert [(row["key"], row["truth"], row["predicted"]) for row in wrong] == [("blue/0.png", "blue", "red")]
    assert base64.b64decode(wrong[0]["thumbnail"]).startswith(b"\x89PNG")


def test_equal_class_names_are_one_class(tmp_path, accelerator):
    classes = {"crane_bird": "red", "crane_machine": "red", "b": "blue"}
    colour_folder(tmp_path, ["red", "blue"], 2, {"red": "crane_bird", "blue": "b"})
    write(tmp_path / "crane_machine" / "0.png", picture("red"))
    result = run("zero_shot", accelerator, data=str(tmp_path), classes=classes)
    assert (result.metrics["acc1"], result.n) == (1.0, 5)


def test_class_embeddings_are_the_renormalised_mean_of_normalised_prompts(accelerator):
    class TwoPrompts(ColourModel):
        def texts(self, texts):
            return torch.tensor([[3.0, 0.0] if text.startswith("a") else [0.0, 0.5] for text in texts])

    found = class_embeddings(TwoPrompts(), ["x", "y", "z"], ["a {}", "b {}"], accelerator, batch_size=4)
    torch.testing.assert_close(found, torch.full((3, 2), 0.5**0.5))


def test_templates(tmp_path):
    assert (len(read_templates("openai")), len(read_templates("simple")), len(read_templates(None))) == (80, 7, 7)
    assert read_templates(None, ["their {c}."]) == ["their {}."]
    assert read_templates(str(write(tmp_path / "t.txt", b"a {c}\n\nthe {}\n"))) == ["a {}", "the {}"]
    for wrong in ("nowhere.txt", ["no placeholder"], ["{} and {c}"]):
        with pytest.raises(OptionError, match="templates"):
            read_templates(wrong)


def test_numbers_are_no_class_names(tmp_path, accelerator):
    shard(tmp_path / "0.tar", [("a", {"png": picture("red"), "cls": b"0"})])
    with pytest.raises(OptionError, match="zero-shot needs names: add classes=FILE"):
        run("zero_shot", accelerator, data=str(tmp_path))


def test_bad_images_are_named_and_bounded(tmp_path, accelerator):
    colour_folder(tmp_path, ["red", "blue"], 4)
    write(tmp_path / "blue" / "9.png", picture("blue")[:40])
    result = run("zero_shot", accelerator, data=str(tmp_path), max_bad_fraction=0.2)
    assert (result.n, result.metrics["acc1"]) == (8, 1.0)
    assert result.tables["skipped"][0]["key"] == "blue/9.png"
    assert result.tables["skipped"][0]["reason"].startswith("undecodable_image")
    with pytest.raises(RuntimeError, match=r"1 of 9 items cannot be used \(1 undecodable_image\).*blue/9\.png"):
        run("zero_shot", accelerator, data=str(tmp_path))


def retrieval_csv(tmp_path) -> str:
    for name in COLOURS:
        write(tmp_path / f"{name}.png", picture(name))
    rows = [f"{name}.png,the {name} one" for name in COLOURS] + ["red.png,crimson red", "blue.png,a cyan sky"]
    return str(write(tmp_path / "pairs.csv", "\n".join(["filepath,title", *rows]).encode()))


def test_retrieval_with_several_captions(tmp_path, accelerator):
    result = run("retrieval", accelerator, data=retrieval_csv(tmp_path), tile=3)
    metrics = result.metrics
    assert result.n == 6
    # Of 8 texts, "a cyan sky" belongs to the blue image: cyan scores 1, then blue and green tie at 0.707 (a tie counts against it).
    assert metrics["image_retrieval_recall@1"] == pytest.approx(7 / 8)
    assert metrics["image_retrieval_recall@5"] == 1.0
    # The cyan image: its own text ties with blue's "a cyan sky".
    assert metrics["text_retrieval_recall@1"] == pytest.approx(5 / 6)
    assert metrics["text_retrieval_recall@10"] == 1.0


def test_binding(tmp_path, accelerator):
    texts = [("red", "blue"), ("blue", "red"), ("red red", "red")]  # the last ties
    samples = [
        (f"s{i}", {"png": picture("red"), "json": json.dumps({"caption": right, "swap": wrong}).encode()})
        for i, (right, wrong) in enumerate(texts)
    ]
    shard(tmp_path / "0.tar", samples)
    assert run("binding", accelerator, data=str(tmp_path)).metrics == {"binding_acc": pytest.approx(1 / 3)}
    shard(tmp_path / "0.tar", [("a", {"png": picture("red"), "json": b"{}"})])
    with pytest.raises(OptionError, match="1 samples have no `caption` and `swap`"):
        run("binding", accelerator, data=str(tmp_path))


@pytest.mark.parametrize("kind", ["knn", "linear_probe"])
def test_frozen_features_classify(tmp_path, accelerator, kind):
    colour_folder(tmp_path / "train", ["red", "green", "blue"], 5)
    colour_folder(tmp_path / "test", ["red", "green", "blue"], 2)
    write(tmp_path / "test" / "red" / "odd.png", picture("blue"))
    result = run(kind, accelerator, data=str(tmp_path), features="both", **({"k": 3} if kind == "knn" else {"c": [0.1, 10]}))
    assert result.n == 7
    for prefix in ("", "features_"):
        assert result.metrics[f"{prefix}acc1"] == pytest.approx(6 / 7)
        assert result.metrics[f"{prefix}mean_per_class_recall"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert result.tables["confusions"][0] == {"true": "red", "predicted": "blue", "count": 1, "fraction": pytest.approx(1 / 3)}


@pytest.mark.parametrize("tile", [7, 2048])
def test_of_equally_near_rows_the_earlier_ones_vote(tile):
    train = torch.ones(3000, 4)
    labels = torch.arange(3000)
    votes = knn_votes(torch.ones(2, 4), train, labels, 3000, k=5, temperature=0.07, tile=tile)
    assert torch.equal(votes.nonzero()[:, 1].view(2, 5), torch.arange(5).expand(2, 5))


def test_equal_votes_of_neighbours_count_against_the_model_and_the_smallest_further_vote_decides(tmp_path, accelerator):
    colour_folder(tmp_path / "train", ["red", "blue"], 1)
    for label in ("red", "blue"):  # purple is as near to red as to blue
        write(tmp_path / "test" / label / "0.png", picture("purple"))
    options = {"data": str(tmp_path), "temperature": 0.05}
    assert run("knn", accelerator, k=2, **options).metrics["acc1"] == 0.0
    write(tmp_path / "train" / "red" / "1.png", picture("green"))  # of cosine 0: its vote weighs 7e-7 of a near one's
    assert run("knn", accelerator, k=3, **options).metrics["acc1"] == 0.5


@pytest.mark.parametrize(("difference", "acc1"), [(0.0, 0.0), (3e-7, 0.0), (1e-5, 0.5)])
def test_scores_of_a_probe_that_differ_by_rounding_alone_are_a_tie_against_the_model(tmp_path, accelerator, monkeypatch, difference, acc1):
    colour_folder(tmp_path / "train", ["red", "blue"], 2)
    colour_folder(tmp_path / "test", ["red", "blue"], 1)
    weights = torch.zeros(2, 3), torch.tensor([0.0, difference])
    monkeypatch.setattr(linear_probe, "fit", lambda *args: weights)
    metrics = run("linear_probe", accelerator, data=str(tmp_path), c=[1.0], features="pooled").metrics
    assert metrics["acc1"] == metrics["mean_per_class_recall"] == acc1


def test_of_equally_accurate_strengths_the_probe_takes_the_smallest_c():
    x = torch.tensor([[-1.0], [1.0]]).repeat(20, 1)
    config = linear_probe.Config(data="unused", c=[10.0, 0.1, 1.0])
    chosen, tried = linear_probe.choose_c(x, torch.tensor([0, 1]).repeat(20), 2, config)
    assert tried == [(0.1, 1.0), (1.0, 1.0), (10.0, 1.0)]
    assert chosen == 0.1


def test_features_are_kept_by_weights_and_data(tmp_path, accelerator):
    data = colour_folder(tmp_path / "data", ["red", "green"], 3)
    config = DataConfig(str(data), cache=str(tmp_path / "cache"), batch_size=2, threads=1)
    first, again, other = ColourModel(), ColourModel(), ColourModel()
    found = encode_images(first, open_dataset(config, "classification"), accelerator, config)
    kept = encode_images(again, open_dataset(config, "classification"), accelerator, config)
    assert (first.calls, again.calls) == (3, 0)
    assert torch.equal(found.rows, kept.rows)
    assert torch.equal(found.values["features"], kept.values["features"])
    other.fingerprint = "other weights"
    encode_images(other, open_dataset(config, "classification"), accelerator, config)
    assert other.calls == 3
    write(data / "red" / "0.png", picture("blue", size=(30, 30)))
    encode_images(again, open_dataset(config, "classification"), accelerator, config)
    assert again.calls == 3


def test_options(tmp_path):
    config = make_config(EVALUATORS["knn"].Config, ["data=x", "k=5", "temperature=1e-1", "exclude=[a-z]", "background=[0, 0, 0]"])
    assert (config.k, config.temperature, config.exclude, config.background) == (5, 0.1, "[a-z]", (0, 0, 0))
    assert make_config(EVALUATORS["zero_shot"].Config, ["data=x", "templates={c} icon"]).templates == "{c} icon"
    for wrong, message in {
        "temprature=1": "did you mean 'temperature'",
        "k=many": "expected int",
        "k": "expected key=value",
        "features=pool": "pooled",
    }.items():
        with pytest.raises(OptionError, match=message):
            make_config(EVALUATORS["knn"].Config, ["data=x", wrong])
    with pytest.raises(OptionError, match="'data' is required"):
        build_evaluator("knn", [])
    with pytest.raises(OptionError, match="did you mean 'zero_shot'"):
        build_evaluator("zeroshot", [])


@pytest.mark.parametrize(("spoiled", "message"), [("images", "features of red/0.png"), ("texts", "features of the text 'a red'")])
def test_values_that_are_not_finite_are_an_error_naming_the_model(tmp_path, accelerator, spoiled, message):
    class Broken(ColourModel):
        fingerprint = "0123456789abcdef"

        def images(self, pixels):
            found = super().images(pixels)
            red = found.features[:, :1] > 0.9
            return Encoded(*(x.masked_fill(red & (spoiled == "images"), float("nan")) for x in found[:2]))

        def texts(self, texts):
            return super().texts(texts) * torch.tensor([[float("inf") if spoiled == "texts" and "red" in t else 1.0] for t in texts])

    colour_folder(tmp_path, ["blue", "red"], 1)
    with pytest.raises(RuntimeError, match=f"model 0123456789ab gives values that are not finite for 1 of 2 inputs, first the {message}"):
        run("zero_shot", accelerator, Broken(), data=str(tmp_path), templates=["a {}"])


def test_a_decoder_that_hangs_is_an_error_that_names_the_item(tmp_path, monkeypatch):
    colour_folder(tmp_path, ["red", "blue"], 2)
    dataset = open_dataset(DataConfig(str(tmp_path)), "classification")
    over = threading.Event()
    dataset.items[2].read = lambda: over.wait(60) and b""
    monkeypatch.setattr(features, "TIMEOUT_S", 0.3)
    began = time.monotonic()
    try:
        with pytest.raises(TimeoutError, match=r"no batch of images in 0.3 s; being read or decoded are red/0\.png"):
            list(features.images(dataset, [[0, 1], [2, 3]], features.center_view(ColourModel()), threads=2))
        assert time.monotonic() - began < 20
    finally:
        over.set()


def test_kept_features_of_another_choice_of_outputs_are_not_taken(tmp_path, accelerator):
    config = DataConfig(str(colour_folder(tmp_path / "data", ["red"], 2)), cache=str(tmp_path / "cache"))
    dataset = open_dataset(config, "classification")
    found = [encode_images(TowerModel(towers(), joint=joint), dataset, accelerator, config).values for joint in (True, False, True)]
    assert [sorted(values) for values in found] == [["features", "pooled"], ["pooled"], ["features", "pooled"]]


def test_templates_inline_and_beside_shards(tmp_path, accelerator):
    assert make_config(EVALUATORS["zero_shot"].Config, ["data=x", 'templates=["{c}", "a {c}"]']).templates == ["{c}", "a {c}"]
    shard(tmp_path / "0.tar", [("a", {"png": picture("red"), "cls": b"0"}), ("b", {"png": picture("blue"), "cls": b"1"})])
    write(tmp_path / "classnames.txt", b"red\nblue\n")
    write(tmp_path / "zeroshot_classification_templates.txt", b"{c} beside\n")
    asked = []

    class Listens(ColourModel):
        def texts(self, texts):
            asked.extend(texts)
            return super().texts(texts)

    run("zero_shot", accelerator, Listens(), data=str(tmp_path))
    assert asked == ["red beside", "blue beside"]
