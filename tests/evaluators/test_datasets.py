import csv
import json
import os

import pytest

from data_prep.build.readers.columns import Columns
from mmpretrain.data.source import Source
from mmpretrain.data.source_config import SourceConfig, SplitConfig
from mmpretrain.data.views import CenterView
from mmpretrain.evaluators.base import OptionError, make_config
from mmpretrain.evaluators.data.class_names import merge_duplicates, read_classes, resolve
from mmpretrain.evaluators.data.datasets import DataConfig, EvalSplit, open_dataset
from mmpretrain.evaluators.data.train_test import TrainDataConfig, open_pair
from tests.evaluators.fake import colour_folder, picture, shard, write


def pairs(dataset) -> list[tuple[str, str]]:
    return [(item.key, dataset.classes[label]) for item, label in zip(dataset.items, dataset.labels.tolist(), strict=True)]


def test_class_folder_names_are_the_labels(tmp_path):
    colour_folder(tmp_path, ["red", "green"], 1, {"red": "traffic_light"})
    dataset = open_dataset(DataConfig(str(tmp_path)), "classification")
    assert dataset.classes == ["green", "traffic light"]
    assert pairs(dataset) == [("green/0.png", "green"), ("traffic_light/0.png", "traffic light")]


def test_class_names_in_another_order_do_not_move_the_labels(tmp_path):
    """The trap: a list of names in another order than the sorted folders, matched by position, would swap the classes."""
    colour_folder(tmp_path, ["red", "green", "blue"], 1)
    dataset = open_dataset(DataConfig(str(tmp_path), classes=["red", "green", "blue"]), "classification")
    assert dataset.classes == ["red", "green", "blue"]
    assert pairs(dataset) == [("blue/0.png", "blue"), ("green/0.png", "green"), ("red/0.png", "red")]


def test_names_that_match_no_folder_are_refused_with_the_remedy(tmp_path):
    colour_folder(tmp_path, ["red", "green"], 1, {"red": "n001", "green": "n002"})
    with pytest.raises(OptionError, match=r"n001.*matched by name, not by position.*classes=FILE\.json"):
        open_dataset(DataConfig(str(tmp_path), classes=["red", "green"]), "classification")
    mapped = open_dataset(DataConfig(str(tmp_path), classes={"n002": "green", "n001": "red"}), "classification")
    assert pairs(mapped) == [("n001/0.png", "red"), ("n002/0.png", "green")]


def test_imagenet_folders_are_named_by_wordnet_id(tmp_path):
    colour_folder(tmp_path, ["red", "green"], 1, {"red": "n01440764", "green": "n02123045"})
    dataset = open_dataset(DataConfig(str(tmp_path), classes="imagenet"), "classification")
    assert pairs(dataset) == [("n01440764/0.png", "tench"), ("n02123045/0.png", "tabby cat")]
    assert len(dataset.classes) == 998  # missile and sunglasses occur twice


def test_integer_labels_sort_by_value_and_index_the_names():
    assert resolve([10, 9, 10], None, "x")[1] == ["9", "10"]
    labels, names = resolve([2, 0], ["a", "b", "c"], "x")
    assert (labels.tolist(), names) == ([2, 0], ["a", "b", "c"])
    with pytest.raises(OptionError, match="labels run from 0 to 3, but there are 3 class names"):
        resolve([3, 0], ["a", "b", "c"], "x")


def test_equal_names_are_one_class(caplog):
    labels, names = merge_duplicates(*resolve([0, 1, 2, 3], ["crane", "dog", "crane", "eel"], "x"))
    assert (labels.tolist(), names) == ([0, 1, 0, 2], ["crane", "dog", "eel"])
    assert "crane" in caplog.text


def test_class_files(tmp_path):
    assert read_classes(str(write(tmp_path / "a.txt", b"red\n\nlight blue\n"))) == ["red", "light blue"]
    assert read_classes(str(write(tmp_path / "a.json", b'{"1": "red"}'))) == {"1": "red"}
    with pytest.raises(OptionError, match="no such file"):
        read_classes("nowhere.txt")


