"""The commands that docs/data.md shows work as they are written there, on small inputs of the names that it uses."""

import base64
import glob
import io
import json
import shlex
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from data_prep.__main__ import app
from data_prep.records import Record
from data_prep.shards.serial import write_shards
from tests import docs
from tests.data_prep.build.readers.support import image

PAGE = "docs/data.md"
ON_THE_DEMO = ("python -m data_prep mix configs/demo.yaml",)  # run by tests/test_docs.py, which has the demo's data
COLOURS = [(10, 20, 30), (200, 90, 40)]


def commands() -> list[str]:
    return [command for command in docs.commands(PAGE) if command not in docs.not_run(PAGE) and command not in ON_THE_DEMO]


def put(name: str, data: bytes | str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(data if isinstance(data, bytes) else data.encode())


def pictures(folder: str, *names: str) -> None:
    for name, colour in zip(names, COLOURS):
        put(f"{folder}/{name}", image(colour, "JPEG"))


def table(name: str, header: str, rest: str) -> None:
    pictures(str(Path(name).parent), "a.jpg", "b.jpg")
    put(name, f"{header}\na.jpg,{rest}\nb.jpg,{rest}\n")


def their_tars(folder: str, count: int) -> None:
    Path(folder).mkdir(parents=True)
    for n in range(count):
        with tarfile.open(f"{folder}/{n:05d}.tar", "w") as file:
            for name, data in ((f"{n}.jpg", image(COLOURS[0], "JPEG")), (f"{n}.txt", b"a caption")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


def voc(folder: str, splits: str) -> None:
    pictures(f"{folder}/JPEGImages", "a.jpg", "b.jpg")
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax><ymax>5</ymax></bndbox>"
    for name in "ab":
        put(f"{folder}/Annotations/{name}.xml", f"<annotation><object><name>cell</name>{box}</object></annotation>")
    put(f"{folder}/ImageSets/Main/{splits}.txt", "a\nb\n")


def coco() -> None:
    pictures("val2017", "a.jpg", "b.jpg")
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}]
    boxes = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]
    captions = [{"id": i, "image_id": i, "caption": "a caption"} for i in (1, 2)]
    put("instances_val.json", json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}))
    put("captions_val.json", json.dumps({"images": images, "annotations": captions}))


def flowers() -> None:
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=["p", "q"])})
    rows = {"image": [{"bytes": image(c, "JPEG"), "path": None} for c in COLOURS], "text": ["one", "two"], "label": [0, 1]}
    made = datasets.Dataset.from_dict(rows, kinds)
    datasets.DatasetDict({"train": made}).save_to_disk("saved/flowers")
    Path("data").mkdir()
    made.to_parquet("data/train-0.parquet")


def shards(folder: str) -> None:
    members = []
    for colour in COLOURS:
        file = io.BytesIO()
        Image.new("RGB", (100, 120), colour).save(file, "JPEG")
        members.append({"jpg": file.getvalue(), "txt": b"a caption"})
    write_shards([Record(f"{Path(folder).name}{i}", each) for i, each in enumerate(members)], Path(folder))


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    make_inputs()


def make_inputs() -> None:
    """Small inputs of every name that docs/data.md uses, in the working directory."""
    table("pairs.csv", "file,title,tags", "a title,x|y")
    put("pairs.jsonl", '{"file": "a.jpg", "text": "one"}\n{"file": "b.jpg", "text": "two"}\n')
    put("pairs.tsv", b"\n".join(b"%d\t%s\ta text" % (i, base64.b64encode(image(colour))) for i, colour in enumerate(COLOURS)))
    pictures("photos", "dog/a.jpg", "cat/b.jpg")
    flowers()
    coco()
    voc("VOCdevkit/VOC2012", "train")
    their_tars("downloads", 1)
    put("downloads/00000_stats.json", '{"successes": 1}')
    their_tars("theirs", 100)
    for emoji in ("noto", "twemoji"):
        table(f"raw/emoji-{emoji}/emoji.csv", "file,codepoints,name,keywords", "1f600,a face,happy|grin")
    write_shards([Record("other", {"jpg": image((0, 0, 0), "JPEG"), "txt": b"x"})], Path("shards/usda_test"))
    table("raw/usda-pomological/paintings.csv", "file,species,subjects,artist,year", "Malus domestica,apples,A. Painter,1900")
    pictures("raw/clothing/train", "hat/a.jpg", "shoes/b.jpg")
    voc("raw/bccd", "train")
    for name in ("usda", "theirs"):
        shards(f"shards/{name}")


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("command", commands())
def test_commands_work_as_written(command: str) -> None:
    words = shlex.split(command)[3:]
    out = Path(words[words.index("--out") + 1]) if "--out" in words else None
    if out is not None and out.is_dir():
        shutil.rmtree(out)
    if words[1] == "sidecar":
        for name in ("dog/a.txt", "cat/b.txt"):
            put(f"photos/{name}", "a caption")
    arguments = [name for word in words for name in (sorted(glob.glob(word)) if "*" in word and "{" not in word else [word])]
    inline = () if words[0] in ("mix", "stats") or "--repair" in words else ("--processes", "1")
    done = CliRunner().invoke(app, [*arguments, *inline], env={"COLUMNS": "300", "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    assert out is None or out.exists()
