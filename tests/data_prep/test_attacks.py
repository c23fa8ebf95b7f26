"""Inputs that hostile or careless people give: one clear line, nothing lost silently, nothing read for ever."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from data_prep.__main__ import app

PNG = b"\x89PNG\r\n\x1a\n"  # enough for `build`, which decodes nothing


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "400", "TERM": "dumb"})


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(PNG)
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    return folder


@pytest.mark.parametrize("kind", ["csv", "jsonl", "folder"])
def test_pipes_and_devices_are_no_images(kind: str, images: Path, tmp_path: Path) -> None:
    names = [f"images/{name}.png" for name in ("0", "pipe", "zero", "1")]
    given = {"csv": tmp_path / "t.csv", "jsonl": tmp_path / "t.jsonl", "folder": images}[kind]
    if kind == "csv":
        given.write_text("file\n" + "".join(f"{name}\n" for name in names))
    if kind == "jsonl":
        given.write_text("".join(f'{{"file": "{name}"}}\n' for name in names))
    options = () if kind == "folder" else ("--image-column", "file")
    result = run("build", kind, given, "--out", tmp_path / "out", "--skip-bad", "--processes", 1, *options)
    assert result.exit_code == 0, result.output
    assert "2 inputs left out" in result.output
    skipped = (tmp_path / "out" / "skipped.jsonl").read_text()
    assert skipped.count('"reason": "missing_image"') == skipped.count("expected a file") == 2


@pytest.mark.parametrize("rows", ['images/0.png,"open\nimages/1.png,b\n', 'images/0.png,"open\nimages/1.png,b\nimages/2.png,"c"\n'])
def test_a_quote_that_nothing_closes_swallows_no_rows(rows: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file,title\nimages/2.png,fine\n" + rows)
    options = ("build", "csv", tmp_path / "t.csv", "--image-column", "file", "--caption", "title")
    strict = run(*options, "--out", tmp_path / "strict")
    assert strict.exit_code == 1, strict.output
    assert "t.csv, line 3: bad_row: " in strict.output
    assert "Close its quotes" in strict.output
    lenient = run(*options, "--out", tmp_path / "out", "--skip-bad")
    assert lenient.exit_code == 0, lenient.output
    assert f"{1 + rows.count('.png') - 1} samples" in lenient.output
    assert "1 inputs left out" in lenient.output


def test_a_header_of_many_columns_is_not_printed(images: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(",".join(f"c{i}" for i in range(100_000)) + "\nimages/0.png,b\n")
    for column, status in (("file", 2), ("c0", 1)):
        result = run("build", "csv", tmp_path / "t.csv", "--out", tmp_path / "out", "--image-column", column)
        assert result.exit_code == status, result.output[:500]
        assert "and 99950 more" in result.output
        assert len(result.output) < 5000