def test_splits_are_not_classes(tmp_path):
    colour_folder(tmp_path / "train", ["red", "green"], 1)
    colour_folder(tmp_path / "test", ["red", "green"], 2)
    with pytest.raises(OptionError, match="are subsets, not classes: add subset=test"):
        open_dataset(DataConfig(str(tmp_path)), "classification")
    assert len(open_dataset(DataConfig(str(tmp_path), subset="test"), "classification")) == 4
    with pytest.raises(OptionError, match="no subset 'val'; folders there are test, train"):
        open_dataset(DataConfig(str(tmp_path), subset="val"), "classification")


def table(tmp_path, text: str) -> str:
    for name in ("red", "green"):
        write(tmp_path / f"{name}.png", picture(name))
    return str(write(tmp_path / "t.csv", text.encode()))


def test_csv_with_filters(tmp_path):
    data = table(tmp_path, "file,name,keywords\nred.png,red,warm|hot\ngreen.png,green: dark skin tone,\ngreen.png,green,cold\n")
    dataset = open_dataset(DataConfig(data, label="name", exclude="skin tone"), "classification")
    assert pairs(dataset) == [("red.png", "red"), ("green.png#4", "green")]  # the file's second row
    assert open_dataset(DataConfig(data, include="^red$", label="name"), "classification").classes == ["red"]
    with pytest.raises(OptionError, match=r"no column 'nam'.*file, name, keywords"):
        open_dataset(DataConfig(data, label="nam"), "classification")
    with pytest.raises(OptionError, match="not a regular expression"):
        open_dataset(DataConfig(data, exclude="("), "classification")


def test_csv_rows_of_one_file_are_one_item_with_several_captions(tmp_path):
    data = table(tmp_path, "file,name,keywords\nred.png,red,warm|hot\ngreen.png,green,\nred.png,crimson,warm\n")
    dataset = open_dataset(DataConfig(data, caption="a {name} ({keywords})"), "retrieval")
    assert [(item.key, item.captions) for item in dataset.items] == [
        ("red.png", ["a red (warm|hot)", "a crimson (warm)"]),
        ("green.png", ["a green ()"]),
    ]
    with pytest.raises(OptionError, match="names no column 'nam'"):
        open_dataset(DataConfig(data, caption="{nam}"), "retrieval")
    with pytest.raises(OptionError, match="Name columns in braces"):
        open_dataset(DataConfig(data, caption="{name"), "retrieval")


@pytest.mark.parametrize("caption", ["name", "{name}: {keywords}", "{{{name}}}"])
def test_a_template_gives_the_captions_that_data_prep_builds(tmp_path, caption):
    data = table(tmp_path, "file,name,keywords\nred.png,bright  red,warm\ngreen.png,green,\n")
    with open(data, newline="") as file:
        rows = [row | {"image": picture("red")} for row in csv.DictReader(file)]
    built = [Columns(captions=(caption,)).record(i, row).members["txt"].decode() for i, row in enumerate(rows)]
    dataset = open_dataset(DataConfig(data, caption=caption), "retrieval")
    assert [item.captions for item in dataset.items] == [[text] for text in built]
    assert "" not in built


def test_what_a_csv_lacks_is_counted_named_and_budgeted(tmp_path):
    data = table(tmp_path, "file,name\nred.png,red\ngreen.png,\ngone.png,blue\n")
    with pytest.raises(
        RuntimeError, match=r"2 of 3 items cannot be used \(1 missing_file, 1 missing_label\).*green\.png.*max_bad_fraction"
    ):
        open_dataset(DataConfig(data), "classification")
    dataset = open_dataset(DataConfig(data, max_bad_fraction=0.7), "classification")
    assert [item.key for item in dataset.items] == ["red.png"]
    assert [entry["key"] for entry in dataset.skipped] == ["green.png", "gone.png"]


