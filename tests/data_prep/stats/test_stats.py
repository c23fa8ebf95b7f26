"""The report says what the shards hold, however they are cut, and loses no bad sample."""

from __future__ import annotations

import copy
import io
import json
import tarfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.dedup.command import deduplicate
from data_prep.records import Record
from data_prep.shards.serial import write_shards
from data_prep.stats import command as stats_module
from data_prep.stats import page as stats_page
from data_prep.stats.charts import Bin, histogram, linear_bins, log_bins
from data_prep.stats.collect import Stage, rank_of
from data_prep.stats.duplicates import Duplicates, find_duplicates
from data_prep.stats.numbers import growth, numbers
from data_prep.stats.summary import Frequent, Histogram, Lowest, Pictures, Ref, Summary, hashed
from data_prep.stats.text import script, words

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>'


@cache
def picture(seed: int, width: int = 24, height: int = 16, kind: str = "PNG") -> bytes:
    """Smooth, so that look-alikes can be told from others."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


def records() -> list[Record]:
    """Twenty captioned pictures of two classes; one caption twice, one picture three times, three bad samples."""
    sizes = [(24, 16)] * 10 + [(64, 64)] * 6 + [(16, 160)] * 1 + [(32, 32)] * 3
    found = []
    for i, (width, height) in enumerate(sizes):
        seed = 0 if i in (1, 2) else i
        text = "a red fox" if i in (3, 4) else f"picture number {i} of it" if i else HOSTILE
        found.append(Record(f"k{i:02d}", {"png": picture(seed, width, height), "txt": text.encode(), "cls": str(int(i > 14)).encode()}))
    found.append(Record("bad_image", {"png": picture(50)[:60], "txt": b"a cut picture"}))
    found.append(Record("no_image", {"png": b"<html>404</html>", "txt": b"a page"}))
    found.append(Record("bad_text", {"png": picture(51), "txt": b"\xff\xfe\xfa"}))
    return found


def summary(folder: Path, stage: Stage = Stage()) -> tuple[Summary, list[str]]:
    names = sorted(map(str, folder.glob("*.tar")))
    found = Summary()
    for name in names:
        found.merge(stage(name))
    return found, names


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    root = tmp_path_factory.mktemp("shards")
    for count in (4, 9, 100):
        write_shards(records(), root / str(count), max_count=count, licence="CC0", command="build it")
        (root / str(count) / "classnames.txt").write_text("cat\ndog\nbird\n")
    return {count: root / str(count) for count in (4, 9, 100)}


def test_known_shards_give_known_numbers(shards: dict[int, Path]) -> None:
    found, names = summary(shards[9])
    d = numbers(found, names, 1.0, "txt", "cls", duplicates(found, names))
    assert (d["samples"], d["looked_at"], d["shards"]) == (23, 23, 3)
    assert {name: m["samples"] for name, m in d["members"].items()} == {"png": 23, "txt": 23, "cls": 20}
    assert d["images"]["formats"] == {"png": 22, "unknown": 1}
    assert found.short_side == {16: 13, 64: 6, 32: 3}  # the cut picture and that of bad_text have headers of 24 x 16
    assert found.long_side == {24: 12, 64: 6, 160: 1, 32: 3}
    assert d["images"]["common_sizes"][0] == ["24 × 16", 12]
    assert d["images"]["aspect"]["min"] == pytest.approx(0.1, rel=0.03)
    assert (d["captions"]["captions"], d["captions"]["distinct"], d["captions"]["in_repeats"]) == (22, 21, 2)
    assert d["captions"]["repeated"] == [("a red fox", 2)]
    assert d["captions"]["characters"]["min"] == len("a page")
    assert found.tokens[5] == 3  # "a red fox" twice and "a cut picture": three words, begin and end
    assert dict(map(tuple, d["vocabulary"]["top"]))["picture"] == 18  # samples that say it
    assert d["labels"]["counts"] == [("cat", 15), ("dog", 5), ("bird", 0)]
    assert d["labels"]["empty"] == ["bird"]
    assert [(line["licence"], line["command"]) for line in d["licences"]] == [("CC0", "build it")]


def test_nothing_bad_is_lost(shards: dict[int, Path]) -> None:
    found, names = summary(shards[4])
    d = numbers(found, names, 1.0, "txt", "cls", duplicates(found, names))
    assert d["images"]["decoded"] + sum(n for reason, n in d["problems"].items() if reason.startswith("image")) == 23
    assert d["problems"] == {"caption: not_utf8": 1, "image: undecodable_image": 1, "image: unknown_format": 1}
    assert {(b["key"], b["reason"]) for b in d["bad"]} == {
        ("bad_image", "undecodable_image"), ("no_image", "unknown_format"), ("bad_text", "not_utf8"),
    }  # fmt: skip


def test_sizes_are_those_that_are_shown(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    members = []
    for kind, extension in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("TIFF", "tiff")):
        out = io.BytesIO()
        Image.new("RGB", (60, 40), (200, 0, 0)).save(out, kind, **({"tiffinfo": {274: 6}} if kind == "TIFF" else {"exif": turned}))
        members.append(Record(extension, {extension: out.getvalue(), "txt": extension.encode()}))
    write_shards(members, tmp_path, max_count=10)
    found, names = summary(tmp_path)
    d = numbers(found, names, 1.0, "txt", "cls", duplicates(found, names))
    assert d["images"]["common_sizes"] == [["40 × 60", 4]]
    assert d["images"]["aspect"]["max"] == pytest.approx(2 / 3, rel=0.03)


def duplicates(found: Summary, names: list[str]) -> Duplicates:
    return find_duplicates(found.pictures, names, processes=1)


def comparable(found: Summary, names: list[str]) -> dict:
    d = numbers(found, names, 1.0, "txt", "cls", duplicates(found, names))
    for key in ("shards", "tar_bytes", "licences"):  # padding of a tar depends on its cut
        del d[key]
    for group in d["bad"], *(g["samples"] for kind in ("exact", "alike") for g in d["duplicates"][kind]["first"]):
        for place in group:
            del place["shard"]
    return d


def test_keys_that_each_shard_counts_from_0_are_not_drawn_together(tmp_path: Path) -> None:
    for shard in range(8):
        write_shards([Record(f"{i:04d}", {"txt": b"x" * (1 + i + 7 * shard)}) for i in range(40)], tmp_path / str(shard))
    stage = Stage(label=None, share=0.25)
    found = [stage(str(tmp_path / str(shard) / "00000.tar")) for shard in range(8)]
    drawn = [{ref.key for ref, _, _ in part.examples.sorted()} for part in found]
    assert len(set.union(*drawn)) > 20
    assert len(set.intersection(*drawn)) < 4


def test_thumbnails_are_made_in_the_workers(shards: dict[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def run(function: Callable, tasks: list, **options: object) -> Iterator[dict]:
        asked.append((function, options["engine"], options["processes"]))
        return map(function, tasks)

    monkeypatch.setattr(stats_page.engines, "run", run)
    stats_module.report([str(shards[100])], processes=2)
    assert (stats_page.thumbnails, "local", 2) in asked


def test_the_numbers_do_not_depend_on_the_sharding(shards: dict[int, Path]) -> None:
    first = comparable(*summary(shards[4]))
    assert all(comparable(*summary(shards[count])) == first for count in (9, 100))
    keys = [[ref.key for ref, *_ in summary(shards[count])[0].examples.sorted()] for count in (4, 9, 100)]
    assert keys[0] == keys[1] == keys[2]
    assert len(keys[0]) == 21


def test_merging_is_associative_and_commutative(shards: dict[int, Path]) -> None:
    names = sorted(map(str, shards[9].glob("*.tar")))
    a, b, c = (Stage()(name) for name in names)

    def merged(*parts: Summary) -> Summary:
        found = Summary()
        for part in parts:
            found.merge(copy.deepcopy(part))
        return found

    left, right, turned = merged(merged(a, b), c), merged(a, merged(b, c)), merged(c, a, b)
    assert comparable(left, names) == comparable(right, names) == comparable(turned, names)


def test_the_page_escapes_what_strangers_wrote(shards: dict[int, Path]) -> None:
    data, page = stats_module.report([str(shards[100])], processes=1)
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;" in page
    assert 'src="http' not in page  # self-contained
    assert 'href="http' not in page
    assert page.count("data:image/jpeg;base64,") > 20
    for text in ("bad_image", "undecodable_image", "CC0", "build it", "a red fox", "bird"):
        assert text in page
    json.dumps(data)


def test_a_sample_is_chosen_by_keys_and_counts_stay_whole(shards: dict[int, Path]) -> None:
    chosen = []
    for count in (4, 100):
        data, _ = stats_module.report([str(shards[count])], sample=8, processes=1, page=False)
        assert data["samples"] == 23
        assert data["looked_at"] == sum(rank_of(r.key, {e: len(d) for e, d in r.members.items()}) < 8 / 23 * 2**64 for r in records())
        chosen.append((data["looked_at"], data["images"]["short_side"], data["captions"]["repeated"]))
    assert chosen[0] == chosen[1]
    assert 0 < chosen[0][0] < 23


def test_duplicates_planted_are_found(shards: dict[int, Path], tmp_path: Path) -> None:
    found = duplicates(*summary(shards[9]))
    assert [(group.count, sorted(ref.key for ref in group.refs)) for group in found.exact] == [(3, ["k00", "k01", "k02"])]
    assert (found.alike, found.superfluous) == ([], 2)
    shades = [
        Record("small", {"png": picture(5)}),
        Record("large", {"jpg": picture(5, 240, 160, "JPEG")}),
        Record("other", {"png": picture(6)}),
        Record("again", {"png": picture(5)}),
    ]
    write_shards(shades, tmp_path / "alike")
    found = duplicates(*summary(tmp_path / "alike"))
    assert [sorted(ref.key for ref in group.refs) for group in found.alike] == [["again", "large", "small"]]
    assert [(group.count, {ref.key for ref in group.refs}) for group in found.exact] == [(2, {"again", "small"})]
    assert found.superfluous == 2


def test_stats_counts_as_superfluous_what_dedup_drops(tmp_path: Path) -> None:
    """Copies of several kinds, flat pictures of two colours, and pictures that differ in a detail or in colour alone."""
    rng = np.random.default_rng(3)
    base = [np.asarray(Image.open(io.BytesIO(picture(seed, 64, 64)))) for seed in range(100, 112)]
    images = [*base, *base[:3], base[4][:, :, ::-1]]  # equal pixels; colours exchanged
    images += [np.clip(image.astype(int) + rng.integers(-6, 7, image.shape), 0, 255).astype(np.uint8) for image in base[2:6]]  # noise
    images += [np.clip(base[7] * gain, 0, 255).astype(np.uint8) for gain in (1.04, 1.08, 1.12)]  # one brightened further and further
    images += [np.full((40, 40, 3), level, np.uint8) for level in (10, 12, 250)]
    detail = base[8].copy()
    detail[10:24, 10:24] = 255 - detail[10:24, 10:24]
    images.append(detail)
    files = []
    for image in images:
        out = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image)).save(out, "PNG")
        files.append(out.getvalue())
    write_shards([Record(f"{i:03d}", {"png": data}) for i, data in enumerate(files)], tmp_path, max_count=7)
    data, _ = stats_module.report([str(tmp_path)], processes=1, page=False)
    report = deduplicate([str(tmp_path)], processes=1)
    assert data["duplicates"]["superfluous"] == sum(report["dropped"].values()) >= 10
    assert data["duplicates"]["exact"]["superfluous"] == 3
    near = [cluster for cluster in report["clusters"] if any(each["rule"] == "near_copy" for each in cluster["dropped"])]
    assert sorted(1 + len(cluster["dropped"]) for cluster in near) == sorted(g["count"] for g in data["duplicates"]["alike"]["first"])


def test_shards_that_cannot_be_read_are_listed(shards: dict[int, Path], tmp_path: Path) -> None:
    (tmp_path / "page.tar").write_bytes(b"<html>not found</html>" * 100)
    whole = (shards[100] / "00000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    data, page = stats_module.report([str(tmp_path)], processes=1)
    assert {u["shard"].rpartition("/")[2] for u in data["unreadable"]} == {"page.tar", "cut.tar"}
    assert data["samples"] >= 5
    assert "cannot be read" in page


def test_empty_shards_and_no_captions_still_make_a_page(tmp_path: Path) -> None:
    write_shards([Record("a", {"png": picture(1)})], tmp_path / "one")
    _, page = stats_module.report([str(tmp_path / "one")], processes=1)
    assert "names no licence" in page
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "0.tar").write_bytes(bytes(10240))
    data, page = stats_module.report([str(tmp_path / "none")], processes=1)
    assert data["samples"] == 0
    assert "There is no sample" in page


def test_a_key_that_is_no_text_does_not_stop_the_report(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        for name, member in ((b"k\xff.png", picture(1)), (b"k\xff.txt", b"a caption")):
            info = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            info.size = len(member)
            tar.addfile(info, io.BytesIO(member))
    data, page = stats_module.report([str(tmp_path)], processes=1)
    assert data["images"]["decoded"] == data["captions"]["captions"] == 1
    json.dumps(data, ensure_ascii=False).encode()
    page.encode()


def test_histogram_quantiles_are_exact() -> None:
    values = Histogram({1: 5, 3: 4, 100: 1})
    assert [values.quantile(share) for share in (0.0, 0.5, 0.51, 0.9, 0.95, 1.0)] == [1, 1, 3, 3, 100, 100]
    assert values.mean() == pytest.approx(11.7)


def test_frequent_items_survive_the_cap_within_the_stated_error() -> None:
    parts = [Frequent(cap=20) for _ in range(3)]
    for i in range(600):
        parts[i % 3].add(f"rare {i}", i)
        parts[i % 3].add("common", i)
    merged = Frequent(cap=20)
    for part in parts:
        merged.merge(part)
    item, count, _ = merged.top(1)[0]
    assert item == "common"
    assert 600 - merged.missed <= count <= 600
    assert merged.missed > 0
    assert merged.total == 1200
    assert len(merged.items) <= 40


def test_pictures_beyond_the_cap_are_those_of_the_lowest_digests_whatever_the_order() -> None:
    def pictures(order: list[int]) -> Pictures:
        parts = [Pictures(cap=10), Pictures(cap=10)]
        for i in order:
            parts[i % 2].add(hashed(str(i // 2)), hashed(f"key {i}"), Ref("s", i, f"key {i}"))
        parts[0].merge(parts[1])
        return parts[0]

    forward, backward = pictures(list(range(400))), pictures(list(range(399, -1, -1)))
    assert forward.distinct() == backward.distinct()
    assert [picture.count for picture in forward.distinct().values()] == [2] * 10
    assert forward.cut


def test_lowest_keeps_the_lowest_whatever_the_order() -> None:
    numbers_ = np.random.default_rng(0).permutation(1000).tolist()
    kept = Lowest(5)
    for n in numbers_:
        kept.offer((n,), n)
    assert kept.sorted() == [0, 1, 2, 3, 4]


def test_vocabulary_growth_ends_at_the_vocabulary() -> None:
    seen = Frequent()
    for i in range(100):  # a new word with each of the first fifty samples, then one more for the rest
        seen.add(f"w{min(i, 50)}", int((i + 1) / 101 * 2**64))
    points = growth(seen, 100, 1.0, points=10)
    assert [points[i] for i in (1, 4, 5, 9)] == [(20.0, 20), (50.0, 50), (60.0, 51), (100.0, 51)]


def test_bins_hold_every_value() -> None:
    values = Histogram(dict.fromkeys(range(1, 400), 1) | {100_000: 2})
    bins = linear_bins(values)
    assert sum(b.count for b in bins) == 401
    assert bins[-1].label.endswith("or more")
    doubled = log_bins({16: 2, 17: 1, 1024: 3}, 4, np.log2, lambda a, b: f"{a:.0f}")
    assert [(b.low, b.count) for b in doubled if b.count] == [(4.0, 3), (10.0, 3)]
    assert histogram([Bin(0, 1, 3, "<b>")], "t", "<x>").count("<rect") == 1
    assert "<b>" not in histogram([Bin(0, 1, 3, "<b>")], "t", "<x>")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("The cat's whiskers", ["the", "cat's", "whiskers"]), ("東京 tower", ["東", "京", "tower"]), ("3.5 naïve!", ["3", "5", "naïve"])],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("a cat", "Latin"), ("Привет", "Cyrillic"), ("東京タワー", "Japanese kana"), ("123", "none (no letters)")]
)
def test_scripts(text: str, expected: str) -> None:
    assert script(text) == expected
