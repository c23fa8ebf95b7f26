"""Inputs that hostile or careless people give: one clear line, nothing lost silently, nothing read for ever."""

import csv
import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from data_prep.__main__ import app
from data_prep.build.readers import csv_table, json_lines
from data_prep.build.readers.columns import Columns
from mmpretrain.data import tables
from tests.data_prep.build.readers.support import image, samples

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


TABLES = {  # kind -> (header line, a good row, one of the wrong shape, one with too long a field)
    "csv": ("file,title\n", "images/0.png,good\n", "images/0.png,a,b\n", "images/0.png," + "x" * 5000 + "\n"),
    "tsv": ("file\ttitle\n", "images/0.png\tgood\n", "images/0.png\n", "images/0.png\t" + "x" * 5000 + "\n"),
    "jsonl": ("", '{"file": "images/0.png", "title": "good"}\n', '["images/0.png", "a"]\n', '{"file": "' + "x" * 5000 + '"}\n'),
}


@pytest.mark.parametrize("kind", TABLES)
def test_good_and_counted_bad_rows_are_all_rows(kind: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "MAX_LINE", 4000)
    limit = csv.field_size_limit(4000)
    header, good, ragged, long = TABLES[kind]
    given = tmp_path / f"t.{kind}"
    given.write_text(header + good + ragged + good + long + long + good)
    options = ("build", kind, given, "--image-column", "file", "--caption", "title", "--processes", 1, "--max-count", 2)
    first = 1 + header.count("\n")
    reason = {"csv": "bad_row", "tsv": "bad_row", "jsonl": "bad_json"}[kind]
    try:
        strict = run(*options, "--out", tmp_path / "strict")
        assert strict.exit_code == 1
        assert f"error: {given.name}, line {first + 1}: {reason}: " in strict.output
        assert "--skip-bad" in strict.output
        lenient = run(*options, "--out", tmp_path / "lenient", "--skip-bad")
    finally:
        csv.field_size_limit(limit)
    assert lenient.exit_code == 0, lenient.output
    skipped = [json.loads(line) for line in (tmp_path / "lenient" / "skipped.jsonl").read_text().splitlines()]
    assert [item["input"] for item in skipped] == [f"{given.name}, line {first + at}" for at in (1, 3, 4)]
    assert [item["reason"] for item in skipped] == [reason, *(["bad_row"] * 2 if kind == "csv" else ["long_line"] * 2)]
    assert list(samples(tmp_path / "lenient")) == ["00000000", "00000002", "00000005"]


def test_a_line_without_an_end_is_not_held(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_LINE", 1000)
    (tmp_path / "t.csv").write_text("file,title\n" + "x," * 5000 + "\nimages/0.png,good\n")
    found = next(csv_table.Table.open(str(tmp_path / "t.csv"), Columns("file", ("title",))).tasks(10))
    assert [(row.line, row.problem[:13]) for row in found] == [(2, "a line of mor"), (3, "")]


@pytest.mark.parametrize("kind", ["folder", "sidecar"])
@pytest.mark.parametrize("below", ["", "shards", "a/b"])
def test_shards_are_not_written_among_the_inputs(kind: str, below: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(images)
    for out in (images / below, tmp_path / "link" / below, f"file://{images}/{below}"):
        result = run("build", kind, images, "--out", out)
        assert result.exit_code == 2, result.output
        assert "its shards would become inputs" in result.output
    assert run("build", kind, "memory://in", "--out", "memory://in/shards").exit_code == 2
    assert run("build", "folder", images, "--out", tmp_path / "images2", "--skip-bad").exit_code == 0


def test_shards_are_not_written_over_or_above_those_that_are_read(images: Path, tmp_path: Path) -> None:
    assert run("build", "folder", images, "--out", tmp_path / "s" / "a", "--skip-bad").exit_code == 0
    for command in (("build", "shards"), ("filter",), ("dedup", "--exact")):
        for out in (tmp_path / "s", tmp_path / "s" / "a"):
            result = run(*command, tmp_path / "s" / "a", "--out", out)
            assert result.exit_code == 1, result.output
            assert " Choose another --out" in result.output


@pytest.mark.parametrize("command", ["build shards", "filter", "dedup", "stats"])
def test_the_status_says_whether_the_command_or_the_data_is_wrong(command: str, images: Path, tmp_path: Path) -> None:
    (images / "real.png").write_bytes(image())
    assert run("build", "folder", images, "--out", tmp_path / "s", "--skip-bad").exit_code == 0
    words, out = command.split(), tmp_path / ("page.html" if command == "stats" else "out")
    for wrong in ([tmp_path / "absent"], [tmp_path / "s", "--engine", "rays"], [tmp_path / "s", "--unknown"]):
        assert run(*words, *wrong, "--out", out).exit_code == 2
        assert not out.exists()
    assert run(*words, tmp_path / "s", "--out", out).exit_code == 0
    (tmp_path / "s" / "00000.tar").write_bytes(b"<html>" * 1000)
    again = run(*words, tmp_path / "s", "--out", tmp_path / f"again{out.suffix}")
    assert again.exit_code == (0 if command == "stats" else 1), again.output  # a page tells what is wrong: it is there for that
