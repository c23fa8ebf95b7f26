"""`build csv` and `build folder` from generated tables and folders."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from data_prep.__main__ import COMMANDS
from data_prep.__main__ import app as commands
from data_prep.build.commands import app
from data_prep.build.images import encode
from data_prep.build.readers.base import extension_of
from data_prep.build.readers.columns import Columns
from data_prep.build.readers.csv_table import Table
from data_prep.shards import build as writer
from mmpretrain.data.decode import sniff
from mmpretrain.data.holdout import in_part
from mmpretrain.data.source import Source, SourceConfig
from mmpretrain.data.views import CenterView, TextView
from tests.data_prep.build.readers.support import image, samples


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300", "TERM": "dumb"})


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


def test_csv_reads_columns_as_the_other_tables_do(table: Path, tmp_path: Path) -> None:
    """A caption may be a column's bare name, indices stay indices, and the folder of the images may be another."""
    (tmp_path / "lists").mkdir()
    rows = ["file,name,kind", "0.img,  a name ,10", "1.img,another,9"]
    (tmp_path / "lists" / "t.csv").write_text("\n".join(rows))
    options = ("--image-column", "file", "--root", tmp_path / "images", "--caption", "name", "--label-column", "kind")
    assert run("csv", tmp_path / "lists" / "t.csv", "--out", tmp_path / "s", *options).exit_code == 0
    assert [(m["txt"], m["cls"]) for m in samples(tmp_path / "s").values()] == [(b"a name", b"10"), (b"another", b"9")]
    assert not (tmp_path / "s" / "classnames.txt").exists()
    literal = run("csv", table, "--out", tmp_path / "l", "--image-column", "file", "--caption", "a photo")
    assert literal.exit_code == 2
    assert "has no column 'a photo' (--caption)" in literal.output


def test_csv_takes_the_order_of_the_classes_and_images_in_base64(table: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("z\nb\na\n")
    picture = image((7, 7, 7))
    rows = ["picture,kind", *(f"{base64.b64encode(picture).decode()},{kind}" for kind in "aab")]
    (tmp_path / "b.csv").write_text("\n".join(rows))
    options = ("--image-column", "picture", "--base64", "--label-column", "kind", "--classes", tmp_path / "classes.txt")
    assert run("csv", tmp_path / "b.csv", "--out", tmp_path / "s", *options).exit_code == 0
    assert [(m["cls"], m["png"]) for m in samples(tmp_path / "s").values()] == [(b"2", picture), (b"2", picture), (b"1", picture)]
    assert (tmp_path / "s" / "classnames.txt").read_text() == "z\nb\na\n"


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
    assert result.exit_code == 1
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
    assert ragged.exit_code == 1
    assert "t.tsv, line 2: bad_row: expected 2 fields" in ragged.output


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


def photo(size: tuple[int, int], seed: int, kind: str = "PNG", **options: Any) -> bytes:
    """Smooth, so that lossy formats keep it closely."""
    y, x = np.mgrid[: size[1], : size[0]]
    waves = [127 + 100 * np.sin(x / (9 + c + seed) + seed) * np.cos(y / (11 + c)) for c in range(3)]
    out = io.BytesIO()
    Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(out, kind, **options)
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    root.mkdir()
    (root / "large.png").write_bytes(photo((400, 200), 1))
    (root / "large.jpg").write_bytes(photo((1200, 600), 2, "JPEG", quality=95))
    (root / "small.webp").write_bytes(photo((40, 60), 3, "WEBP"))
    (root / "large.bmp").write_bytes(photo((300, 330), 4, "BMP"))
    return root


def images(out: Path) -> dict[str, bytes]:
    """The image bytes by size in pixels and extension."""
    found = {}
    for members in samples(out).values():
        for extension, data in members.items():
            width, height = opened(data).size
            found[f"{width}x{height}.{extension}"] = data
    return found


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a.convert("RGB"), float) - np.asarray(b.convert("RGB"), float)).mean())


def test_resize_shrinks_the_shorter_side_and_touches_no_other_image(photos: Path, tmp_path: Path) -> None:
    assert run("folder", photos, "--out", tmp_path / "s", "--resize", 100).exit_code == 0
    found = images(tmp_path / "s")
    assert sorted(found) == ["100x110.png", "200x100.jpg", "200x100.png", "40x60.webp"]  # a format without an encoder here becomes PNG
    assert found["40x60.webp"] == (photos / "small.webp").read_bytes()
    for name, source in (("200x100.png", "large.png"), ("200x100.jpg", "large.jpg")):
        with opened((photos / source).read_bytes()) as original:
            assert difference(opened(found[name]), original.resize((200, 100), Image.Resampling.LANCZOS)) < 2