def test_shards_with_labels_in_members_and_json(tmp_path):
    samples = [
        ("a", {"png": picture("red"), "cls": b"1", "json": json.dumps({"name": "red", "captions": ["r", "rr"]}).encode()}),
        ("b", {"png": picture("green"), "cls": b"0\n", "json": json.dumps({"name": "green", "captions": ["g"]}).encode()}),
    ]
    shard(tmp_path / "0.tar", samples[:1])
    shard(tmp_path / "1.tar", samples[1:])
    by_class = open_dataset(DataConfig(str(tmp_path / "{0..1}.tar"), classes=["green", "red"]), "classification")
    by_name = open_dataset(DataConfig(str(tmp_path), label="json:name"), "classification")
    assert pairs(by_class) == pairs(by_name) == [("0.tar/a", "red"), ("1.tar/b", "green")]
    captions = open_dataset(DataConfig(str(tmp_path / "*.tar"), caption="json:captions"), "retrieval")
    assert [item.captions for item in captions.items] == [["r", "rr"], ["g"]]
    write(tmp_path / "classnames.txt", b"green\nred\n")
    write(tmp_path / "zeroshot_classification_templates.txt", b"a {c}\n")
    beside = open_dataset(DataConfig(str(tmp_path)), "classification")
    assert (pairs(beside), beside.templates) == (pairs(by_name), ["a {c}"])
    assert by_class.items[1].read() == picture("green")
    with pytest.raises(OptionError, match="0 of 2 samples have an image and txt; they have cls, json, png"):
        open_dataset(DataConfig(str(tmp_path)), "retrieval")


def benchmark(root, count: int = 12, retrieval: bool = False):
    """As CLIP_benchmark writes it: unpadded shard numbers, so that 10.tar sorts before 2.tar as text."""
    for n in range(count):
        members = {"png": picture("red" if n % 2 else "green")}
        members |= {"txt": f"a {n}\nanother {n}".encode()} if retrieval else {"cls": str(n % 2).encode()}
        shard(root / "test" / f"{n}.tar", [(f"s{n:07d}", members)])
    write(root / "test" / "nshards.txt", str(count).encode())
    write(root / "classnames.txt", b"green\nred\n")
    write(root / "zeroshot_classification_templates.txt", b"a photo of {c}.\n")
    if retrieval:
        write(root / "dataset_type.txt", b"retrieval\n")
    return root


def test_clip_benchmark_folder(tmp_path):
    dataset = open_dataset(DataConfig(str(benchmark(tmp_path))), "classification")
    assert [item.key for item in dataset.items] == [f"{n}.tar/s{n:07d}" for n in range(12)]
    assert (dataset.classes, dataset.templates, dataset.name) == (["green", "red"], ["a photo of {c}."], f"{tmp_path}:test")
    assert dataset.labels.tolist() == [0, 1] * 6
    with pytest.raises(OptionError, match=r"dataset_type\.txt says classification"):
        open_dataset(DataConfig(str(tmp_path)), "retrieval")
    (tmp_path / "test" / "3.tar").unlink()
    with pytest.raises(OptionError, match=r"3\.tar: not found, but .* says 12 shards"):
        open_dataset(DataConfig(str(tmp_path)), "classification")


def test_clip_benchmark_retrieval_has_a_caption_on_each_line(tmp_path):
    dataset = open_dataset(DataConfig(str(benchmark(tmp_path, 2, retrieval=True))), "retrieval")
    assert [item.captions for item in dataset.items] == [["a 0", "another 0"], ["a 1", "another 1"]]


def test_limit_is_drawn_by_seed_and_keeps_classes(tmp_path):
    colour_folder(tmp_path, ["red", "green"], 20)
    drawn = [open_dataset(DataConfig(str(tmp_path), limit=6, seed=seed), "classification") for seed in (0, 0, 1)]
    keys = [[item.key for item in dataset.items] for dataset in drawn]
    assert keys[0] == keys[1] != keys[2]
    assert [dataset.classes for dataset in drawn] == [["green", "red"]] * 3
    assert all(item.key.startswith(name) for item, name in pairs_of(drawn[0]))


def pairs_of(dataset):
    return [(item, dataset.classes[label]) for item, label in zip(dataset.items, dataset.labels.tolist(), strict=True)]


def test_a_pair_of_sets_shares_classes_by_name(tmp_path):
    colour_folder(tmp_path / "a", ["red", "green", "blue"], 1)
    colour_folder(tmp_path / "b", ["red", "blue"], 1)
    train, test = open_pair(TrainDataConfig(str(tmp_path / "b"), train=str(tmp_path / "a")))
    assert train.classes == test.classes == ["blue", "green", "red"]
    named = open_pair(TrainDataConfig(str(tmp_path / "b"), train=str(tmp_path / "a"), classes=["red", "green", "blue", "never seen"]))
    assert pairs(named[1]) == pairs(test)
    assert pairs(test) == [("blue/0.png", "blue"), ("red/0.png", "red")]
    with pytest.raises(OptionError, match=r"1 classes are not in .*first 'green'"):
        open_pair(TrainDataConfig(str(tmp_path / "a"), train=str(tmp_path / "b")))


