"""Captions and images from the columns of a row."""

import json
from pathlib import Path

import pytest

from data_prep.build.readers.columns import Columns
from mmpretrain.data.schema import BadSample
from tests.data import test_captions
from tests.data_prep.build.readers.support import image

ROW = {"image": image()} | test_captions.ROW


@pytest.mark.parametrize("path", ["{outside}", "../outside.png", "sub/../../outside.png", "{root}/../outside.png", "/etc/hostname"])
def test_a_table_names_no_file_outside_its_folder(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "outside.png").write_bytes(image())
    (root / "in.png").write_bytes(image())
    named = path.format(outside=tmp_path / "outside.png", root=root)
    columns = Columns(root=str(root))
    for cell in (named, {"bytes": None, "path": named}):
        with pytest.raises(BadSample, match="--root") as raised:
            columns.record(0, {"image": cell})
        assert raised.value.reason == "outside_root"
        assert columns.source({"image": cell}) is None
    for good in ("in.png", str(root / "in.png"), "sub/../in.png", "./in.png"):
        assert columns.record(0, {"image": good}).members == {"png": image()}
    (tmp_path / "link").symlink_to(root)
    assert columns.record(0, {"image": str(tmp_path / "link" / "in.png")}).members == {"png": image()}
    if path != "/etc/hostname":
        assert Columns(root=str(root), folders=(str(tmp_path),)).record(0, {"image": named}).members == {"png": image()}
        assert Columns(root="/").record(0, {"image": str(tmp_path / "outside.png")}).members == {"png": image()}


@pytest.mark.parametrize("path", ["../b/x.png", "/b/x.png", "memory://a/../b/x.png"])
def test_a_remote_table_names_no_file_outside_its_folder(path: str) -> None:
    with pytest.raises(BadSample, match="does not lie in memory://a"):
        Columns(root="memory://a").record(0, {"image": path})


def test_several_captions_are_kept_once_each() -> None:
    members = Columns(captions=("{name}", "tags", "{name}")).record(5, ROW).members
    assert members["txt"] == b"red apple"
    assert json.loads(members["json"]) == {"captions": ["red apple", "round", "sweet"]}


def test_what_json_does_not_hold() -> None:
    assert json.loads(Columns(extra=("nan", "meta")).record(0, ROW).members["json"]) == {"meta": {"by": "Ann"}, "nan": None}
    with pytest.raises(BadSample, match="bad_metadata"):
        Columns(extra=("image",)).record(0, ROW)


@pytest.mark.parametrize(
    ("label", "classes", "expected"),
    [
        (2, None, b"2"),
        ("2", None, b"2"),
        ("b", ("a", "b"), b"1"),
        (1, ("a", "b"), b"1"),
        (2, ("a", "b"), None),
        ("c", ("a", "b"), None),
        (-1, None, None),
        (1.5, None, None),
        (True, None, None),
        ("c", None, None),
    ],
)
def test_labels(label: object, classes: tuple[str, ...] | None, expected: bytes | None) -> None:
    columns, row = Columns(label="kind", classes=classes), {"image": image(), "kind": label}
    if expected is not None:
        assert columns.record(0, row).members["cls"] == expected
        return
    with pytest.raises(BadSample, match="bad_label"):
        columns.record(0, row)
