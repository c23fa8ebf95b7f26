"""Every further `build` command from the command line to shards, once."""

import base64
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from data_prep.build.commands import app
from tests.data_prep.build.readers.support import image, samples

PNG, JPEG = image(), image(kind="JPEG")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in (*arguments, "--processes", 1)], env={"COLUMNS": "300", "TERM": "dumb"})


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, data in {"a.png": PNG, "b.jpg": JPEG}.items():
        (folder / name).write_bytes(data)
    return folder


def built(out: Path, result: Result, *captions: str) -> dict[str, dict[str, bytes]]:
    assert result.exit_code == 0, result.output
    found = samples(out)
    assert [members["txt"].decode() for members in found.values()] == list(captions)
    assert [members.get("png") or members["jpg"] for members in found.values()] == [PNG, JPEG]
    assert json.loads((out / "manifest.json").read_text())["num_samples"] == 2
    return found


def test_jsonl(photos: Path, tmp_path: Path) -> None:
    rows = [{"file": "a.png", "name": "A", "words": ["x", "y"], "kind": "z"}, {"file": "b.jpg", "name": "B", "words": [], "kind": "k"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    options = ("--root", photos, "--image-column", "file", "--caption", "{name}: {words}", "--label-column", "kind", "--extra", "words")
    found = built(out, run("jsonl", tmp_path / "t.jsonl", "--out", out, *options), "A: x, y", "B")
    assert (out / "classnames.txt").read_text() == "k\nz\n"
    assert found["00000000"]["cls"] == b"1"
    (tmp_path / "c.txt").write_text("z\nk\nq\n")
    run("jsonl", tmp_path / "t.jsonl", "--out", tmp_path / "own", *options, "--classes", tmp_path / "c.txt", "--max-count", 1)
    assert [members["cls"] for members in samples(tmp_path / "own").values()] == [b"0", b"1"]
    assert len(list((tmp_path / "own").glob("*.tar"))) == 2


def test_tsv(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_bytes(
        b"".join(base64.b64encode(data) + b"\t" + text + b"\n" for data, text in ((PNG, b"one"), (JPEG, b"two")))
    )
    result = run("tsv", tmp_path / "t.tsv", "--out", tmp_path / "out", "--columns", "image,text", "--base64", "--caption", "text")
    built(tmp_path / "out", result, "one", "two")


def test_parquet_and_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["q", "p"])}
    )
    rows = {"image": [{"bytes": data, "path": None} for data in (PNG, JPEG)], "text": ["one", "two"], "label": [1, 0]}
    saved = datasets.Dataset.from_dict(rows, features)
    saved.to_parquet(tmp_path / "t.parquet")
    saved.save_to_disk(tmp_path / "saved")
    for command, source in (("parquet", "t.parquet"), ("datasets", "saved")):
        out = tmp_path / command
        found = built(out, run(command, tmp_path / source, "--out", out, "--caption", "text", "--label-column", "label"), "one", "two")
        assert [members["cls"] for members in found.values()] == [b"1", b"0"]
        assert (out / "classnames.txt").read_text() == "q\np\n"


def test_sidecar(photos: Path, tmp_path: Path) -> None:
    (photos / "a.txt").write_text("one")
    (photos / "b.json").write_text('{"caption": "two"}')
    built(tmp_path / "out", run("sidecar", photos, "--out", tmp_path / "out"), "one", "two")
    (photos / "b.json").unlink()
    result = run("sidecar", photos, "--out", tmp_path / "strict")
    assert result.exit_code == 1
    assert "b.jpg" in result.output
    assert "missing_caption" in result.output
    result = run("sidecar", photos, "--out", tmp_path / "skips", "--skip-bad")
    assert result.exit_code == 0
    assert list(samples(tmp_path / "skips")) == ["a"]
    assert json.loads((tmp_path / "skips" / "skipped.jsonl").read_text())["reason"] == "missing_caption"


def test_coco(photos: Path, tmp_path: Path) -> None:
    listed = [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.jpg"}]
    (tmp_path / "c.json").write_text(
        json.dumps(
            {"images": listed, "annotations": [{"image_id": i, "caption": text} for i, text in ((1, "one"), (2, "two"), (2, "three"))]}
        )
    )
    found = built(tmp_path / "out", run("coco", tmp_path / "c.json", photos, "--out", tmp_path / "out"), "one", "two")
    assert json.loads(found["b"]["json"])["captions"] == ["two", "three"]


def test_voc(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").rename(tmp_path / "JPEGImages")
    (tmp_path / "Annotations").mkdir()
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>5</ymax></bndbox>"
    for name in "ab":
        (tmp_path / "Annotations" / f"{name}.xml").write_text(f"<annotation><object><name>cell</name>{box}</object></annotation>")
    assert run("voc", tmp_path, "--out", tmp_path / "out").exit_code == 0
    found = samples(tmp_path / "out")
    assert json.loads(found["a"]["json"])["boxes"] == [{"bbox": [0, 0, 4, 5], "category": "cell", "category_id": 0}]
    assert (tmp_path / "out" / "classnames.txt").read_text() == "cell\n"


def test_shards_and_img2dataset(photos: Path, tmp_path: Path) -> None:
    (photos / "a.txt").write_text("one")
    (photos / "b.txt").write_text("two")
    first = tmp_path / "first"
    run("sidecar", photos, "--out", first)
    built(tmp_path / "again", run("shards", first, "--out", tmp_path / "again", "--max-count", 1), "one", "two")
    assert len(list((tmp_path / "again").glob("*.tar"))) == 2
    (first / "00000_stats.json").write_text('{"successes": 2}')
    built(tmp_path / "web", run("img2dataset", first, "--out", tmp_path / "web"), "one", "two")
    (first / "00000_stats.json").write_text('{"successes": 3}')
    result = run("img2dataset", first, "--out", tmp_path / "less")
    assert result.exit_code == 1
    assert "2 samples found, 00000_stats.json says 3" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("csv", "absent"),
        ("jsonl", "absent"),
        ("tsv", "absent"),
        ("parquet", "absent"),
        ("sidecar", "absent"),
        ("voc", "absent"),
        ("coco", "absent", "."),
        ("img2dataset", "absent"),
    ],
)
def test_inputs_that_are_not_there_are_named(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = run(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "absent: no such file or folder" in result.output
    assert not (tmp_path / "out").exists()
