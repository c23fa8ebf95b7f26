"""`--resize` of images that have boxes and masks."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from data_prep.__main__ import app
from data_prep.build.images import scaled
from mmpretrain.data.decode import ImageLimits, decode_image
from mmpretrain.data.schema import BadSample
from tests.data_prep.build.readers.support import image, samples

AT = (slice(20, 60), slice(40, 120))  # rows and columns of the red rectangle


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["build", *map(str, arguments), "--processes", "1"], env={"COLUMNS": "300", "TERM": "dumb"})


def png(pixels: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", **options)
    return out.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """200 x 100 pixels with a red rectangle, its box and its mask."""
    pixels, mask = np.zeros((100, 200, 3), np.uint8), np.zeros((100, 200), np.uint8)
    pixels[AT], mask[AT] = (255, 0, 0), 7
    for folder in ("JPEGImages", "Annotations", "SegmentationClass"):
        (tmp_path / "voc" / folder).mkdir(parents=True)
    (tmp_path / "voc" / "JPEGImages" / "a.png").write_bytes(png(pixels))
    palette = Image.fromarray(mask, "L").convert("P")
    palette.putpalette([v for i in range(256) for v in (i, 255 - i, 3)])
    palette.save(tmp_path / "voc" / "SegmentationClass" / "a.png")
    box = "<bndbox><xmin>41</xmin><ymin>21</ymin><xmax>120</xmax><ymax>60</ymax></bndbox>"
    size = "<size><width>200</width><height>100</height></size>"
    note = f"<annotation>{size}<object><name>red</name>{box}</object></annotation>"
    (tmp_path / "voc" / "Annotations" / "a.xml").write_text(note)
    return tmp_path / "voc"


def red(pixels: np.ndarray) -> list[int]:
    """[x, y, width, height] of what is red."""
    rows, columns = np.nonzero(pixels[..., 0] > 127)
    return [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]


def test_voc_boxes_and_masks_follow_the_image(voc: Path, tmp_path: Path) -> None:
    assert run("voc", voc, "--out", tmp_path / "out", "--resize", 50).exit_code == 0
    found = samples(tmp_path / "out")["a"]
    pixels, metadata = decoded(found["png"]), json.loads(found["json"])
    assert pixels.shape == (50, 100, 3)
    assert (metadata["width"], metadata["height"]) == (100, 50)
    assert metadata["boxes"] == [{"bbox": [20, 10, 40, 20], "category": "red", "category_id": 0}]
    assert red(pixels) == metadata["boxes"][0]["bbox"]
    mask = Image.open(io.BytesIO(found["mask.png"]))
    assert mask.mode == "P"
    expected = np.zeros((50, 100), np.uint8)
    expected[10:30, 20:60] = 7
    assert np.array_equal(np.asarray(mask), expected)
    assert run("voc", voc, "--out", tmp_path / "same", "--resize", 100).exit_code == 0  # nothing to shrink: nothing is touched
    assert samples(tmp_path / "same")["a"]["mask.png"] == (voc / "SegmentationClass" / "a.png").read_bytes()


def test_coco_boxes_and_areas_and_resharded_ones(voc: Path, tmp_path: Path) -> None:
    listed = {"id": 1, "file_name": "a.png", "width": 200, "height": 100}
    note = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [40, 20, 80, 40], "area": 3200}
    (tmp_path / "c.json").write_text(
        json.dumps({"images": [listed], "annotations": [note], "categories": [{"id": 3, "name": "red"}]}),
    )
    options = (tmp_path / "c.json", voc / "JPEGImages", "--out")
    assert run("coco", *options, tmp_path / "at_once", "--resize", 50).exit_code == 0
    found = samples(tmp_path / "at_once")
    assert json.loads(found["a"]["json"])["boxes"] == [{"area": 800, "bbox": [20, 10, 40, 20], "category": "red", "category_id": 0}]
    assert run("coco", *options, tmp_path / "full").exit_code == 0
    assert run("shards", tmp_path / "full", "--out", tmp_path / "later", "--resize", 50).exit_code == 0
    assert samples(tmp_path / "later") == found


def test_boxes_of_another_form_and_masks_of_another_size_are_refused(voc: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"image": "a.png", "boxes": [[40, 20, 120, 60]]}\n')
    options = ("jsonl", tmp_path / "t.jsonl", "--root", voc / "JPEGImages", "--extra", "boxes", "--out")
    result = run(*options, tmp_path / "a", "--resize", 50)
    assert result.exit_code == 1
    assert "bad_box" in result.output
    assert "Build without --resize" in result.output
    assert run(*options, tmp_path / "b").exit_code == 0
    (voc / "SegmentationClass" / "a.png").write_bytes(png(np.zeros((50, 50), np.uint8)))
    result = run("voc", voc, "--out", tmp_path / "c", "--resize", 50, "--skip-bad")
    assert json.loads((tmp_path / "c" / "skipped.jsonl").read_text())["reason"] == "bad_mask"


def test_what_says_nothing_of_pixels_stays() -> None:
    members = {"json": b'{"width": 30, "height": 20, "boxes": 3}', "txt": b"a"}
    assert scaled(members, (200, 100), (20, 10)) == {}  # that width is not the image's
    assert scaled({"json": b"no json"}, (200, 100), (20, 10)) == {}
    deep = {"mask.png": png(np.repeat(np.arange(0, 40_000, 10_000, dtype=np.uint16), 5).reshape(4, 5))}
    assert decoded(scaled(deep, (5, 4), (5, 2))["mask.png"]).tolist() == [[10_000] * 5, [30_000] * 5]
    with pytest.raises(BadSample, match="bad_mask"):
        scaled({"mask.png": b"\x89PNG\r\n\x1a\n"}, (5, 4), (5, 2))


BROKEN = b"\x89PNG\r\n\x1a\n" + b"not a chunk of any kind" * 4


@pytest.mark.parametrize("options", [("--resize", "8"), ("--reencode", "jpeg")])
def test_an_image_that_cannot_be_decoded_is_named_by_its_file(options: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "broken one.png").write_bytes(BROKEN)
    (tmp_path / "in" / "good.png").write_bytes(image())
    assert run("folder", tmp_path / "in", "--out", tmp_path / "out", *options, "--skip-bad").exit_code == 0
    (left_out,) = map(json.loads, (tmp_path / "out" / "skipped.jsonl").read_text().splitlines())
    assert left_out == {"input": "deep/broken one.png", "reason": "undecodable_image", "detail": "png: its header cannot be read"}


def refusal(data: bytes) -> str:
    try:
        decode_image(data, ImageLimits(min_side=1))
    except BadSample as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore")
def test_no_message_of_a_decoder_names_an_object_in_memory() -> None:
    messages = []
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        whole = image((9, 200, 30), kind)
        messages += map(refusal, (whole[:20], whole[: len(whole) // 2], whole[:12] + b"\xff" * 40, whole[:30] + b"\0" * 40))
    assert sum(map(bool, messages)) > 10
    assert not [message for message in messages if " at 0x" in message]
