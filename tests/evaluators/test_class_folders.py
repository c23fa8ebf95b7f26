"""A class folder is the same data set whether an evaluator reads it, or the shards that data_prep builds of it."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep.__main__ import app
from mmpretrain.data.folders import class_folders, is_image, walk
from mmpretrain.evaluators.data.datasets import DataConfig, open_dataset
from mmpretrain.evaluators.data.train_test import TrainDataConfig, open_pair
from tests.evaluators.fake import picture, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Classes whose order and names are easy to get wrong, hidden files, notes, nested folders and a link."""
    root = tmp_path / "images"
    for name in ("traffic_light", "Zebra", "apple", "10", "9", "\u00e9clair"):
        write(root / name / "a.png", picture("red"))
    write(root / "apple" / "more" / "deep" / "b.JPG", picture("green", "jpeg"))
    write(tmp_path / "elsewhere" / "c.png", picture("blue"))
    os.symlink(tmp_path / "elsewhere", root / "9" / "linked")
    write(root / "apple" / ".hidden.png", picture("red"))
    write(root / "apple" / "._a.png", b"resource fork")
    write(root / "Zebra" / ".ipynb_checkpoints" / "a-checkpoint.png", picture("red"))
    write(root / ".cache" / "a.png", picture("red"))
    write(root / "notes" / "README.md", b"words")
    return root


def test_an_evaluator_and_the_shards_built_of_a_folder_have_the_same_labels_and_class_names(folder: Path, tmp_path: Path) -> None:
    arguments = ["build", "folder", str(folder), "--out", str(tmp_path / "shards"), "--label-from-folder", "--skip-bad"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    direct, built = (open_dataset(DataConfig(str(data)), "classification") for data in (folder, tmp_path / "shards"))
    names = ["10", "9", "Zebra", "apple", "traffic light", "\u00e9clair"]  # by code point of the folder's name
    assert direct.classes == built.classes == names
    assert len(direct) == len(built) == 8
    content = [sorted((int(label), item.read()) for label, item in zip(data.labels, data.items)) for data in (direct, built)]
    assert content[0] == content[1]
    assert [label for label, _ in content[0]] == [0, 1, 1, 2, 3, 3, 4, 5]
    fitted, tested = open_pair(TrainDataConfig(str(folder), train=str(tmp_path / "shards")))
    assert fitted.classes == tested.classes == names


def test_hidden_files_and_folders_are_passed_over(folder: Path) -> None:
    names = list(walk(folder))
    assert not [name for name in names if name.startswith(".") or "/." in name]
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert "9/linked/c.png" in names
    assert "notes" not in class_folders(name for name in names if is_image(str(folder / name)))