def test_reencode_changes_the_format_of_all(photos: Path, tmp_path: Path) -> None:
    assert run("folder", photos, "--out", tmp_path / "w", "--reencode", "webp", "--quality", 90).exit_code == 0
    found = images(tmp_path / "w")
    assert sorted(found) == ["1200x600.webp", "300x330.webp", "400x200.webp", "40x60.webp"]
    assert difference(opened(found["400x200.webp"]), opened((photos / "large.png").read_bytes())) < 3
    assert run("folder", photos, "--out", tmp_path / "p", "--reencode", "png").exit_code == 0
    assert difference(opened(images(tmp_path / "p")["300x330.png"]), opened((photos / "large.bmp").read_bytes())) == 0
    small, large = (tmp_path / name for name in ("q30", "q95"))
    run("folder", photos, "--out", small, "--reencode", "jpeg", "--quality", 30)
    run("folder", photos, "--out", large, "--reencode", "jpeg")
    assert len(images(small)["1200x600.jpg"]) < 0.6 * len(images(large)["1200x600.jpg"])


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def test_encoding_keeps_what_an_image_shows(tmp_path: Path) -> None:
    half = Image.new("RGB", (60, 40), (200, 0, 0))
    half.paste((0, 0, 200), (30, 0, 60, 40))
    turned = Image.Exif()
    turned[0x0112] = 6  # shown a quarter turn clockwise
    extension, data, *sizes = encode(encoded(half, "JPEG", exif=turned, quality=95), None, "png", 95) or ("", b"")
    assert sizes == [(40, 60)] * 2
    upright = opened(data).convert("RGB")
    assert (extension, upright.size) == ("png", (40, 60))
    assert upright.getpixel((20, 10))[0] > 150  # red is at the top
    assert upright.getpixel((20, 50))[2] > 150
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    assert opened((encode(encoded(clear, "PNG"), None, "jpeg", 95) or ("", b""))[1]).getpixel((5, 5)) == (255, 255, 255)
    assert opened((encode(encoded(clear, "PNG"), 10, None, 95) or ("", b""))[1]).getpixel((5, 5))[3] == 0
    deep = Image.fromarray(np.full((20, 20), 128 * 257, np.uint16))
    assert opened((encode(encoded(deep, "PNG"), None, "png", 95) or ("", b""))[1]).convert("L").getpixel((5, 5)) == 128
    cmyk = Image.new("CMYK", (20, 20), (0, 255, 255, 0))
    assert opened((encode(encoded(cmyk, "JPEG"), None, "png", 95) or ("", b""))[1]).convert("RGB").getpixel((5, 5))[0] > 200
    assert encode(encoded(half, "PNG"), 40, None, 95) is None
    for kind, picture in (("JPEG", half), ("PNG", Image.fromarray(np.zeros((40, 60), np.uint16)))):
        shrunk = encode(encoded(picture, kind, exif=turned), 20, None, 95)
        assert shrunk is not None
        assert (shrunk.before, shrunk.after, opened(shrunk.data).size) == ((40, 60), (20, 30), (20, 30))


def test_images_that_cannot_be_decoded_are_listed(photos: Path, tmp_path: Path) -> None:
    (photos / "cut.png").write_bytes((photos / "large.png").read_bytes()[:300])
    refused = run("folder", photos, "--out", tmp_path / "a", "--resize", 100)
    assert refused.exit_code == 1
    assert "undecodable_image" in refused.output
    assert run("folder", photos, "--out", tmp_path / "b", "--resize", 100, "--skip-bad").exit_code == 0
    assert json.loads((tmp_path / "b" / "skipped.jsonl").read_text())["input"] == "cut.png"
    assert run("folder", photos, "--out", tmp_path / "c").exit_code == 0  # nobody asked to look inside


