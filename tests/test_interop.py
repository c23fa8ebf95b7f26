"""Other libraries read what is written here, and the reverse: their own code, not its like written by us.

The slow tests make each library an environment of its own with uv: open_clip's trainer wants webdataset 0.2.86, img2dataset pandas 2.
"""

import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import webdataset
from PIL import Image

from data_prep.records import Record
from data_prep.shards.serial import write_shards
from mmpretrain.data.source import Source, SourceConfig
from mmpretrain.data.views import CenterView, TextView
from mmpretrain.export import export_open_clip
from mmpretrain.towers.weights import load_weights
from tests.data.generated import encoded, picture
from tests.runs import shards
from tests.tiny import WORDS, towers

VIEWS = (CenterView(size=16), TextView(context_length=16))
UNREACHABLE = re.compile(
    r"error sending request|network was disabled|network connectivity is disabled|dns error|timed? ?out", re.IGNORECASE
)


def read(folder: Path, *views: object, **config: object) -> dict[str, torch.Tensor]:
    """Every sample of a folder of shards: the tokens of its caption, or else its picture, by key."""
    source = Source("others", SourceConfig(shards=str(folder), **config), views or VIEWS)
    block = source.rows(range(source.num_samples))
    assert block.skipped == []
    return dict(zip((key.rpartition("/")[2] for key in block.keys), block.pixels[(views or VIEWS)[-1]], strict=True))


def records() -> list[Record]:
    """Samples with every kind of member, captions beyond ASCII, and keys in folders or too long for a plain tar header."""
    keys = ["a", "b/c/d-1", "e_" + 150 * "x", "f/" + 190 * "y", "g", "h", "i"]
    return [
        Record(
            key,
            {
                "png": encoded(picture(i), "PNG"),
                "txt": f"Bild {i}: größer – 日本 🎈".encode(),
                "cls": str(i % 3).encode(),
                "json": json.dumps({"captions": [f"one {i}", f"two {i}"], "name": f"ü{i}"}, ensure_ascii=False).encode(),
            },
        )
        for i, key in enumerate(keys)
    ]


def test_webdataset_reads_every_member_and_decodes_it(tmp_path: Path) -> None:
    written = records()
    write_shards(written, tmp_path / "s", max_count=3)
    url = str(tmp_path / "s" / "{00000..00002}.tar")
    found = list(webdataset.WebDataset(url, shardshuffle=False))
    assert [s["__key__"] for s in found] == [r.key for r in written]
    assert [{name: s[name] for name in r.members} for s, r in zip(found, written, strict=True)] == [r.members for r in written]
    decoded = webdataset.WebDataset(url, shardshuffle=False).decode("pilrgb").to_tuple("jpg;png", "txt", "cls", "json")
    for i, (image, caption, label, meta) in enumerate(decoded):
        assert np.array_equal(np.asarray(image), np.asarray(picture(i)))
        assert (caption, label, meta["name"]) == (f"Bild {i}: größer – 日本 🎈", i % 3, f"ü{i}")
    assert i == len(written) - 1


