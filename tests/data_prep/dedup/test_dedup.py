"""Planted copies are all found and nothing else is; what is kept, dropped and reported adds up."""

import io
import json
import tracemalloc
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image, ImageDraw, ImageFilter
from typer.testing import CliRunner

from data_prep import copies as dedup_settle
from data_prep import perceptual
from data_prep.copies import Copies, ranks
from data_prep.dedup import command as dedup
from data_prep.dedup.find import Options, find
from data_prep.perceptual import SIGNATURE, signature
from data_prep.records import Record
from data_prep.shards.read import Shard
from data_prep.shards.serial import write_shards

app = typer.Typer()
app.command()(dedup.dedup)

COLOURS = [(200, 40, 40), (40, 160, 60), (40, 60, 200), (230, 190, 40), (150, 60, 170)]
SHAPES = ["ellipse", "rectangle", "triangle", "cross"]


def shape(kind: str, colour: tuple[int, int, int], at: tuple[int, int] = (64, 64), size: int = 40) -> Image.Image:
    image = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(image)
    (x, y), box = at, (at[0] - size, at[1] - size, at[0] + size, at[1] + size)
    if kind in ("ellipse", "rectangle"):
        getattr(draw, kind)(box, fill=colour)
    elif kind == "triangle":
        draw.polygon([(x, y - size), (x - size, y + size), (x + size, y + size)], fill=colour)
    else:
        draw.rectangle((x - size // 3, y - size, x + size // 3, y + size), fill=colour)
        draw.rectangle((x - size, y - size // 3, x + size, y + size // 3), fill=colour)
    return image


def scene(seed: int) -> Image.Image:
    """A smooth picture with a few blobs: as a photograph, all its pixels differ a little."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(20, 230, (6, 6, 3), dtype=np.uint8))
    image = coarse.resize((160, 120), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, r = rng.integers(10, 150), rng.integers(10, 110), rng.integers(6, 25)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(v) for v in rng.integers(0, 255, 3)))
    return image.filter(ImageFilter.GaussianBlur(0.7))


def distinct() -> list[Image.Image]:
    """Pictures none of which is a copy: among them one shape in five colours, places and sizes, and a scene with a small thing added."""
    images = [scene(seed) for seed in range(60)]
    images += [shape(kind, colour) for kind in SHAPES for colour in COLOURS]
    images += [shape(kind, COLOURS[0], at) for kind in SHAPES for at in ((50, 50), (78, 50))]
    images += [shape(kind, COLOURS[1], size=size) for kind in SHAPES for size in (24, 32, 50)]
    for seed in range(6):
        image = scene(seed)
        ImageDraw.Draw(image).rectangle((70, 50, 84, 64), fill=(255, 255, 255) if seed % 2 else (0, 0, 0))
        images.append(image)
    return images


def encoded(image: Image.Image, kind: str, **options: object) -> dict[str, bytes]:
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind], **options)
    return {kind: file.getvalue()}


def brighter(image: Image.Image, factor: float) -> Image.Image:
    return Image.fromarray(np.clip(np.asarray(image, np.float32) * factor, 0, 255).round().astype(np.uint8))


def resized(image: Image.Image, factor: float) -> Image.Image:
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)


EXACT = {
    "png": lambda image: encoded(image, "png", compress_level=1),
    "rgba": lambda image: encoded(image.convert("RGBA"), "png"),
    "webp": lambda image: encoded(image, "webp", lossless=True),
}
NEAR = {
    "jpeg80": lambda image: encoded(image, "jpg", quality=80),
    "smaller": lambda image: encoded(resized(image, 0.9), "png"),
    "half": lambda image: encoded(resized(image, 0.5), "png"),
    "larger": lambda image: encoded(resized(image, 1.25), "png"),
    "brighter": lambda image: encoded(brighter(image, 1.08), "png"),
    "darker": lambda image: encoded(brighter(image, 0.9), "png"),
    "jpeg_smaller": lambda image: encoded(resized(image, 0.8), "jpg", quality=85),
}


def records(images: list[Image.Image], start: int = 0) -> list[Record]:
    return [Record(f"s{start + i:04d}", encoded(image, "png") | {"txt": b"picture %d" % i}) for i, image in enumerate(images)]


def planted(ways: dict, step: int) -> tuple[list[Record], dict[str, str]]:
    """Distinct pictures, and after them copies of every `step`th of each way; -> (records, key of the copy -> key of its original)."""
    originals = distinct()
    made, truth = records(originals), {}
    for w, (name, way) in enumerate(ways.items()):
        for i in range(w % step, len(originals), step):
            key = f"c_{name}_{i:04d}"
            made.append(Record(key, way(originals[i]) | {"txt": b"a copy with a longer caption"}))
            truth[key] = f"s{i:04d}"
    return made, truth


def clusters(report: dict) -> dict[str, str]:
    """Key of what was dropped -> key of what was kept."""
    return {each["sample"].split("/")[-1]: c["kept"].split("/")[-1] for c in report["clusters"] for each in c["dropped"]}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], dict[str, str]]:
    """(shards with exact and near copies, the exact ones, the near ones)"""
    folder = tmp_path_factory.mktemp("planted")
    near, near_truth = planted(NEAR, 7)
    exact, exact_truth = planted(EXACT, 11)
    write_shards(near + [record for record in exact if record.key in exact_truth], folder / "all", max_count=90)
    return folder / "all", exact_truth, near_truth


def test_planted_copies_are_all_found_and_nothing_else(shards: tuple) -> None:
    folder, exact, near = shards
    assert len(exact) > 25
    assert len(near) > 90
    report = dedup.deduplicate([str(folder)], processes=1)
    assert clusters(report) == exact | near
    assert report["dropped"] == {"exact_copy": len(exact), "near_copy": len(near)}
    assert report["good"] + sum(report["dropped"].values()) == report["samples"]


def test_exact_finds_lossless_twins_alone(shards: tuple) -> None:
    folder, exact, _ = shards
    report = dedup.deduplicate([str(folder)], options=Options(near=None), processes=1)
    assert clusters(report) == exact


def test_written_shards_lack_the_copies_and_say_why(shards: tuple, tmp_path: Path) -> None:
    folder, exact, near = shards
    out, json_file, page = tmp_path / "out", tmp_path / "r.json", tmp_path / "p.html"
    arguments = [str(folder), "--out", str(out), "--report", str(json_file), "--processes", "1", "--json", "--page", str(page)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(json_file.read_text())
    keys = [key for tar in sorted(out.glob("*.tar")) for key in Shard(str(tar)).index.keys]
    assert keys == [record.key for record in records(distinct())]
    assert report["written"] == len(keys)
    lines = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert {line.get("where", line.get("input")).split("/")[-1]: line["reason"] for line in lines} == (
        dict.fromkeys(exact, "exact_copy") | dict.fromkeys(near, "near_copy")
    )
    copied = Shard(str(out / "00000.tar")).read(3).members
    assert copied == records(distinct())[3].members
    text = page.read_text()
    assert text.count("<img") == len(exact | near) + len(report["clusters"])
    assert "src='http" not in text
    assert 'src="http' not in text


def test_training_samples_that_are_in_the_evaluation_set_are_dropped(tmp_path: Path) -> None:
    pictures = distinct()
    train = records(pictures[:40])
    train += [Record("leak_exact", EXACT["webp"](pictures[50])), Record("leak_near", NEAR["jpeg80"](pictures[51]))]
    train += [Record("twin", EXACT["webp"](pictures[5]))]
    write_shards(train, tmp_path / "train")
    write_shards([Record(f"e{i}", encoded(pictures[i], "png")) for i in range(45, 60)] + records(pictures[45:47]), tmp_path / "eval")
    run = {"against": [str(tmp_path / "eval")], "processes": 1}
    report = dedup.deduplicate([str(tmp_path / "train")], str(tmp_path / "a"), options=Options(within=False), **run)
    assert report["dropped"] == {"in_evaluation": 2}
    assert report["evaluation"]["in_training"] == 2
    assert report["evaluation"]["samples"] == 17
    assert {each["sample"].split("/")[-1] for c in report["clusters"] for each in c["dropped"]} == {"leak_exact", "leak_near"}
    assert all(c["evaluation"] for c in report["clusters"])
    both = dedup.deduplicate([str(tmp_path / "train")], str(tmp_path / "b"), **run)
    assert both["dropped"] == {"exact_copy": 1, "in_evaluation": 2}
    assert both["written"] == 40


@pytest.mark.parametrize(("keep", "expected"), [("first", "small"), ("largest", "large"), ("longest-caption", "told")])
def test_which_copy_is_kept(tmp_path: Path, keep: str, expected: str) -> None:
    picture = scene(1)
    members = {
        "small": encoded(resized(picture, 0.5), "png") | {"txt": b"a"},
        "large": encoded(resized(picture, 1.25), "png") | {"txt": b"ab"},
        "told": encoded(picture, "png") | {"txt": "ä long story".encode()},
    }
    write_shards([Record(key, value) for key, value in members.items()], tmp_path / "s")
    report = dedup.deduplicate([str(tmp_path / "s")], options=Options(keep=keep), processes=1)
    assert clusters(report) == {key: expected for key in members if key != expected}


def test_unreadable_images_are_counted_and_listed(tmp_path: Path) -> None:
    good = records(distinct()[:4])
    bad = [Record("cut", {"jpg": encoded(scene(9), "jpg")["jpg"][:200]}), Record("none", {"txt": b"no image"})]
    write_shards([*good, *bad], tmp_path / "s")
    report = dedup.deduplicate([str(tmp_path / "s")], str(tmp_path / "o"), processes=1)
    assert report["dropped"] == {"missing_image": 1, "undecodable_image": 1}
    assert report["written"] == report["good"] == 4
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "o" / "skipped.jsonl").read_text().splitlines()]
    assert sorted(reasons) == ["missing_image", "undecodable_image"]


def test_a_damaged_shard_is_reported(tmp_path: Path) -> None:
    write_shards(records(distinct()[:6]), tmp_path / "s")
    tar = tmp_path / "s" / "00000.tar"
    data = tar.read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2])
    report = dedup.deduplicate([str(tmp_path / "cut.tar")], processes=1)
    assert 0 < report["samples"] < 6
    assert "cut.tar at byte" in report["damage"][0]


@pytest.mark.parametrize("distance", [0, 3, 6, 10])
def test_pairs_within_misses_none(distance: int) -> None:
    """Against all pairs: bands are complete within the distance."""
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**63, 300, dtype=np.uint64)
    for i in range(150):  # a copy of hash i with a few of its bits turned
        for bit in rng.choice(64, rng.integers(0, 14), replace=False):
            hashes[299 - i] = hashes[299 - i] ^ np.uint64(1 << int(bit)) if bit % 2 else hashes[i] ^ np.uint64(1 << int(bit))
    hashes[10] = hashes[20] = hashes[30]
    expected = {(i, j) for i, j in combinations(range(300), 2) if bin(int(hashes[i]) ^ int(hashes[j])).count("1") <= distance}
    assert len(expected) >= 3
    found = {tuple(pair) for pairs in perceptual.pairs_within(hashes, distance) for pair in pairs.tolist()}
    assert found == expected


def _settled(signatures: np.ndarray, small: np.ndarray, training: int, within: bool = True) -> Copies:
    copies = Copies(signatures, np.ones(len(signatures), bool), training, within=within)
    neighbours = dedup_settle.Neighbours(copies, signatures, 10, perceptual.DIFFERENCE)
    dedup_settle.settle(neighbours, np.arange(len(signatures)), small)
    return copies


@pytest.mark.parametrize("pending", [dedup_settle.PENDING, 1])
@pytest.mark.parametrize("within", [True, False])
def test_settling_drops_what_comparing_all_pairs_in_order_drops(pending: int, within: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the neighbours of hashes are too many to hold."""
    monkeypatch.setattr(dedup_settle, "PENDING", pending)
    monkeypatch.setattr(dedup_settle, "NEIGHBOURS", 0)
    rng = np.random.default_rng(0)
    small = rng.choice([0, 12, 24, 60, 72], (120, 1, 1, 3)).astype(np.uint8) + np.zeros((1, 32, 32, 1), np.uint8)
    signatures = np.zeros(120, SIGNATURE)
    signatures["digest"] = np.arange(240).reshape(120, 2)
    signatures["hash"] = np.uint64(1) << rng.integers(0, 40, 120).astype(np.uint64)  # 2 bits apart, or equal
    signatures["hash"][::3] ^= np.uint64((1 << 56) - (1 << 44))  # 12 bits away from the others
    signatures["colour"] = np.tile(small[:, 0, 0], (1, 9))
    copies = _settled(signatures, small, 100, within)
    kept: list[int] = []
    for sample in [*range(100, 120), *range(100)]:
        near = [k for k in kept if int(signatures["hash"][k] ^ signatures["hash"][sample]).bit_count() <= 10]
        alike = sample < 100 and any(perceptual.difference(small[k], small[sample]) <= perceptual.DIFFERENCE for k in near)
        assert (copies.of[sample] >= 0) == alike
        assert not alike or copies.of[sample] in kept
        if not alike and (within or sample >= 100):
            kept.append(sample)
    assert 10 < (copies.of >= 0).sum() < 90


def test_many_samples_of_one_hash_take_no_pair_each() -> None:
    """16,000 flat images and 4,000 encodings of one picture, whose hashes differ in a few bits."""
    rng = np.random.default_rng(0)
    count, flat = 20_000, 16_000
    signatures = np.zeros(count, SIGNATURE)
    signatures["digest"] = rng.integers(0, 2**63, (count, 2))
    signatures["hash"][flat:] = np.uint64(0x5555_5555_5555_5555) ^ (np.uint64(1) << rng.integers(0, 8, count - flat).astype(np.uint64))
    signatures["colour"][::2] = 100
    small = np.broadcast_to(np.uint8([100, 0]).reshape(2, 1, 1, 1), (2, 32, 32, 3))[np.arange(count) % 2]
    copies = Copies(signatures, np.ones(count, bool), count)
    tracemalloc.start()
    neighbours = dedup_settle.Neighbours(copies, signatures, 10, perceptual.DIFFERENCE)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 200 * count
    assert max(len(near) for _, near in _dropping(neighbours)) <= 2
    copies.of[:] = -1
    dedup_settle.settle(neighbours, np.arange(count), small)
    assert np.flatnonzero(copies.of < 0).tolist() == [0, 1, flat, flat + 1]
    assert copies.of[2:flat].tolist() == [0, 1] * (flat // 2 - 1)


def _dropping(neighbours: dedup_settle.Neighbours) -> Iterator[tuple[int, np.ndarray]]:
    """The candidates, where all of them are copies."""
    for sample, near in neighbours.candidates():
        yield sample, near
        if len(near):
            neighbours.copies.drop(int(near[0]), sample, "near", 0.0)


def test_difference_knows_brightness_from_colour() -> None:
    picture = np.asarray(scene(3).resize((32, 32)))
    brightened = np.clip(picture * 1.1, 0, 255).round().astype(np.uint8)
    redder = picture.copy()
    redder[..., 0] = np.clip(redder[..., 0] * 1.4, 0, 255)
    spot = picture.copy()
    spot[10:13, 10:13] = 255 - spot[10:13, 10:13] // 2
    assert perceptual.difference(picture, picture) == 0
    assert perceptual.difference(picture, brightened) < 3
    assert perceptual.difference(picture, redder) > perceptual.DIFFERENCE
    assert perceptual.difference(picture, spot) > perceptual.DIFFERENCE
    several = perceptual.differences(np.stack([picture] * 3), np.stack([brightened, redder, spot]))
    assert (several <= perceptual.DIFFERENCE).tolist() == [True, False, False]


def test_blank_images_are_not_hashed_by_their_noise() -> None:
    rng = np.random.default_rng(0)
    noise = [np.full((64, 64, 3), 200, np.uint8) + rng.integers(0, 2, (64, 64, 3), dtype=np.uint8) for _ in range(2)]
    assert signature(noise[0])["hash"] == signature(noise[1])["hash"] == 0
    assert signature(noise[0])["digest"].tolist() != signature(noise[1])["digest"].tolist()


def test_equals_follow_the_one_compared_for_them_and_chains_are_not_followed() -> None:
    rows = np.array([signature(np.full((8, 8 + i % 2, 3), i % 3, np.uint8)) for i in range(12)])  # equal with period 6
    usable = np.arange(12) != 6
    copies = Copies(rows, usable, 12)
    assert copies.first.tolist() == [0, 1, 2, 3, 4, 5]
    copies.drop(1, 2, "near", 3.0)
    copies.drop(2, 3, "near", 4.0)  # 2 is dropped already: it drops no other
    copies.settle()
    assert copies.of.tolist() == [-1, -1, 1, -1, -1, -1, -1, 1, 1, 3, 4, 5]
    assert copies.rule.tolist() == [0, 0, 2, 0, 0, 0, 0, 1, 2, 1, 1, 1]
    rows["caption"][8] = 100
    assert Copies(rows, usable, 12, "longest-caption").first.tolist()[0] == 8
    held = Copies(rows, usable, 6, within=False)
    held.settle()
    assert held.of.tolist() == [-1, 7, 8, 9, 10, 11] + [-1] * 6
    with pytest.raises(ValueError, match="first, largest, longest-caption"):
        ranks(rows, 12, "best")


class MeanColour:
    """A model whose embedding is the mean colour."""

    fingerprint, precision = "mean colour", "fp32"

    def __init__(self) -> None:
        from mmpretrain.types import Preprocess

        self.preprocess = Preprocess(size=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def images(self, pixels: torch.Tensor):
        from mmpretrain.types import Encoded

        return Encoded(features=None, pooled=pixels.mean((2, 3)))


def test_embeddings_join_what_a_model_finds_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep import embed
    from data_prep.dedup import embeddings

    monkeypatch.setattr(embed, "load_model", lambda *_, **__: MeanColour())
    monkeypatch.setattr(embeddings, "TILE", 3)  # pairs lie within and across tiles
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (250, 2, 0), (0, 250, 60), (2, 0, 250)]
    write_shards(records([Image.new("RGB", (40, 40), colour) for colour in colours]), tmp_path / "s")
    report = dedup.deduplicate([str(tmp_path / "s")], options=Options(near=None, embedding="x", threshold=0.99), processes=1)
    assert clusters(report) == {"s0004": "s0000", "s0006": "s0002"}
    assert report["dropped"] == {"embedding_copy": 2}
    close = dedup.deduplicate([str(tmp_path / "s")], options=Options(near=None, embedding="x", threshold=0.95), processes=1)
    assert clusters(close) == {"s0004": "s0000", "s0006": "s0002", "s0005": "s0001"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "best"], "expected first, largest"),
        (["--no-within"], "without --against"),
        (["--against", "{shards}"], "named twice"),
        (["--embedding", "nothing/there"], "nothing/there"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    write_shards(records(distinct()[:3]), tmp_path / "s")
    arguments = [argument.replace("{shards}", str(tmp_path / "s")) for argument in arguments]
    result = CliRunner().invoke(app, [str(tmp_path / "s"), "--processes", "1", *arguments])
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())


@pytest.mark.slow
def test_find_does_not_depend_on_processes(shards: tuple) -> None:
    names = sorted(str(path) for path in shards[0].glob("*.tar"))
    one = find(names, [], Options(), processes=1)
    two = find(names, [], Options(), processes=2)
    assert np.array_equal(one.signatures, two.signatures)
    assert np.array_equal(one.copies.of, two.copies.of)
