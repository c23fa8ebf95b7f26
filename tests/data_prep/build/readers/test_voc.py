"""Folders in the layout of PASCAL VOC."""

import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.build.readers.voc import boxes, parse_xml, voc
from data_prep.records import InputError
from mmpretrain.data.schema import BadSample
from tests.data_prep.build.readers.support import collect, image, reasons

JPEG = image(kind="JPEG")


def thing(name: str, *corners: object, more: str = "") -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), corners)
    return f"<object><name>{name}</name>{more}<bndbox>{''.join(f'<{t}>{c}</{t}>' for t, c in tags)}</bndbox></object>"


def annotation(*things: str, file: str = "") -> str:
    size = "<size><width>16</width><height>16</height><depth>3</depth></size>"
    return f"<annotation><filename>{file}</filename>{size}{''.join(things)}</annotation>"


def mask(mode: str = "P") -> bytes:
    out = io.BytesIO()
    Image.new(mode, (16, 16)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / name).mkdir(parents=True)
    for i, name in enumerate(["a", "b", "c"]):
        (tmp_path / "JPEGImages" / f"{name}.jpg").write_bytes(image((i, 0, 0), "JPEG"))
    (tmp_path / "Annotations" / "a.xml").write_text(
        annotation(thing("cat", 1, 1, 16, 8, more="<difficult>1</difficult>"), thing("ant", "3.5", 2, 4, 2))
    )
    (tmp_path / "Annotations" / "b.xml").write_text(annotation())
    (tmp_path / "Annotations" / "c.xml").write_text(annotation(thing("bee", 2, 2, 5, 5)))
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a\nc\n")
    (tmp_path / "ImageSets" / "Main" / "bee_train.txt").write_text("a -1\nc  1\n")
    return tmp_path


def test_boxes_have_coco_form(folder: Path) -> None:
    reader = voc(str(folder))
    found, skipped = collect(reader, 2)
    assert reader.classes == ["ant", "bee", "cat"]
    assert json.loads(found["a"]["json"]) == {
        "boxes": [
            {"bbox": [0, 0, 16, 8], "category": "cat", "category_id": 2, "difficult": 1},
            {"bbox": [2.5, 1, 1.5, 1], "category": "ant", "category_id": 0},
        ],
        "width": 16,
        "height": 16,
    }
    assert json.loads(found["b"]["json"])["boxes"] == []
    assert found["c"]["jpg"] == image((2, 0, 0), "JPEG")
    assert list(found) == ["a", "b", "c"]
    assert not skipped
    one = collect(voc(str(folder), zero_based=True))[0]["c"]
    assert json.loads(one["json"])["boxes"][0]["bbox"] == [2, 2, 3, 3]


def test_splits_share_the_classes(folder: Path) -> None:
    reader = voc(str(folder), "train")
    assert list(collect(reader)[0]) == ["a", "c"]
    assert reader.classes == ["ant", "bee", "cat"]
    assert list(collect(voc(str(folder), "bee_train"))[0]) == ["c"]
    with pytest.raises(InputError, match="no split 'val'; ImageSets lists bee_train, train"):
        voc(str(folder), "val")


def test_masks(folder: Path) -> None:
    (folder / "SegmentationClass").mkdir()
    for name, data in {"a": mask(), "b": mask("RGB"), "c": b"no"}.items():
        (folder / "SegmentationClass" / f"{name}.png").write_bytes(data)
    (folder / "SegmentationClass" / "d.png").write_bytes(mask("L"))
    (folder / "JPEGImages" / "d.png").write_bytes(image())
    found, skipped = collect(voc(str(folder)))
    assert found["a"]["mask.png"] == mask()
    assert set(found["d"]) == {"png", "mask.png"}
    assert reasons(skipped) == {"Annotations/b.xml": "bad_mask", "Annotations/c.xml": "bad_mask"}


def test_what_is_wrong_is_counted(folder: Path) -> None:
    bad = {
        "d": annotation(thing("cat", 1, 1, 5, 5)),
        "e": annotation(thing("cat", 5, 1, 3, 5)),
        "f": annotation(thing("cat", "x", 1, 3, 5)),
        "g": annotation("<object><name>cat</name></object>"),
        "h": "<annotation><object>",
        "i": "<html></html>",
        "j": annotation(file="../../b.jpg"),
        "k": '<!DOCTYPE x [<!ENTITY e "boom">]>' + annotation(thing("cat", 1, 1, 2, 2)),
    }
    for name, text in bad.items():
        (folder / "Annotations" / f"{name}.xml").write_text(text)
        if name not in "dj":
            (folder / "JPEGImages" / f"{name}.jpg").write_bytes(JPEG)
    (folder / "ImageSets" / "Main" / "all.txt").write_text("\n".join([*"abc", *bad, "nothing"]))
    found, skipped = collect(voc(str(folder), "all"))
    assert list(found) == ["a", "b", "c", "j"]  # of a path in <filename>, only the name counts
    assert reasons(skipped) == {
        "Annotations/d.xml": "missing_image",
        "Annotations/e.xml": "bad_box",
        "Annotations/f.xml": "bad_box",
        "Annotations/g.xml": "bad_box",
        "Annotations/h.xml": "bad_xml",
        "Annotations/i.xml": "bad_xml",
        "Annotations/k.xml": "unsafe_xml",
        "nothing": "missing_annotation",
    }
    assert len(found) + len(skipped) == 12


def test_another_layout_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError, match=r"expected Annotations with XML files.*found images"):
        voc(str(tmp_path))


BOMB = (
    "<!DOCTYPE z [<!ENTITY a 'ha'>" + "".join(f"<!ENTITY {chr(97 + i)} '{f'&{chr(96 + i)};' * 10}'>" for i in range(1, 9)) + "]><z>&i;</z>"
)
OUTSIDE = '<!DOCTYPE z [<!ENTITY f SYSTEM "file:///etc/hostname">]><z>&f;</z>'


@pytest.mark.parametrize("text", [BOMB, OUTSIDE, "<!DOCTYPE annotation><annotation/>", "<a>" * 100 + "</a>" * 100])
def test_unsafe_documents_are_refused(text: str) -> None:
    with pytest.raises(BadSample, match="unsafe_xml"):
        parse_xml(text.encode())


@given(st.one_of(st.binary(max_size=300), st.text(alphabet="<>/!&;[]\"'? abxml=DOCTYPE", max_size=80).map(str.encode)))
def test_any_document_is_a_tree_or_a_bad_sample(data: bytes) -> None:
    try:
        found = parse_xml(data)
    except BadSample as error:
        found = error.reason
    if isinstance(found, str):
        assert found in ("bad_xml", "unsafe_xml")
    else:
        assert ElementTree.tostring(found) == ElementTree.tostring(ElementTree.fromstring(data))


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=4), st.text(alphabet="0123456789.-einfa", max_size=6)), max_size=6),
    st.integers(0, 300),
    st.binary(max_size=3),
)
def test_any_objects_are_boxes_or_a_bad_sample(corners: list[tuple[str, str]], at: int, junk: bytes) -> None:
    text = annotation(*(thing("cat", a, 1, b, 5) for a, b in corners)).encode("utf-8", "replace")
    try:
        found = boxes(parse_xml(text[:at] + junk + text[at:]), {"cat": 0}, False)
    except BadSample as error:
        reason, found = error.reason, []
    else:
        reason = "bad_box"
    assert reason in ("bad_xml", "unsafe_xml", "bad_box", "unknown_category")
    assert all(width > 0 and height > 0 for _, _, width, height in (item["bbox"] for item in found))
