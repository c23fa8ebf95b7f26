"""`build csv` and `build folder` from generated tables and folders."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from data_prep.build import app
from mmpretrain.data.index import open_index
from mmpretrain.data.source import Source, SourceConfig
from mmpretrain.data.views import CenterView, TextView


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300", "TERM": "dumb"})


def image(colour: tuple[int, int, int], kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(out, kind)
    return out.getvalue()


def samples(out: Path) -> dict[str, dict[str, bytes]]:
    found = {}
    for shard in sorted(out.glob("*.tar")):
        data, index = shard.read_bytes(), open_index(shard)
        for i, key in enumerate(index.keys):
            found[key] = {e: data[m.offset : m.offset + m.size] for e, m in index.members(i).items()}
    return found


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i, kind in enumerate(["PNG", "JPEG", "WEBP", "PNG"]):
        (tmp_path / "images" / f"{i}.img").write_bytes(image((i * 60, 0, 0), kind))
    rows = [
        "file,name,tags,kind",
        "images/0.img,hash,key|pound,a",
        'images/1.img,"red, ball",,b',
        "images/2.img,wave: dark skin tone,hi,b",
        "images/3.img,  two\twords ,x,a",
    ]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n", encoding="utf-8-sig")
    return tmp_path / "t.csv"


ARGS = ("--image-column", "file", "--caption", "{name}: {tags}", "--join", "tags=|")


def test_csv_keeps_bytes_and_fills_captions(table: Path, tmp_path: Path) -> None:
    result = run("csv", table, "--out", tmp_path / "s", *ARGS, "--extra", "kind", "--key-column", "name")
    assert result.exit_code == 0, result.output
    assert "4 samples (4 json, 1 jpg, 2 png, 4 txt, 1 webp)".replace("4 json, 1 jpg", "1 jpg, 4 json") in result.output
    found = samples(tmp_path / "s")
    assert list(found) == ["00000000_hash", "00000001_red_ball", "00000002_wave_dark_skin_tone", "00000003_two_words"]
    assert [m["txt"].decode() for m in found.values()] == ["hash: key, pound", "red, ball", "wave: dark skin tone: hi", "two words: x"]
    assert [next(iter(m.keys() - {"txt", "json"})) for m in found.values()] == ["png", "jpg", "webp", "png"]  # by content
    assert found["00000001_red_ball"]["jpg"] == (tmp_path / "images" / "1.img").read_bytes()
    assert json.loads(found["00000000_hash"]["json"]) == {"kind": "a"}


def test_csv_rows_are_chosen(table: Path, tmp_path: Path) -> None:
    run("csv", table, "--out", tmp_path / "a", *ARGS, "--where", "kind=b")
    assert list(samples(tmp_path / "a")) == ["00000001", "00000002"]
    run("csv", table, "--out", tmp_path / "b", *ARGS, "--exclude-regex", "name=skin tone")
    assert list(samples(tmp_path / "b")) == ["00000000", "00000001", "00000003"]


def test_csv_labels_and_reading_back(table: Path, tmp_path: Path) -> None:
    run("csv", table, "--out", tmp_path / "s", *ARGS, "--label-column", "kind", "--max-count", 2)
    assert (tmp_path / "s" / "classnames.txt").read_text() == "a\nb\n"
    config = SourceConfig(shards=str(tmp_path / "s"), label="cls", classes=str(tmp_path / "s" / "classnames.txt"))
    source = Source("pairs", config, [CenterView(size=16), TextView(context_length=16)], labels=True)
    block = source.rows(range(4))
    assert sorted(block.labels["label"].tolist()) == [0, 0, 1, 1]


def test_classes_are_those_of_the_rows_that_are_kept(table: Path, tmp_path: Path) -> None:
    chosen = ("--exclude-regex", "name=skin tone", "--where", "kind=b")
    assert run("csv", table, "--out", tmp_path / "s", *ARGS, "--label-column", "name", *chosen).exit_code == 0
    assert (tmp_path / "s" / "classnames.txt").read_text() == "red, ball\n"
    assert [members["cls"] for members in samples(tmp_path / "s").values()] == [b"0"]
    wrong = run("csv", table, "--out", tmp_path / "t", *ARGS, "--label-column", "name", "--where", "sort=b")
    assert wrong.exit_code == 2
    assert "has no column 'sort'" in wrong.output


def test_csv_is_reproducible_and_refuses_to_overwrite(table: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run("csv", table, "--out", tmp_path / name, *ARGS).exit_code == 0
    assert (tmp_path / "a" / "00000.tar").read_bytes() == (tmp_path / "b" / "00000.tar").read_bytes()
    assert run("csv", table, "--out", tmp_path / "a", *ARGS).exit_code == 0
    refused = run("csv", table, "--out", tmp_path / "a", *ARGS, "--where", "kind=b")
    assert refused.exit_code == 1
    assert "holds other samples" in refused.output


def test_missing_images_are_errors_or_listed(table: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "1.img").unlink()
    (tmp_path / "images" / "3.img").write_bytes(b"<html>")
    result = run("csv", table, "--out", tmp_path / "a", *ARGS)
    assert result.exit_code == 2
    assert "t.csv, line 3: missing_image" in result.output
    result = run("csv", table, "--out", tmp_path / "b", *ARGS, "--skip-bad")
    assert result.exit_code == 0
    assert "2 inputs left out" in result.output
    lines = [json.loads(line) for line in (tmp_path / "b" / "skipped.jsonl").read_text().splitlines()]
    assert [(r["input"], r["reason"]) for r in lines] == [("t.csv, line 3", "missing_image"), ("t.csv, line 5", "unknown_format")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image-column", "path"), "has no column 'path' (--image-column); it has file, name, tags, kind"),
        (("--image-column", "file", "--caption", "{title}"), "has no column 'title'"),
        (("--image-column", "file", "--caption", "{}"), "name columns in braces"),
        (("--image-column", "file", "--where", "kind"), "expected COLUMN=VALUE"),
    ],
)
def test_wrong_options_are_named(arguments: tuple[str, ...], message: str, table: Path, tmp_path: Path) -> None:
    result = run("csv", table, "--out", tmp_path / "s", *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_tab_separated_and_ragged_tables(table: Path, tmp_path: Path) -> None:
    tabbed = tmp_path / "t.tsv"
    tabbed.write_text("file\tname\nimages/0.img\tone\n")
    assert run("csv", tabbed, "--out", tmp_path / "s", "--image-column", "file", "--caption", "{name}", "--separator", "tab").exit_code == 0
    assert samples(tmp_path / "s")["00000000"]["txt"] == b"one"
    tabbed.write_text("file\tname\nimages/0.img\tone\ttoo many\n")
    ragged = run("csv", tabbed, "--out", tmp_path / "r", "--image-column", "file", "--caption", "{name}", "--separator", "tab")
    assert ragged.exit_code == 2
    assert "line 2: expected 2 fields" in ragged.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for i, name in enumerate(["dog/a.png", "dog/b.v2.png", "cat/deep/a.png", "cat/a b.png", "cat/a_b.png"]):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image((i, i, i)))
    (root / ".DS_Store").write_bytes(b"x")
    return root


def test_folder_with_classes(folder: Path, tmp_path: Path) -> None:
    result = run("folder", folder, "--out", tmp_path / "s", "--label-from-folder")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "s" / "classnames.txt").read_text() == "cat\ndog\n"
    found = samples(tmp_path / "s")
    assert len(found) == 5  # names that collide once cleaned stay apart
    assert sorted((m["cls"].decode(), m["png"]) for m in found.values()) == sorted(
        ("0" if i > 1 else "1", image((i, i, i))) for i in range(5)
    )


def test_folder_without_classes_is_image_only(folder: Path, tmp_path: Path) -> None:
    assert run("folder", folder, "--out", tmp_path / "s").exit_code == 0
    assert {frozenset(m) for m in samples(tmp_path / "s").values()} == {frozenset({"png"})}
    (folder / "readme.md").write_text("not an image")
    assert "readme.md" in run("folder", folder, "--out", tmp_path / "t").output
    assert run("folder", folder, "--out", tmp_path / "u", "--skip-bad").exit_code == 0
    assert len(samples(tmp_path / "u")) == 5


def test_help_shows_an_example() -> None:
    for command in ("csv", "folder"):
        assert f"python -m data_prep build {command}" in run(command, "--help").output