def test_without_splits_the_sides_are_divided_by_key(tmp_path):
    colour_folder(tmp_path, ["red", "green"], 40)
    train, test = open_pair(TrainDataConfig(str(tmp_path), split=EvalSplit(0.25)))
    sides = [{item.key for item in side.items} for side in (train, test)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 80
    assert 8 <= len(test) <= 32
    colour_folder(tmp_path, ["blue"], 5)  # others come: everyone stays on their side
    grown = open_pair(TrainDataConfig(str(tmp_path), split=EvalSplit(0.25)))[1]
    assert sides[1] == {item.key for item in grown.items if not item.key.startswith("blue")}


def test_what_is_nothing_known_is_said(tmp_path):
    with pytest.raises(OptionError, match="no such folder"):
        open_dataset(DataConfig(str(tmp_path / "nowhere")), "classification")
    with pytest.raises(OptionError, match="neither class folders nor"):
        open_dataset(DataConfig(str(tmp_path)), "classification")


def labelled_shards(root, count: int = 1):
    for n in range(count):
        samples = [(f"{n}{name}", {"png": picture(name), "cls": str(i).encode()}) for i, name in enumerate(["red", "green", "blue"])]
        shard(root / f"{n}.tar", samples)
    write(root / "classnames.txt", b"red apple\ngreen pear\nblue: dark skin tone\n")
    return root


def test_filters_choose_by_class_name_whatever_the_shard_holds(tmp_path, caplog):
    data = str(labelled_shards(tmp_path))
    dataset = open_dataset(DataConfig(data, exclude="skin tone"), "classification")
    assert pairs(dataset) == [("0.tar/0red", "red apple"), ("0.tar/0green", "green pear")]
    assert dataset.classes == ["red apple", "green pear"]
    assert pairs(open_dataset(DataConfig(data, include="pear|dark", exclude="dark"), "classification")) == [("0.tar/0green", "green pear")]
    with pytest.raises(OptionError, match="include='pair' matches none of the class names, such as 'red apple', 'green pear'"):
        open_dataset(DataConfig(data, include="pair"), "classification")
    with pytest.raises(OptionError, match=r"no items are left by include=None, exclude='\.'"):
        open_dataset(DataConfig(data, exclude="."), "classification")
    with pytest.raises(OptionError, match="this evaluator does not read"):
        open_dataset(DataConfig(str(tmp_path / "*.tar"), include="x"), "images")
    assert not caplog.records
    assert len(open_dataset(DataConfig(data, exclude="^1$"), "classification")) == 3  # an index is no name
    assert "exclude='^1$' matches none of the class names" in caplog.text


def test_a_sources_held_out_part_is_the_evaluators(tmp_path):
    data = str(labelled_shards(tmp_path, 20))
    config = SourceConfig(shards=data, split=SplitConfig(holdout=0.3, part="holdout"))
    source = Source("s", config, [CenterView(size=8)])
    trained = {key.split("/", 1)[1] for key in source.rows(range(source.num_samples)).keys}
    parts = [open_dataset(DataConfig(data, split=EvalSplit(0.3, part)), "classification") for part in ("holdout", "train")]
    keys = [{item.key for item in part.items} for part in parts]
    assert keys[0] == trained
    assert 5 < len(keys[0]) < 35
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 60
    assert parts[0].name == f"{data}:holdout"
    fitted, tested = open_pair(TrainDataConfig(data, split=EvalSplit(0.3)))
    assert [{item.key for item in side.items} for side in (tested, fitted)] == keys
    with pytest.raises(OptionError, match="share between 0 and 1"):
        open_dataset(DataConfig(data, split=EvalSplit(1.5)), "classification")


def test_limit_of_a_held_out_part_is_drawn_by_seed(tmp_path):
    colour_folder(tmp_path, ["red", "green"], 40)
    whole = [item.key for item in open_pair(TrainDataConfig(str(tmp_path), split=EvalSplit(0.5)))[1].items]
    drawn = [
        [item.key for item in open_pair(TrainDataConfig(str(tmp_path), split=EvalSplit(0.5), limit=8, seed=s))[1].items] for s in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(set(keys) < set(whole) and len(keys) == 8 for keys in drawn)
    assert drawn[0] != whole[:8]


def test_members_of_shards_have_bounds_and_rules(tmp_path):
    texts = {"plain": "e\u0301".encode(), "huge": b"x" * 70_000, "latin": b"caf\xe9", "empty": b" \n"}
    samples = [(key, {"png": picture("red"), "txt": text, "json": b"{"}) for key, text in texts.items()]
    shard(tmp_path / "0.tar", [*samples, ("bare", {"txt": b"x"})])
    dataset = open_dataset(DataConfig(str(tmp_path), max_bad_fraction=0.9), "retrieval")  # json that nobody wants may be broken
    assert [(item.key, item.captions) for item in dataset.items] == [("0.tar/plain", ["\u00e9"])]  # NFC
    assert {entry["key"]: entry["reason"].split(":")[0] for entry in dataset.skipped} == {
        "0.tar/huge": "too_many_bytes",
        "0.tar/latin": "not_utf8",
        "0.tar/empty": "empty_caption",
        "0.tar/bare": "missing_field",
    }
    with pytest.raises(OptionError, match="0 of 5 samples have an image and json:a"):
        open_dataset(DataConfig(str(tmp_path), caption="json:a"), "retrieval")


def test_an_image_beyond_the_bound_is_left_out_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(SourceConfig, "max_member_bytes", 1000)
    shard(tmp_path / "0.tar", [("a", {"png": picture("red"), "cls": b"1"}), ("b", {"png": bytes(1001), "cls": b"1"})])
    dataset = open_dataset(DataConfig(str(tmp_path), max_bad_fraction=0.5), "classification")
    assert [item.key for item in dataset.items] == ["0.tar/a"]
    assert "1001 bytes, the limit is 1000" in dataset.skipped[0]["reason"]


def test_a_shard_is_opened_once_for_all_its_samples(tmp_path, monkeypatch):
    samples = [(f"{i}", {"png": picture("red"), "cls": b"0", "json": b'{"label": 0}'}) for i in range(9)]
    path = shard(tmp_path / "0.tar", samples)
    open_dataset(DataConfig(str(path), label="json:label"), "classification")  # writes the index
    real, opened = os.open, []
    monkeypatch.setattr(os, "open", lambda name, *rest, **named: opened.append(str(name)) or real(name, *rest, **named))
    dataset = open_dataset(DataConfig(str(path), label="json:label"), "classification")
    assert [item.read() for item in dataset.items] == [picture("red")] * 9
    assert opened == [str(path)]


def test_earlier_spellings_of_parts_are_read_with_a_notice(caplog):
    config = make_config(TrainDataConfig, ["data=d", "split=test", "train_split=val", "holdout=0.3", "part=train"])
    assert (config.subset, config.train_subset, config.split) == ("test", "val", EvalSplit(0.3, "train"))
    assert [record.getMessage() for record in caplog.records] == [
        "earlier spelling of options; write subset: test, train_subset: val, split: {holdout: 0.3, part: train}"
    ]
    caplog.clear()
    saved = {"data": "d", "split": None, "holdout": None, "part": "holdout", "train_split": None}  # as a run's config.yaml has them
    assert make_config(TrainDataConfig, saved) == TrainDataConfig("d")
    assert make_config(TrainDataConfig, ["data=d", "part=train"]).split == EvalSplit(0.2, "train")
    with pytest.raises(OptionError, match="subset is given twice, as 'a' and in an earlier spelling as 'b'"):
        make_config(DataConfig, ["data=d", "subset=a", "split=b"])


def test_a_split_is_written_as_in_a_source(caplog):
    assert make_config(DataConfig, ["data=d", "split={holdout: 0.3, part: train}"]).split == EvalSplit(0.3, "train")
    assert make_config(DataConfig, {"data": "d", "split": {"holdout": 0.3}}).split == EvalSplit(0.3, "holdout")
    assert not caplog.records
    for wrong in ("split={holdout: 1.5}", "split={part: test}"):
        with pytest.raises(OptionError, match=r"split: holdout .*expected a share between 0 and 1, and train or holdout"):
            make_config(DataConfig, ["data=d", wrong])