def test_datasets_reads_our_shards_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    written = records()
    write_shards(written, tmp_path / "s", max_count=3)
    files = sorted(str(path) for path in (tmp_path / "s").glob("*.tar"))
    found = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert found["__key__"][:] == [r.key for r in written]
    for i, row in enumerate(found):
        assert (row["txt"], row["cls"], row["json"]["captions"]) == (f"Bild {i}: größer – 日本 🎈", i % 3, [f"one {i}", f"two {i}"])
        assert np.array_equal(np.asarray(row["png"]), np.asarray(picture(i)))


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("captions", [True, False])
def test_reads_the_layout_of_img2dataset(kind: str, captions: bool, tmp_path: Path) -> None:
    """Rows that failed are in the parquet alone, and leave gaps in the keys; without a caption column there is no txt."""
    good = {}
    for s in range(2):
        rows = []
        with webdataset.TarWriter(str(tmp_path / f"{s:05d}.tar"), user="bigdata", group="bigdata", mode=0o444) as sink:
            for i in range(8):
                key, data = f"{s:05d}{i:04d}", encoded(picture(8 * s + i), {"jpg": "JPEG"}.get(kind, kind))
                failed = i % 4 == 3
                row = {
                    "url": f"https://example.org/{i}",
                    "caption": WORDS[i % len(WORDS)] if captions else None,
                    "key": key,
                    "status": "failed_to_download" if failed else "success",
                    "error_message": "HTTP Error 404: Not Found" if failed else None,
                    "width": None if failed else 32,
                    "height": None if failed else 24,
                    "original_width": None if failed else 640,
                    "original_height": None if failed else 480,
                    "exif": None if failed else "{}",
                    "sha256": None if failed else hashlib.sha256(data).hexdigest(),
                }
                rows.append(row)
                if not failed:
                    text = {"txt": row["caption"]} if captions else {}
                    sink.write({"__key__": key, kind: data, **text, "json": json.dumps(row, indent=4)})
                    good[key] = data
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{s:05d}.parquet")
        stats = {"count": 8, "successes": 6, "failed_to_download": 2, "failed_to_resize": 0, "status_dict": {"success": 6}}
        (tmp_path / f"{s:05d}_stats.json").write_text(json.dumps(stats, indent=4))
    found = read(tmp_path, CenterView(size=24))
    assert found.keys() == good.keys()
    for key, pixels in found.items():
        with Image.open(io.BytesIO(good[key])) as image:
            middle = np.asarray(image.convert("RGB").crop((4, 0, 28, 24)))
        assert np.abs(pixels.permute(1, 2, 0).numpy().astype(int) - middle).max() <= (0 if kind == "png" else 8)
    if captions:
        assert {k: v.tolist() for k, v in read(tmp_path).items()} == {
            k: v.tolist() for k, v in read(tmp_path, caption="json:caption").items()
        }
    else:
        with pytest.raises(ValueError, match="0 of 12 samples have txt; they have"):
            read(tmp_path)


# ---- each library in its own environment


def run(command: list[object], folder: Path, seconds: float, **environment: str) -> subprocess.CompletedProcess:
    ours = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "NO_ALBUMENTATIONS_UPDATE": "1"}
    return subprocess.run(
        [str(c) for c in command],
        cwd=folder,
        env=ours | quiet | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )


def make_environment(folder: Path, *requirements: str) -> Path:
    """A fresh environment of this Python with these packages; -> its folder of programs. Skips the test where that cannot be had."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is missing: it makes the other library's environment (pip install uv)")
    made = run([uv, "venv", "--quiet", "--python", sys.executable, folder / "env"], folder, 60)
    assert made.returncode == 0, made.stdout
    programs = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    try:
        done = run([uv, "pip", "install", "--quiet", "--python", programs / "python", *requirements], folder, 150)
    except subprocess.TimeoutExpired:
        pytest.skip(f"uv could not fetch {requirements[0]} and what it needs in 150 s")
    if done.returncode and ("UV_OFFLINE" in os.environ or UNREACHABLE.search(done.stdout)):
        pytest.skip(f"uv found neither a network nor cached packages: {done.stdout.strip().splitlines()[0]}")
    assert done.returncode == 0, done.stdout
    return programs


@pytest.fixture(scope="module")
def peer() -> Iterator[Path]:
    """open_clip with its trainer. The large packages in our versions, which uv has in its cache; gone after the tests, for it is large."""
    with tempfile.TemporaryDirectory(prefix="open_clip-") as folder:
        same = [f"{name}=={version(name).partition('+')[0]}" for name in ("torch", "torchvision", "timm", "transformers")]
        programs = make_environment(
            Path(folder), f"open_clip_torch[training]=={version('open_clip_torch')}", "webdataset==0.2.86", "safetensors", *same
        )
        yield programs / "python"


FEATURES = """
import sys, torch, open_clip
model, known, checkpoint, out = sys.argv[1:]
model, _, _ = open_clip.create_model_and_transforms(model)
if checkpoint:
    open_clip.load_checkpoint(model, checkpoint)
known = torch.load(known, weights_only=True)
model.eval()
with torch.no_grad():
    found = {"image": model.encode_image(known["pixels"]), "text": model.encode_text(known["ids"]), "scale": model.logit_scale}
