"""COCO annotation files."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.build.readers.coco import coco
from data_prep.records import InputError
from tests.data_prep.build.readers.support import collect, image

PNG = image()
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}]


def write(path: Path, **content: Any) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def images(folder: Path, *names: str) -> list[dict[str, Any]]:
    for name in names:
        (folder / name).write_bytes(PNG)
    return [{"id": i, "file_name": name, "width": 16, "height": 16} for i, name in enumerate(names, 1)]


def box(number: int, image_id: int, bbox: Any, category: int = 18, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image_id, "bbox": bbox, "category_id": category, "segmentation": [[0, 0, 1, 1]]} | more


def test_boxes_and_captions_of_the_same_images(tmp_path: Path) -> None:
    listed = images(tmp_path, "000001.png", "000002.png", "000003.png")
    notes = [box(1, 1, [1, 2, 3.5, 4], area=14.0, iscrowd=0), box(2, 1, [0, 0, 16, 16], 3, iscrowd=1)]
    said = [{"id": 1, "image_id": i, "caption": text} for i, text in [(1, "A dog. "), (1, "It sits."), (2, "Nothing."), (3, " ")]]
    files = [
        write(tmp_path / "i.json", images=listed, annotations=notes, categories=CATEGORIES),
        write(tmp_path / "c.json", images=listed, annotations=said),
    ]
    reader = coco(files, str(tmp_path))
    found, skipped = collect(reader, 2)
    assert reader.classes == ["car", "dog"]  # in the order of their ids
    assert json.loads(found["000001"]["json"]) == {
        "boxes": [
            {"bbox": [1, 2, 3.5, 4], "category": "dog", "category_id": 1, "area": 14.0},
            {"bbox": [0, 0, 16, 16], "category": "car", "category_id": 0, "iscrowd": 1},
        ],
        "captions": ["A dog.", "It sits."],
        "file_name": "000001.png",
        "image_id": 1,
        "width": 16,
        "height": 16,
    }
    assert found["000001"]["txt"] == b"A dog."
    assert found["000001"]["png"] == PNG
    assert json.loads(found["000002"]["json"])["boxes"] == []
    assert [(item.where, item.reason) for item in skipped] == [("image 3 (000003.png)", "empty_caption")]


def test_captions_alone_and_boxes_alone(tmp_path: Path) -> None:
    listed = images(tmp_path, "a.png")
    said = write(tmp_path / "c.json", images=listed, annotations=[{"id": 1, "image_id": 1, "caption": "x"}])
    assert set(collect(coco([said], str(tmp_path)))[0]["a"]) == {"png", "txt", "json"}
    drawn = write(tmp_path / "i.json", images=listed, annotations=[], categories=CATEGORIES)
    assert set(collect(coco([drawn], str(tmp_path)))[0]["a"]) == {"png", "json"}


def test_what_is_wrong_is_counted(tmp_path: Path) -> None:
    listed = images(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.png", "b.jpg")
    (tmp_path / "e.png").unlink()
    listed += [
        {"id": 7, "file_name": "../x.png"},
        {"id": 8, "file_name": "/etc/hostname"},
        {"id": 9, "file_name": "a.png"},
        {"id": 1, "file_name": "z.png"},
    ]
    notes = [box(1, 2, [0, 0, -1, 4]), box(2, 3, [0, 0, "4", 4]), box(3, 4, [0, 0, 4, 4], 99), box(4, 77, [0, 0, 4, 4])]
    found, skipped = collect(coco([write(tmp_path / "i.json", images=listed, annotations=notes, categories=CATEGORIES)], str(tmp_path)))
    assert len(found) == 2  # a.png, and b.jpg under a key that b.png does not have
    assert [item.reason for item in skipped] == [
        *("bad_box", "bad_box", "unknown_category", "missing_image", "bad_path", "bad_path"),
        "duplicate_key",
        "duplicate_id",
        "unknown_image",
    ]
    assert len(found) + len(skipped) == len(listed) + 1  # and the annotation of an image that is not listed


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not readable as JSON"),
        ("[]", "found a list"),
        ('{"info": 1}', "found info"),
        ('{"images": [{"id": 1}], "annotations": []}', r"images\[0\] has no file_name"),
        ('{"images": [{"id": [1], "file_name": "a"}], "annotations": []}', r"images\[0\] has no id that is a number or text"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}', "same name"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "i.json").write_text(content)
    with pytest.raises(InputError, match=says):
        coco([str(tmp_path / "i.json")], str(tmp_path))


FLAVOURS = {
    "COCO's results format": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 0.5}],
    "Visual Genome": [{"id": 1, "regions": []}],
    "`build jsonl`": [{"image": "a.jpg", "caption": "x"}],
    "VGG Image Annotator": {"_via_settings": {}, "_via_img_metadata": {}},
    "LabelMe": {"version": "5", "shapes": [], "imagePath": "a.jpg"},
    "Karpathy": {"images": [{"filename": "a.jpg", "sentences": []}], "dataset": "coco"},
    "panoptic": {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "segments_info": []}]},
    "COCO-Text": {"imgs": {}, "anns": {}},
    "VQA": {"questions": []},
    "LVIS": {"images": [{"id": 1, "coco_url": "http://x/train2017/1.jpg"}], "annotations": []},
}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_annotations_of_another_flavour_are_called_by_name(flavour: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(FLAVOURS[flavour]))
    with pytest.raises(InputError, match=flavour):
        coco([str(tmp_path / "a.json")], str(tmp_path))


def test_a_pointer_in_place_of_annotations_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(InputError, match="a Git LFS pointer, expected COCO annotations"):
        coco([str(tmp_path / "a.json")], str(tmp_path))


def test_an_entry_that_lacks_its_fields_costs_itself(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(image())
    content = {
        "images": [{"file_name": "0.png"}, {"id": 1, "file_name": "1.png"}],
        "annotations": [{"id": 7}, {"image_id": 1, "id": 8, "bbox": [0, 0, 1, 1], "category_id": [1]}, 5],
        "categories": [{"id": 1, "name": "cat"}, {"id": "b", "name": "dog"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    records, left_out = collect(coco([str(tmp_path / "a.json")], str(tmp_path)), 10)
    assert not records
    assert sorted(item.reason for item in left_out) == ["bad_entry", "bad_entry", "bad_entry", "unknown_category"]
    content["annotations"][1]["category_id"] = 1
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert list(collect(coco([str(tmp_path / "a.json")], str(tmp_path)), 10)[0]) == ["1"]
