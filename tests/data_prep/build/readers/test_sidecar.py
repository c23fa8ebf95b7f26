"""Images with sidecar files."""

import json
from pathlib import Path

import pytest

from data_prep.build.readers.sidecar import sidecar
from data_prep.records import InputError
from tests.data_prep.build.readers.support import collect, image, reasons

PNG = image()


def fill(folder: Path, **files: bytes | str | dict[str, object]) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        data = json.dumps(content) if isinstance(content, dict) else content
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def test_every_image_and_sidecar_is_accounted_for(tmp_path: Path) -> None:
    fill(
        tmp_path,
        a_DOT_png=PNG,
        a_DOT_txt="of a\n",
        x__b_DOT_JPG=image(kind="JPEG"),
        x__b_DOT_json={"caption": "of b", "n": 1},
        c_DOT_png=PNG,  # nothing beside it
        d_DOT_png=PNG,
        d_DOT_txt=b"\xff",
        e_DOT_txt="no image",
        f_DOT_png=b"GIF?",
        f_DOT_txt="f",
        g_DOT_png=PNG,
        g_DOT_json="{",
        h_DOT_png=PNG,
        h_DOT_png_DOT_txt="named after the file",
        i_DOT_png=PNG,
        i_DOT_txt=" \n",
        j_DOT_png=PNG,
        j_DOT_json={"title": "another field"},
    )
    (tmp_path / "my photo.png").write_bytes(PNG)
    (tmp_path / "my photo.txt").write_text("m")
    (tmp_path / "notes.md").write_text("ignored")
    found, skipped = collect(sidecar(str(tmp_path)))
    odd = next(key for key in found if key.startswith("my_photo_"))
    assert {key: members["txt"].decode() for key, members in found.items()} == {
        "a": "of a",
        "x/b": "of b",
        "h": "named after the file",
        odd: "m",
    }
    assert found["x/b"]["jpg"] == image(kind="JPEG")
    assert json.loads(found["x/b"]["json"]) == {"caption": "of b", "n": 1}
    assert reasons(skipped) == {
        "c.png": "missing_caption",
        "d.png": "not_utf8",
        "e.txt": "missing_image",
        "f.png": "unknown_format",
        "g.png": "bad_json",
        "i.png": "empty_caption",
        "j.png": "missing_caption",
    }
    assert len(found) + len(skipped) == 11


def test_images_of_one_name_are_all_kept(tmp_path: Path) -> None:
    fill(tmp_path, a_DOT_png=PNG, a_DOT_PNG=image((1, 2, 3)), a_DOT_jpg=image(kind="JPEG"), a_DOT_txt="shared")
    found, skipped = collect(sidecar(str(tmp_path)), 2)
    assert len(found) == 3
    assert not skipped
    assert {data for members in found.values() for name, data in members.items() if name != "txt"} == {
        PNG,
        image((1, 2, 3)),
        image(kind="JPEG"),
    }


def test_captions_of_fields_and_lines(tmp_path: Path) -> None:
    fill(tmp_path, a_DOT_png=PNG, a_DOT_txt="one\n\ntwo\n", a_DOT_json={"by": "Ann", "alts": ["three", "one"]})
    members = collect(sidecar(str(tmp_path), ("txt", "{by}: {txt}", "alts"), lines=True))[0]["a"]
    assert members["txt"] == b"one"
    assert json.loads(members["json"]) == {"by": "Ann", "alts": ["three", "one"], "captions": ["one", "two", "Ann: one, two", "three"]}
    assert collect(sidecar(str(tmp_path), ("{by}: {txt}",)))[0]["a"]["txt"] == b"Ann: one two"


def test_labels(tmp_path: Path) -> None:
    fill(
        tmp_path,
        b__1_DOT_png=PNG,
        b__1_DOT_json={"caption": "x", "kind": "fig"},
        a__2_DOT_png=PNG,
        a__2_DOT_json={"caption": "y", "kind": "nut"},
    )
    fill(tmp_path, c_DOT_png=PNG, c_DOT_txt="z")
    by_folder = sidecar(str(tmp_path), label_from_folder=True)
    found, skipped = collect(by_folder)
    assert by_folder.classes == ["a", "b"]
    assert {key: members["cls"] for key, members in found.items()} == {"a/2": b"0", "b/1": b"1"}
    assert reasons(skipped) == {"c.png": "missing_label"}
    by_field = sidecar(str(tmp_path), label="kind")
    assert by_field.classes == ["fig", "nut"]
    assert {key: members["cls"] for key, members in collect(by_field)[0].items()} == {"a/2": b"1", "b/1": b"0"}


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no images"):
        sidecar(str(tmp_path))