def test_holdout_keeps_duplicates_on_one_side(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(60):
        (root / f"{i}.png").write_bytes(photo((24, 20), i))
        (root / f"{i}-copy.bmp").write_bytes(photo((24, 20), i, "BMP"))  # the same pixels in other bytes
    result = run("folder", root, "--out", tmp_path / "s", "--holdout", 0.3, "--max-count", 50, "--processes", 1)
    assert result.exit_code == 0, result.output
    parts = {part: set(samples(tmp_path / "s" / part)) for part in ("train", "holdout")}
    assert len(parts["train"]) + len(parts["holdout"]) == 120
    assert 15 <= len(parts["holdout"]) <= 60
    for keys in parts.values():
        stems = {key.rsplit("_", 1)[0] for key in keys}
        assert {f"{stem}-copy" for stem in stems if "copy" not in stem} == {stem for stem in stems if "copy" in stem}
    for part, keys in parts.items():
        manifest = json.loads((tmp_path / "s" / part / "manifest.json").read_text())
        assert manifest["num_samples"] == len(keys) == sum(json.loads((tmp_path / "s" / part / "sizes.json").read_text()).values())
    assert run("folder", root, "--out", tmp_path / "s", "--holdout", 0.3, "--max-count", 50, "--processes", 1).exit_code == 0  # finished
    assert run("folder", root, "--out", tmp_path / "s", "--holdout", 0.4, "--max-count", 50, "--processes", 1).exit_code == 1


def test_holdout_by_key_is_the_split_of_a_source(tmp_path: Path, photos: Path) -> None:
    for i in range(40):
        (photos / f"n{i}.png").write_bytes(image((i, 0, 0)))
    assert run("folder", photos, "--out", tmp_path / "whole").exit_code == 0
    assert run("folder", photos, "--out", tmp_path / "s", "--holdout", 0.25, "--holdout-by", "key").exit_code == 0
    keys = list(samples(tmp_path / "whole"))
    held = in_part(keys, 0.25, "holdout")
    assert set(samples(tmp_path / "s" / "holdout")) == {key for key, is_held in zip(keys, held) if is_held}
    assert 0 < held.sum() < len(keys)


def test_captions_are_nfc_and_bad_ones_are_listed(table: Path, tmp_path: Path) -> None:
    rows = ["file,name", "images/0.img,cafe\u0301", "images/1.img,"]
    table.write_bytes("\n".join(rows).encode() + b"\nimages/2.img,caf\xe9\n")
    result = run("csv", table, "--out", tmp_path / "s", "--image-column", "file", "--caption", "{name}", "--skip-bad")
    assert result.exit_code == 0, result.output
    assert [m["txt"].decode() for m in samples(tmp_path / "s").values()] == ["caf\u00e9"]
    lines = [json.loads(line) for line in (tmp_path / "s" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["input"], line["reason"]) for line in lines] == [("t.csv, line 3", "empty_caption"), ("t.csv, line 4", "not_utf8")]
    refused = run("csv", table, "--out", tmp_path / "r", "--image-column", "file", "--caption", "{name}")
    assert refused.exit_code == 1
    assert "t.csv, line 3: empty_caption" in refused.output


def test_a_table_is_a_stream(table: Path, tmp_path: Path) -> None:
    """Only the rows under way are held."""
    with table.open("a") as file:
        file.writelines(f"images/0.img,row {i},,a\n" for i in range(5000))
        file.write("ragged\n")
    tasks = Table.open(str(table), Columns("file", ("{name}",))).tasks(100)
    first = next(tasks)
    assert [row.number for row in first] == list(range(100))
    *_, last = tasks
    assert (last[-1].line, last[-1].problem) == (5006, "expected 4 fields (file, name, tags, kind), found 1")


def test_urls_are_read_and_written(folder: Path, table: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in [*folder.rglob("*.png"), *(tmp_path / "images").iterdir(), table]:
        memory.put_file(str(path), f"/in/{path.relative_to(tmp_path)}")
    assert run("folder", "memory://in/photos", "--out", "memory://out/f", "--label-from-folder").exit_code == 0
    assert run("folder", folder, "--out", tmp_path / "f", "--label-from-folder").exit_code == 0
    assert run("csv", "memory://in/t.csv", "--out", f"file://{tmp_path}/c", *ARGS, "--processes", 1).exit_code == 0
    assert run("csv", table, "--out", tmp_path / "d", *ARGS).exit_code == 0
    assert memory.cat_file("/out/f/00000.tar") == (tmp_path / "f" / "00000.tar").read_bytes()
    assert memory.cat_file("/out/f/classnames.txt") == b"cat\ndog\n"
    assert (tmp_path / "c" / "00000.tar").read_bytes() == (tmp_path / "d" / "00000.tar").read_bytes()
    for folder in ("/in", "/out"):
        memory.rm(folder, recursive=True)


def test_processes_make_no_difference(folder: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        options = ("--max-count", 2, "--resize", 8, "--holdout", 0.5, "--holdout-by", "key", "--processes", processes)
        assert run("folder", folder, "--out", tmp_path / f"s{processes}", *options).exit_code == 0
    files = sorted(path.relative_to(tmp_path / "s1") for path in (tmp_path / "s1").rglob("*.tar*"))
    assert len(files) > 4
    assert all((tmp_path / "s1" / name).read_bytes() == (tmp_path / "s2" / name).read_bytes() for name in files)


def test_the_result_as_json(folder: Path, tmp_path: Path) -> None:
    result = run("folder", folder, "--out", tmp_path / "s", "--json", "--licence", "CC0")
    assert json.loads(result.stdout) == json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert json.loads(result.stdout)["licence"] == "CC0"


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "nothing in it" in run("folder", tmp_path / "empty", "--out", tmp_path / "a").output
    (tmp_path / "empty" / "readme.md").write_text("no image")
    result = run("folder", tmp_path / "empty", "--out", tmp_path / "b", "--skip-bad")
    assert result.exit_code == 1
    assert "no sample was written" in result.output


@pytest.mark.parametrize(
    ("kind", "extension"),
    [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tiff"), ("PPM", "ppm")],
)
def test_formats_are_told_as_training_tells_them(kind: str, extension: str) -> None:
    data = image((1, 2, 3), kind)
    assert extension_of(data) == extension
    assert sniff(data) == kind.lower()
    for other in (b"", b"<html>", b"RIFF1234WAVE", b"P9 ", data[:1]):
        assert extension_of(other) is None
        assert sniff(other) is None


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_is_found_and_explains_itself(name: str) -> None:
    result = CliRunner().invoke(commands, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    assert f"python -m data_prep {name}" in result.output or "Commands" in result.output
    assert CliRunner().invoke(commands, [name + "s"]).exit_code == 2


def test_commands_are_imported_when_they_run() -> None:
    script = "import sys, data_prep.__main__, data_prep.build.commands, data_prep.build.commands\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("kind", ["csv", "jsonl", "tsv", "folder", "sidecar", "shards"])
@pytest.mark.parametrize("finished", [True, False])
def test_an_input_that_changed_under_its_name_is_noticed(tmp_path: Path, kind: str, finished: bool) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    (root / "a.png").write_bytes(image((1, 2, 3)))
    (root / "a.txt").write_text("a caption")
    (root / "t.csv").write_text("image\na.png\n")
    (root / "t.jsonl").write_text('{"image": "a.png"}\n')
    given = {"csv": "t.csv", "tsv": "t.csv", "jsonl": "t.jsonl", "shards": "s"}
    assert run("csv", root / "t.csv", "--image-column", "image", "--out", root / "s").exit_code == 0
    if kind in ("folder", "sidecar"):
        for name in ("t.csv", "t.jsonl"):
            (root / name).unlink()
        for path in (root / "s").iterdir():
            path.unlink()
        (root / "s").rmdir()
    command = (
        "build",
        kind,
        root / given.get(kind, ""),
        "--out",
        out,
        "--skip-bad",
        *(["--image-column", "image"] if kind == "csv" else []),
    )

    def given_command() -> Result:
        return CliRunner().invoke(commands, list(map(str, command)), env={"COLUMNS": "300", "TERM": "dumb"})

    assert given_command().exit_code == 0
    assert given_command().exit_code == 0
    changed = root / "s" / "00000.tar" if kind == "shards" else root / "a.png"
    if not finished:  # as a kill before the end leaves it
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["num_samples"] >= 1
        shutil.rmtree(out)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(writer, "_check_no_other_shards", lambda *_: (_ for _ in ()).throw(OSError("killed")))
            assert given_command().exit_code == 1
        assert (out / "unfinished" / "00000.json").exists()
    os.utime(changed, ns=(1, 1))
    result = given_command()
    assert result.exit_code == 1
    assert "an input has changed since" in " ".join(result.output.split())