torch.save(found, out)
"""


def assert_same_features(peer: Path, folder: Path, dual: torch.nn.Module, model: Path, checkpoint: Path | None = None) -> float:
    """open_clip in its own environment gives the towers' features; -> its logit_scale."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 49406, (5, 16), generator=generator)
    ids[:, 9], ids[:, 10:] = 49407, 0
    known = {"pixels": torch.randn(5, 3, 16, 16, generator=generator), "ids": ids}
    torch.save(known, folder / "known.pt")
    done = run([peer, "-c", FEATURES, f"local-dir:{model}", folder / "known.pt", checkpoint or "", folder / "found.pt"], folder, 100)
    assert done.returncode == 0, done.stdout
    found = torch.load(folder / "found.pt", weights_only=True)
    dual.eval()
    with torch.no_grad():
        torch.testing.assert_close(found["image"], dual.visual(known["pixels"]).features, atol=1e-5, rtol=0)
        torch.testing.assert_close(found["text"], dual.text(ids).features, atol=1e-5, rtol=0)
    return found["scale"].item()


@pytest.mark.slow
def test_open_clip_trains_our_model_on_our_shards_and_we_read_its_checkpoint(peer: Path, tmp_path: Path) -> None:
    shards(tmp_path, pairs=64, photos=3)
    dual = towers()
    model = export_open_clip(dual, {"logit_scale": torch.tensor(2.5)}, tmp_path / "model")
    assert assert_same_features(peer, tmp_path, dual, model) == 2.5
    options = {
        "train-data": f"{tmp_path}/pairs/{{00000..00003}}.tar",  # how many samples is read from the sizes.json beside them
        "dataset-type": "webdataset",
        "model": f"local-dir:{model}",
        "batch-size": 16,
        "workers": 1,
        "epochs": 1,
        "warmup": 1,
        "log-every-n-steps": 1,
        "device": "cpu",
        "precision": "fp32",
        "logs": tmp_path / "logs",
        "name": "tiny",
    }
    done = run([peer, "-m", "open_clip_train.main", *(word for k, v in options.items() for word in (f"--{k}", v))], tmp_path, 150)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "[64/64 (100%)]" in done.stdout
    losses = [float(loss) for loss in re.findall(r" Loss: (\S+) \(", done.stdout)]
    assert len(losses) == 4
    assert all(0 < loss < 3 * math.log(16) for loss in losses)
    trained, checkpoint = towers(1), tmp_path / "logs" / "tiny" / "checkpoints" / "epoch_1.pt"
    leftovers = load_weights(trained, checkpoint)
    assert not torch.equal(trained.visual.state_dict()["proj"], dual.visual.state_dict()["proj"])
    scale = assert_same_features(peer, tmp_path, trained, model, checkpoint)
    assert leftovers["logit_scale"].item() == scale


@pytest.mark.slow
def test_reads_what_img2dataset_downloads(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="img2dataset-") as folder:
        programs = make_environment(Path(folder), "img2dataset==1.47.0")
        wanted = {}
        with open(tmp_path / "urls.csv", "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["url", "caption"])
            for i in range(25):
                path = tmp_path / f"{i}.png"
                if i % 7 == 5:
                    path.write_bytes(b"no image")
                elif i % 7:
                    path.write_bytes(encoded(picture(i, (64, 48)), "PNG"))
                    wanted[f"{i // 10:05d}{i % 10}"] = i  # ten a shard: one digit
                rows.writerow([path.as_uri(), f"picture {i}, größer"])
        options = {
            "url_list": "urls.csv",
            "input_format": "csv",
            "url_col": "url",
            "caption_col": "caption",
            "output_format": "webdataset",
            "output_folder": "out",
            "image_size": 32,
            "number_sample_per_shard": 10,
            "processes_count": 1,
            "thread_count": 2,
            "retries": 0,
            "enable_wandb": "False",
            "disallowed_header_directives": "[]",  # files have no headers
        }
        done = run([programs / "img2dataset", *(f"--{k}={v}" for k, v in options.items())], tmp_path, 100)
    assert done.returncode == 0, done.stdout
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"], done.stdout
    assert len(wanted) == sum(json.loads(path.read_text())["successes"] for path in out.glob("*_stats.json"))
    assert len(wanted) < sum(pyarrow.parquet.read_metadata(path).num_rows for path in out.glob("*.parquet")) == 25
    text = VIEWS[-1]
    tokens = read(out)
    assert tokens.keys() == wanted.keys() == read(out, caption="json:caption").keys()
    written = tmp_path / "same"
    write_shards(
        (Record(k, {"png": encoded(picture(i), "PNG"), "txt": f"picture {i}, größer".encode()}) for k, i in wanted.items()), written
    )
    assert {k: v.tolist() for k, v in tokens.items()} == {k: v.tolist() for k, v in read(written, text).items()}
