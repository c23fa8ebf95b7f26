"""Before the first step: evaluators look at their first items, so that wrong data is not found after hours."""

import json

import pytest

from mmpretrain.config import recipe as recipes
from mmpretrain.config.build import OptionError
from mmpretrain.evaluation import DataInProgress, build_evaluators
from tests import runs
from tests.evaluators.fake import colour_folder, picture, shard, write


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    image = picture("red")
    shard(root / "bare" / "0.tar", [(f"a{i}", {"png": image}) for i in range(3)])
    shard(root / "numbers" / "0.tar", [(f"a{i}", {"png": image, "cls": str(i).encode()}) for i in range(3)])
    shard(root / "names" / "0.tar", [(f"a{i}", {"png": image, "cls": b"red", "txt": b"red"}) for i in range(3)])
    shard(root / "meta" / "0.tar", [("a", {"png": image, "json": json.dumps({"caption": "x"}).encode()})])
    shard(root / "bind" / "0.tar", [("a", {"png": image, "json": json.dumps({"caption": "x", "swap": "y"}).encode()})])
    write(root / "bare" / "1.tar", b"never looked at")
    write(root / "names" / "1.tar", b"never looked at")
    colour_folder(root / "folder", ["red", "green"], 2)
    (root / "none" / "empty").mkdir(parents=True)
    write(root / "red.png", image)
    write(root / "table.csv", b"file,kind\nred.png,red\n")
    write(root / "good.csv", b"file,label,title\nred.png,red,a red thing\n" + b"gone.png,red,x\n" * 3)
    write(root / "torn.csv", b'file,label\n"red.png,red\n')
    write(root / "passwd", b"root:x:0\n")
    return root


def look(tmp_path, written=DataInProgress(), **options):
    config = runs.recipe(
        tmp_path, tmp_path / "run", evaluators={"z": {k: str(v) if k in ("data", "train") else v for k, v in options.items()}}
    )
    return build_evaluators(recipes.assemble(config), written)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "zero_shot", "data": "bare"}, "0 of 3 samples have an image and cls; they have png"),
        ({"kind": "zero_shot", "data": "numbers"}, "labels are numbers, and zero-shot needs names"),
        ({"kind": "zero_shot", "data": "names", "classes": ["green"]}, "1 labels have no class name, first 'red'"),
        ({"kind": "zero_shot", "data": "names", "templates": "passwd"}, "expected one {} or {c} in each prompt"),
        ({"kind": "zero_shot", "data": "names", "exclude": "["}, "is not a regular expression"),
        ({"kind": "zero_shot", "data": "names", "batch_size": 0}, "evaluators.z: batch_size is 0, expected at least 1"),
        ({"kind": "zero_shot", "data": "none"}, "no items to evaluate"),
        ({"kind": "zero_shot", "data": "gone"}, "no such folder"),
        ({"kind": "zero_shot", "data": "table.csv"}, "which column holds the labels"),
        ({"kind": "zero_shot", "data": "torn.csv"}, "torn.csv, line"),
        ({"kind": "retrieval", "data": "bare"}, "0 of 3 samples have an image and txt"),
        ({"kind": "retrieval", "data": "folder"}, "it has no captions"),
        ({"kind": "binding", "data": "meta"}, "1 samples have no `caption` and `swap`"),
        ({"kind": "linear_probe", "data": "names", "train": "bare"}, "0 of 3 samples have an image and cls"),
        ({"kind": "knn", "data": "bare"}, "0 of 3 samples have an image and cls"),
        ({"kind": "knn", "data": "names", "train": "names"}, "the same data would be fitted and tested"),
        ({"kind": "finetune", "data": "names", "train": "gone"}, "no such folder"),
    ],
)
def test_wrong_data_is_refused_by_the_evaluators_name(tmp_path, data, options, message):
    places = {k: data / options[k] for k in ("data", "train") if k in options}
    if options.get("templates") == "passwd":
        places["templates"] = str(data / "passwd")
    with pytest.raises(OptionError, match=message) as refused:
        look(tmp_path, **options | places)
    assert "evaluators.z" in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("zero_shot", "names"),
        ("zero_shot", "folder"),
        ("zero_shot", "good.csv"),
        ("retrieval", "good.csv"),
        ("retrieval", "names"),
        ("binding", "bind"),
        ("knn", "folder"),
        ("linear_probe", "numbers"),
        ("zero_shot", "s3:"),
    ],
)
def test_good_data_passes_and_only_its_beginning_is_read(tmp_path, data, kind, place):
    assert "z" in look(tmp_path, kind=kind, data="s3://nowhere/{0..9}.tar" if place == "s3:" else data / place)


def test_data_still_being_written_is_not_looked_at(tmp_path, data):
    written = DataInProgress({data / "bare": lambda: None})
    assert "z" in look(tmp_path, written, kind="zero_shot", data=data / "bare")
