"""The demo's shards on disk: members, resumption, refusal to overwrite, baselines and duplicate checks that can fail."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import typer
from accelerate import Accelerator
from PIL import Image
from typer.testing import CliRunner

from data_prep.demo import checks
from data_prep.demo import command as demo
from data_prep.demo.scenes import CLASS_NAMES, NUM_TRAINED, SIDE, SPLITS
from mmpretrain.evaluators.baselines import colour_histogram, measure, raw_pixels
from mmpretrain.evaluators.data.datasets import DataConfig, open_dataset
from tests.data_prep import jobs

COUNTS = {"pairs": 126, "photos": 40, "val": 20, "test": 84, "heldout": 24, "shifted": 20, "binding": 20}


def _read(folder: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.ensure_demo(tmp_path_factory.mktemp("demo"), 0, counts=COUNTS, say=lambda line: None)


def test_every_split_has_its_count_and_members(root: Path):
    for split, count in COUNTS.items():
        samples = _read(root / split)
        assert len(samples) == count
        expected = {"jpg"} if split == "photos" else {"jpg", "txt", "json", "mask.png"} | ({"cls"} if split != "binding" else set())
        assert all(set(members) == expected for members in samples.values()), split


def test_members_agree_with_each_other(root: Path):
    for members in _read(root / "test").values():
        data = json.loads(members["json"])
        assert members["txt"].decode() == data["captions"][0]
        assert int(members["cls"]) == data["label"]
        assert Image.open(io.BytesIO(members["jpg"])).size == (SIDE, SIDE)
        mask = np.asarray(Image.open(io.BytesIO(members["mask.png"])))
        assert Image.open(io.BytesIO(members["mask.png"])).mode == "P"
        assert mask.shape == (SIDE, SIDE)
        for box in data["boxes"]:
            x, y, width, height = box["bbox"]
            assert box["category"] == CLASS_NAMES[box["category_id"]]
            inside = mask[y : y + height, x : x + width] == box["category_id"] + 1
            assert box["area"] <= np.count_nonzero(inside)
            assert inside.any(0)[[0, -1]].all()  # the box is tight
            assert inside.any(1)[[0, -1]].all()
        assert len(data["qa"]) == 2
        assert data["attributes"]["count"] == len(data["boxes"])


def test_class_names_match_the_labels(root: Path):
    assert len((root / "test" / "classnames.txt").read_text().splitlines()) == NUM_TRAINED
    for split in ("pairs", "val", "test", "heldout", "shifted"):
        names = (root / split / "classnames.txt").read_text().splitlines()
        for members in _read(root / split).values():
            assert names[int(members["cls"])] == json.loads(members["json"])["class"]
    assert "{c}" in (root / "heldout" / "zeroshot_classification_templates.txt").read_text()


def test_binding_has_two_different_sentences_about_two_visible_objects(root: Path):
    for members in _read(root / "binding").values():
        data = json.loads(members["json"])
        left, right = data["objects"]
        assert data["caption"] == members["txt"].decode() != data["swap"]
        assert left["shape"] != right["shape"]
        assert left["colour"] != right["colour"]
        assert data["boxes"][0]["bbox"][0] < data["boxes"][1]["bbox"][0]
        assert data["caption"].startswith(("a ", "an ")), data["caption"]
        assert f"{left['colour']} {left['shape']} left of" in data["caption"]


def test_written_again_it_is_kept_and_another_seed_replaces_it(tmp_path: Path):
    lines: list[str] = []
    demo.ensure_demo(tmp_path, 1, splits=["val"], counts={"val": 8}, say=lines.append)
    first = (tmp_path / "val" / "00000.tar").read_bytes()
    lines.clear()
    demo.ensure_demo(tmp_path, 1, splits=["val"], counts={"val": 8}, say=lines.append)
    assert not lines
    demo.ensure_demo(tmp_path, 2, splits=["val"], counts={"val": 8}, say=lines.append)
    assert (tmp_path / "val" / "00000.tar").read_bytes() != first
    demo.ensure_demo(tmp_path, 1, splits=["val"], counts={"val": 8}, say=lines.append)
    assert (tmp_path / "val" / "00000.tar").read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["val"]  # nothing temporary is left


def test_an_interrupted_split_leaves_nothing_at_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "chunk", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        demo.ensure_demo(tmp_path, splits=["val"], counts={"val": 8}, say=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path):
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "mine.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="did not write it"):
        demo.ensure_demo(tmp_path, splits=["pairs"], counts={"pairs": 4})
    assert (tmp_path / "pairs" / "mine.txt").exists()


def test_unknown_splits_and_counts_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="no demo split 'tset'; there are pairs"):
        demo.ensure_demo(tmp_path, splits=["tset"])
    with pytest.raises(ValueError, match="0 scenes"):
        demo.ensure_demo(tmp_path, counts={"test": 0})


def test_processes_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "SCENES_PER_PROCESS", 8)
    monkeypatch.setattr(demo, "SCENES_PER_JOB", 8)
    for processes in (1, 2):
        demo.ensure_demo(tmp_path / str(processes), splits=["val"], counts={"val": 20}, processes=processes, say=lambda line: None)
    assert (tmp_path / "1/val/00000.tar").read_bytes() == (tmp_path / "2/val/00000.tar").read_bytes()


def test_processes_that_die_are_an_error_and_not_a_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo, "SCENES_PER_PROCESS", 8)
    monkeypatch.setattr(demo, "SCENES_PER_JOB", 10)
    monkeypatch.setattr(demo, "chunk", jobs.dies)
    with pytest.raises(RuntimeError, match=r"task \(0, 'val', 0, 10\): its worker process died 4 times \(by SIGKILL\)"):
        demo.ensure_demo(tmp_path, splits=["val"], counts={"val": 20}, processes=2, say=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path: Path):
    app = typer.Typer()
    app.command()(demo.demo)
    arguments = [str(tmp_path), "--seed", "3", "--split", "pairs", "--split", "test", "--pairs", "42", "--test", "42", "--check"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["baselines.json", "pairs", "test"]
    assert '"same_pixels": 0' in done.output
    assert CliRunner().invoke(app, [str(tmp_path), "--split", "nosuch"]).exit_code == 2


def test_baselines_are_cached_by_what_they_measured(root: Path, monkeypatch: pytest.MonkeyPatch):
    result = checks.nearest_neighbour_baselines(root)
    assert result["chance"] == pytest.approx(1 / NUM_TRAINED)
    assert result["n"] == COUNTS["test"]
    assert result["passed"]
    monkeypatch.setattr(checks, "read_split", lambda folder: pytest.fail("read again"))
    assert checks.nearest_neighbour_baselines(root) == result


def test_baselines_find_what_is_to_be_found(root: Path):
    images, labels = checks.read_split(root / "pairs")
    for features in (colour_histogram, raw_pixels):
        rows = np.stack([features(image) for image in images])
        assert checks.nearest_neighbours(rows, labels, rows, labels)["k=1"] == 1.0


def test_the_checks_measure_what_the_evaluator_option_measures(root: Path):
    train, test = (open_dataset(DataConfig(str(root / name)), "classification") for name in ("pairs", "test"))
    measured = measure(["colour_histogram", "raw_pixels"], train, test, Accelerator(cpu=True), threads=2)
    result = checks.nearest_neighbour_baselines(root)
    assert measured == {name: result[name] for name in ("colour_histogram_knn", "raw_pixel_knn")}


def test_duplicates_are_found_where_they_are_and_only_there(root: Path):
    train, _ = checks.read_split(root / "pairs")
    test, _ = checks.read_split(root / "test")
    clean = checks.count_duplicates(train, test)
    assert (clean["same_pixels"], clean["perceptual"]) == (0, 0)
    brighter = np.clip(train[5].astype(int) + 4, 0, 255).astype(np.uint8)
    planted = checks.count_duplicates(train, np.stack([train[3], brighter, test[0]]))
    assert (planted["same_pixels"], planted["perceptual"]) == (1, 2)


def test_reading_nothing_names_the_command(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="python -m data_prep demo"):
        checks.read_split(tmp_path / "pairs")


def test_splits_of_the_benchmark_are_all_written(root: Path):
    assert set(COUNTS) == set(SPLITS)
    assert sorted(p.name for p in root.iterdir() if p.is_dir()) == sorted(SPLITS)
