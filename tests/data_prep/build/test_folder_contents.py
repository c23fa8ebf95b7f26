"""What lies in a folder of images beside them: `build folder` and an evaluator take the same files."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from data_prep.__main__ import app
from data_prep.build.readers.folder import Folder
from mmpretrain.data.formats import foreign_kind
from mmpretrain.evaluators.data.datasets import DataConfig, open_dataset
from tests.data_prep.build.readers.support import collect, image


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300", "TERM": "dumb"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images with other names, links, hidden files and loops; every image has a colour of its own."""
    root = tmp_path / "photos"
    taken = ["cat/a.png", "cat/b.JPEG", "cat/deep/c.jfif", "cat/no_suffix", "dog/d.png"]
    (tmp_path / "elsewhere" / "more").mkdir(parents=True)
    for i, name in enumerate(taken):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image((i * 10, 0, 0), "JPEG" if "b." in name or "c." in name else "PNG"))
    (tmp_path / "elsewhere" / "more" / "e.png").write_bytes(image((0, 90, 0)))
    (tmp_path / "elsewhere" / "f.png").write_bytes(image((0, 120, 0)))
    os.symlink(tmp_path / "elsewhere", root / "bird")  # a class that is a link
    os.symlink("../../elsewhere/more", root / "dog" / "linked")  # a folder in a class
    os.symlink("..", root / "dog" / "loop")
    os.symlink("../cat/a.png", root / "dog" / "g.png")
    for name in ("cat/.hidden.png", ".git/x.png", "cat/captions.csv", "README.txt", "cat/Thumbs.db", "docs/notes.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image() if name.endswith("png") else b"words")
    return root


TAKEN = [
    "bird/f.png", "bird/more/e.png", "cat/a.png", "cat/b.JPEG", "cat/deep/c.jfif", "cat/no_suffix", "dog/d.png", "dog/g.png",
    "dog/linked/e.png",
]  # fmt: skip
OTHERS = ["README.txt", "cat/Thumbs.db", "cat/captions.csv", "docs/notes.md"]


def test_build_and_evaluators_take_the_same_images(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    records, left_out = collect(Folder.open(str(folder), label_from_folder=True), 100)
    assert [item.where for item in left_out] == OTHERS
    assert {(item.reason, item.harmless) for item in left_out} == {("not_an_image", True)}
    dataset = open_dataset(DataConfig(str(folder)), "classification")
    assert [item.key for item in dataset.items] == TAKEN
    assert dataset.classes == list(Folder.open(str(folder), label_from_folder=True).classes or ()) == ["bird", "cat", "dog"]
    by_build = [(next(data for name, data in members.items() if name != "cls"), int(members["cls"])) for members in records.values()]
    assert [(item.read(), label) for item, label in zip(dataset.items, dataset.labels.tolist(), strict=True)] == by_build
    assert "4 files that are not images are left out: README.txt, cat/Thumbs.db, cat/captions.csv and 1 more" in caplog.text


def test_files_that_are_no_images_do_not_stop_a_build(folder: Path, tmp_path: Path) -> None:
    result = run("build", "folder", folder, "--out", tmp_path / "out", "--processes", 1)
    assert result.exit_code == 0, result.output
    assert "9 samples" in result.output
    assert "4 inputs left out (4 not_an_image), first README.txt: see" in result.output
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["input"] for line in lines] == OTHERS
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["reasons"] == {"not_an_image": 4}
    assert run("build", "folder", folder, "--out", tmp_path / "out", "--processes", 1).exit_code == 0  # it is finished


@pytest.mark.parametrize(
    ("name", "data"), [("x.png", b""), ("x.heic", b"\0\0\0\x18ftypheic"), ("x.svg", b"<svg/>"), ("x.jpg", b"\xff\xd9")]
)
def test_images_by_name_that_cannot_be_read_still_stop_a_build(name: str, data: bytes, folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / name).write_bytes(data)
    result = run("build", "folder", folder, "--out", tmp_path / "out", "--processes", 1)
    assert result.exit_code == 1
    assert f"cat/{name}: unknown_format" in result.output
    if (foreign := foreign_kind(data)) is not None:
        assert foreign[0] in result.output


def test_links_that_lead_nowhere_and_pipes_are_counted_by_both(folder: Path) -> None:
    os.symlink("gone.png", folder / "cat" / "gone.png")
    os.mkfifo(folder / "cat" / "pipe.png")
    os.mkfifo(folder / "cat" / "pipe")
    _, left_out = collect(Folder.open(str(folder), label_from_folder=True), 100)
    bad = {item.where: item.reason for item in left_out if not item.harmless}
    assert bad == {"cat/gone.png": "missing_image", "cat/pipe.png": "missing_image"}
    dataset = open_dataset(DataConfig(str(folder), max_bad_fraction=0.5), "classification")
    assert [entry["key"] for entry in dataset.skipped] == ["cat/gone.png", "cat/pipe.png"]
