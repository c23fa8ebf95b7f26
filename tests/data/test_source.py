"""One source over shards of any making: what is read, what is replaced, what is refused."""

import io
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_prep.records import Record
from data_prep.shards.serial import write_shards
from mmpretrain.config.build import OptionError
from mmpretrain.data import shards as shards_module
from mmpretrain.data.holdout import in_part
from mmpretrain.data.schema import BadSampleBudgetError, ShardError
from mmpretrain.data.shard_names import expand, expand_braces
from mmpretrain.data.source import ImageConfig, Source, SourceConfig, SplitConfig
from mmpretrain.data.views import CenterView, ImageView, TextView
from tests.data.generated import encoded, pair, picture, tar_bytes

IMAGE = CenterView(size=16)
TEXT = TextView(context_length=16)
Shard = Callable[..., Path]


def source(shards: object, *views: object, seed: int = 0, labels: bool = False, **config: object) -> Source:
    return Source(
        "pairs", SourceConfig(shards=str(shards) if isinstance(shards, Path) else shards, **config), views or (IMAGE, TEXT), labels, seed
    )


def members(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    return [member for i in range(start, start + count) for member in pair(i)]


def keys(block: object) -> list[str]:
    return [key.rpartition("/")[2] for key in block.keys]


BAD = {
    "missing_field": [("bad.jpg", encoded(picture()))],
    "empty_caption": pair(0, " \n"),
    "not_utf8": pair(0, b"caf\xe9"),
    "undecodable_image": [("bad.jpg", encoded(picture(size=(200, 200)))[:900]), ("bad.txt", b"cut")],
    "unknown_format": [("bad.jpg", b"%!PS-Adobe-3.0 EPSF-3.0"), ("bad.txt", b"a program")],
    "too_small": [("bad.png", encoded(Image.new("RGB", (1, 3000)), "PNG")), ("bad.txt", b"a line")],
    "too_many_pixels": [("bad.png", encoded(Image.new("L", (2000, 2000)), "PNG")), ("bad.txt", b"a bomb")],
    "too_many_bytes": [("bad.jpg", encoded(picture())), ("bad.txt", b"x" * 70_000)],
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_sample_is_replaced_counted_and_good_ones_come_once(reason: str, shard: Shard) -> None:
    bad = [("bad." + name.partition(".")[2], data) for name, data in BAD[reason]]
    path = shard(members(4, 1) + bad + members(4, 5))
    config = {"max_pixels": 1_000_000}
    block = source(path, **config).rows(range(9))
    counts = Counter(keys(block))
    assert set(counts) == {f"{i:05d}" for i in range(1, 9)}
    assert sorted(counts.values()) == [1] * 7 + [2]  # the ninth slot holds a replacement
    (record,) = block.skipped
    assert {k: record[k] for k in ("source", "key", "reason")} == {"source": "pairs", "key": "bad", "reason": reason}
    assert record["shard"].endswith("00000.tar")
    again = source(path, **config).rows([record["slot"]])
    at = record["slot"]
    assert again.keys == [block.keys[at]]
    assert torch.equal(again.seeds[0], block.seeds[at])


def test_members_that_nobody_needs_may_be_missing_or_bad(shard: Shard) -> None:
    path = shard([("1.jpg", encoded(picture())), ("2.jpg", encoded(picture())), ("2.txt", b"\xff"), ("2.json", b"{")])
    block = source(path, IMAGE).rows(range(2))
    assert sorted(keys(block)) == ["1", "2"]
    assert block.skipped == []


def test_rows_do_not_depend_on_their_company(shard: Shard) -> None:
    strong = ImageView(
        size=16, scale=(0.1, 1), flip=0.5, jitter_prob=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale=0.2, blur=0.5
    )
    one = source(shard(members(12)), strong, TEXT)
    whole = one.rows(range(12)).render()
    for slot in range(12):
        alone = one.rows([slot]).render()
        assert torch.equal(alone.views[strong].data[0], whole.views[strong].data[slot])
        length = alone.views[TEXT].data.shape[1]
        assert torch.equal(alone.views[TEXT].data[0], whole.views[TEXT].data[slot, :length])
    assert len(whole.seeds.unique()) == 12
    later = one.rows(range(12, 24))
    assert sorted(keys(later)) == sorted(keys(whole))
    assert not set(later.seeds.tolist()) & set(whole.seeds.tolist())
    assert keys(source(str(Path(one.shard_sets[0].names[0])), strong, seed=1).rows(range(12))) != keys(whole)


def test_no_sample_has_the_wanted_member_is_said_in_seconds(shard: Shard) -> None:
    path = shard([m for i in range(500) for m in ((f"{i}.jpg", b"x"), (f"{i}.cls", b"1"))])
    started = time.perf_counter()
    with pytest.raises(ShardError, match="0 of 500 samples have txt; they have cls, jpg"):
        source(path)
    with pytest.raises(ShardError, match="0 of 500 samples have json; they have cls, jpg"):
        source(path, IMAGE, labels=True, label="json:category")
    assert time.perf_counter() - started < 2
    with pytest.raises(ShardError, match="0 of 1 samples have an image"):
        source(shard([("1.txt", b"x")], "text.tar"))


def test_all_samples_bad_is_a_budget_error(shard: Shard) -> None:
    path = shard([m for i in range(200) for m in ((f"{i}.jpg", b"not an image"), (f"{i}.txt", b"x"))])
    started = time.perf_counter()
    with pytest.raises(BadSampleBudgetError, match=r"100 samples in a row are bad.*100 unknown_format.*00000\.tar/"):
        source(path).rows(range(8))
    with pytest.raises(BadSampleBudgetError, match="5 samples in a row"):
        source(path, max_consecutive_bad=5, max_bad_fraction=1.0).rows(range(8))
    assert time.perf_counter() - started < 5


def test_a_cut_shard_is_quarantined_from_the_cut_on(shard: Shard) -> None:
    whole = tar_bytes(members(20))
    path = shard(members(20), cut=len(whole) // 2)
    cut = source(path)
    (record,) = cut.damaged()
    assert record["reason"] == "cut"
    assert "byte" in record["detail"]
    read = set(keys(cut.rows(range(cut.num_samples))))
    intact = {f"{i:05d}" for i in range(20)} & read
    assert 6 <= len(intact) < 20
    (path.parent / "sizes.json").write_text('{"00000.tar": 20}')
    with pytest.raises(ShardError, match=r"00000\.tar: \d+ samples found, sizes\.json says 20"):
        source(path)


def test_a_cut_between_image_and_caption_drops_that_sample(shard: Shard) -> None:
    whole = members(12)
    path = shard(whole, cut=tar_bytes(whole).rindex(b"00011.txt"))
    cut = source(path)
    assert [(r["reason"]) for r in cut.damaged()] == ["cut"]
    block = cut.rows(range(12))
    assert [(r["key"], r["reason"]) for r in block.skipped] == [("00011", "missing_field")]
    assert {f"{i:05d}" for i in range(11)} == set(keys(block))


def test_a_shard_lost_after_a_corrupt_header_exceeds_the_budget(tmp_path: Path) -> None:
    data = bytearray(tar_bytes([(f"{i}.jpg", b"x" * 600) for i in range(100)]))
    data[10 * 1536 + 5] ^= 255
    (tmp_path / "0.tar").write_bytes(data)
    with pytest.raises(ShardError, match=rf"about (8|9)\d samples lost.*0\.tar, corrupt_header at byte {10 * 1536}"):
        source(tmp_path / "0.tar", IMAGE)


@pytest.mark.parametrize("data", [b"", b"<html>504</html>" * 50, b"\0\1" * 600])
def test_what_is_no_shard_is_named_at_start(data: bytes, tmp_path: Path, shard: Shard) -> None:
    shard(members(2))
    (tmp_path / "00001.tar").write_bytes(data)
    with pytest.raises(ShardError, match=r"00001\.tar"):
        source(str(tmp_path / "*.tar"))


def test_an_empty_shard_beside_others_is_fine(shard: Shard, tmp_path: Path) -> None:
    shard([], "00000.tar")
    shard(members(3), "00001.tar")
    assert sorted(keys(source(tmp_path).rows(range(3)))) == ["00000", "00001", "00002"]
    with pytest.raises(ShardError, match="no samples"):
        source(tmp_path / "00000.tar")


def test_code_in_a_shard_is_never_touched(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = [(f"00000.{e}", b"import os; os.abort()") for e in ("pyd", "pickle", "pkl", "pth", "py", "jpg.gz")]
    read: list[int] = []
    real = shards_module._Open.read
    monkeypatch.setattr(shards_module._Open, "read", lambda self, member, verify: read.append(member.size) or real(self, member, verify))
    block = source(shard(evil + pair(0))).rows([0])
    assert keys(block) == ["00000"]
    assert len(read) == 2
    assert len(evil[0][1]) not in read


def test_interleaved_members_and_repeated_keys_lose_nothing(shard: Shard) -> None:
    (a_jpg, a_txt), (b_jpg, b_txt) = pair(1), pair(2)
    path = shard([a_jpg, b_jpg, b_txt, a_txt, *pair(1)])
    assert sorted(keys(source(path).rows(range(3)))) == ["00001", "00001~2", "00002"]


def test_a_flipped_byte_is_found_by_the_checksum(tmp_path: Path) -> None:
    write_shards([Record(f"{i}", {"jpg": encoded(picture(i, (64, 64))), "txt": b"x"}) for i in range(5)], tmp_path / "s")
    path = tmp_path / "s" / "00000.tar"
    data = bytearray(path.read_bytes())
    middle = source(path).shard_sets[0].members(0, 3)[1]["jpg"]
    data[middle.offset + middle.size // 2] ^= 0x55  # libjpeg decodes this without a word
    path.write_bytes(data)
    block = source(path).rows(range(5))
    assert [(r["key"], r["reason"]) for r in block.skipped] == [("3", "checksum")]
    assert [r["reason"] for r in source(path, verify=False).rows(range(5)).skipped] in ([], ["undecodable_image"])


def test_labels_by_index_by_name_and_from_json(shard: Shard, tmp_path: Path) -> None:
    rows = [("cat", "0"), ("dog", "1"), ("dog", "1")]
    path = shard(
        [
            m
            for i, (name, number) in enumerate(rows)
            for m in (
                (f"{i}.jpg", encoded(picture())),
                (f"{i}.cls", number.encode()),
                (f"{i}.json", json.dumps({"kind": name, "captions": [f"a {name}", f"the {name}"]}).encode()),
            )
        ]
    )
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    for config in (
        {"label": "cls"},
        {"label": "json:kind", "classes": ["cat", "dog"]},
        {"label": "json:kind", "classes": str(tmp_path / "names.txt")},
    ):
        block = source(path, IMAGE, labels=True, **config).rows(range(3))
        assert block.labels["label"].tolist() == [int(rows[int(k)][1]) for k in keys(block)]
    with pytest.raises(ValueError, match="label: cls"):
        source(path, IMAGE, labels=True)
    bad = source(path, IMAGE, labels=True, label="json:kind", classes=["cat"], max_bad_fraction=1.0)
    assert {r["reason"] for r in bad.rows(range(3)).skipped} == {"bad_label"}
    several = source(path, TEXT, caption="json:captions")
    drawn = {i: {tuple(several.rows([slot]).pixels[TEXT][0].tolist()) for slot in range(i, 60, 3)} for i in range(1)}
    assert len(drawn[0]) > 2  # over epochs, several captions of several samples


def test_holdout_and_train_divide_the_samples(shard: Shard) -> None:
    path = shard(members(40))
    parts = {part: source(path, split=SplitConfig(0.3, part)) for part in ("train", "holdout")}
    read = {part: sorted(keys(s.rows(range(s.num_samples)))) for part, s in parts.items()}
    assert sorted(read["train"] + read["holdout"]) == [f"{i:05d}" for i in range(40)]
    assert 4 <= len(read["holdout"]) <= 20
    with pytest.raises(ValueError, match="between 0 and 1"):
        source(path, split=SplitConfig(1.5, "train"))


def test_samples_of_a_repeated_key_are_in_the_part_of_the_first() -> None:
    keys = [f"cat_{i}" for i in range(100)]
    first, second, tenth = (in_part([key + suffix for key in keys], 0.3, "holdout") for suffix in ("", "~2", "~10"))
    assert 10 < first.sum() < 50
    assert np.array_equal(second, first)
    assert np.array_equal(tenth, first)
    assert np.array_equal(in_part([f"{key}~2" for key in keys], 0.3, "train"), ~first)


def test_weighted_parts_are_read_in_proportion(shard: Shard) -> None:
    a, b = shard(members(9), "a.tar"), shard(members(3, 50), "b.tar")
    mixed = source([{"path": str(a), "weight": 3}, {"path": str(b), "weight": 1}])
    read = Counter(keys(mixed.rows(range(12))))
    assert read == Counter([f"{i:05d}" for i in [*range(9), 50, 51, 52]])
    assert mixed.num_samples == 12


def test_shard_specs(shard: Shard, tmp_path: Path) -> None:
    odd = [shard(members(1, i), name) for i, name in enumerate(["a#b.tar", "what?.tar", "set[1].tar", "x{y}.tar", "p::q.tar"])]
    for i, path in enumerate(odd):
        assert keys(source(path).rows([0])) == [f"{i:05d}"]
    for i in range(3):
        shard(members(1, i), f"run/{i:02d}.tar")
    run = [str(tmp_path / "run" / f"{i:02d}.tar") for i in range(3)]
    assert expand(str(tmp_path / "run" / "{00..02}.tar")) == expand(str(tmp_path / "run" / "*.tar")) == expand(str(tmp_path / "run")) == run
    assert expand("::".join(run)) == expand(run) == run
    assert expand_braces("s{8..11}/{a,b}{c}") == [f"s{i}/{x}{{c}}" for i in range(8, 12) for x in "ab"]
    with pytest.raises(ShardError, match="pipe: runs a shell command"):
        expand("pipe:curl http://x/{0..3}.tar")
    with pytest.raises(ShardError, match=r"07\.tar: no such shard \(.*run holds 00\.tar, 01\.tar, 02\.tar\)"):
        expand(str(tmp_path / "run" / "{00..02}.tar") + "::" + str(tmp_path / "run" / "07.tar"))
    for missing in (str(tmp_path / "none" / "*.tar"), "", []):
        with pytest.raises(ShardError):
            expand(missing)


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    records = [Record(f"k{i}", {n.partition(".")[2]: d for n, d in pair(i)}) for i in range(7)]
    write_shards(records, tmp_path / "s", max_count=3)
    urls = sorted(map(str, (tmp_path / "s").glob("*.tar")))
    found = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [(s["__key__"], s["jpg"], s["txt"]) for s in found] == [(r.key, r.members["jpg"], r.members["txt"]) for r in records]


def test_reads_what_webdataset_and_img2dataset_write(tmp_path: Path) -> None:
    for s in range(2):
        with webdataset.TarWriter(str(tmp_path / f"{s:05d}.tar")) as sink:
            for i in range(3):
                meta = json.dumps({"key": f"{s:05d}{i:04d}", "caption": f"picture {i}", "status": "success"})
                sink.write({"__key__": f"{s:05d}{i:04d}", "jpg": encoded(picture(i)), "txt": f"picture {i}", "json": meta.encode()})
        (tmp_path / f"{s:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{s:05d}_stats.json").write_text('{"successes": 3}')
    for caption in ("txt", "json:caption"):
        read = source(tmp_path, caption=caption).rows(range(6))
        assert sorted(keys(read)) == [f"{s:05d}{i:04d}" for s in range(2) for i in range(3)]


def test_background_and_normalisation_of_the_config(shard: Shard) -> None:
    clear = io.BytesIO()
    Image.new("RGBA", (16, 16), (9, 9, 9, 0)).save(clear, "PNG")
    path = shard([("1.png", clear.getvalue())])
    block = source(path, IMAGE, image=ImageConfig(background=[10, 20, 30])).rows([0])
    assert block.pixels[IMAGE][0, :, 0, 0].tolist() == [10, 20, 30]
    assert ImageConfig(mean="half", std=[1, 2, 3]).normalisation() == ((0.5, 0.5, 0.5), (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match="openai, imagenet, half"):
        ImageConfig(mean="clip").normalisation()


def test_parts_are_checked_like_any_option(shard: Shard) -> None:
    path = str(shard(members(4)))
    mixed = source([path, {"path": path, "weight": 3}])
    assert [order.total for order in mixed._orders] == [4, 4]
    with pytest.raises(OptionError, match=r"unknown option 'sources\.pairs\.shards\.0\.wieght'; did you mean 'weight'"):
        source([{"path": path, "wieght": 3}])
    with pytest.raises(OptionError, match=r"'sources\.pairs\.shards\.0\.path' is required"):
        source([{"weight": 3}])


def test_the_limit_in_a_row_does_not_depend_on_other_threads(shard: Shard) -> None:
    """Three of four are bad: a slot may need many attempts, and good samples of other slots do not start the count again."""
    bad = [(f"b{i}.jpg", b"%!PS-Adobe") for i in range(3)]
    path = shard(members(1) + [m for name, data in bad for m in ((name, data), (name[:2] + ".txt", b"bad"))])
    generous = source(path, max_bad_fraction=1e9).rows(range(16))
    longest = max(Counter(r["slot"] for r in generous.skipped).values())
    assert longest > 1
    halves = source(path, max_bad_fraction=1e9, max_consecutive_bad=longest + 1)
    assert halves.rows(range(8)).keys + halves.rows(range(8, 16)).keys == generous.keys
    with pytest.raises(BadSampleBudgetError, match=f"{longest} samples in a row"):
        source(path, max_bad_fraction=1e9, max_consecutive_bad=longest).rows(range(16))


def test_a_record_names_what_came_instead(shard: Shard) -> None:
    path = shard([*members(3), ("bad.jpg", b"%!PS-Adobe"), ("bad.txt", b"a program")])
    block = source(path).rows(range(4))
    (record,) = {r["slot"]: r for r in block.skipped}.values()
    assert record["replaced_by"] == block.keys[record["slot"]]
