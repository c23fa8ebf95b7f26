"""Each rule drops what it says and nothing else, every dropped sample has its line, and good + dropped = total."""

import builtins
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from data_prep.dedup import command as dedup
from data_prep.dedup.find import Options
from data_prep.filter import command as filters
from data_prep.filter.rules import Predicate, Rules, Sample, repeated, too_low
from data_prep.records import Record
from data_prep.shards.read import Shard
from data_prep.shards.serial import write_shards
from data_prep.subset import Numbering, Part, Selection, keep
from mmpretrain.data.schema import ShardError

app = typer.Typer()
app.command()(filters.filter_)

CAPTIONS = [
    "a red ball",
    "A  red ball",
    "dog",
    "two cats on a mat in the sun",
    "a red ball",
    "un chien noir court dans le jardin avec ses amis",
]
SIZES = [(64, 64), (40, 80), (30, 90), (20, 20), (64, 48), (100, 100)]


def png(size: tuple[int, int], level: int = 200) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (level, 10, 10)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """Six samples in two shards, and class names beside them."""
    records = [
        Record(f"k{i}", {"png": png(size, 10 * i), "txt": text.encode(), "json": json.dumps({"n": i}).encode(), "cls": str(i % 2).encode()})
        for i, (size, text) in enumerate(zip(SIZES, CAPTIONS))
    ]
    write_shards(records, tmp_path / "in", max_count=4)
    (tmp_path / "in" / "classnames.txt").write_text("even\nodd\n")
    return str(tmp_path / "in")


def keys(out: str | Path) -> list[str]:
    return [key for tar in sorted(Path(out).glob("*.tar")) for key in Shard(str(tar)).index.keys]


def dropped(out: Path) -> dict[str, str]:
    lines = (out / "skipped.jsonl").read_text().splitlines() if (out / "skipped.jsonl").exists() else []
    return {line.get("where", line.get("input")).split("/")[-1]: line["reason"] for line in map(json.loads, lines)}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (Rules(), {}),
        (Rules(min_side=40), {"k2": "min_side", "k3": "min_side"}),
        (Rules(max_aspect=2), {"k2": "max_aspect"}),
        (Rules(min_words=2), {"k2": "min_words"}),
        (Rules(max_words=7), {"k3": "max_words", "k5": "max_words"}),
        (Rules(min_chars=4, max_chars=30), {"k2": "min_chars", "k5": "max_chars"}),
        (Rules(min_side=21, min_words=2), {"k3": "min_side", "k2": "min_words"}),
    ],
)
def test_rules(shards: str, tmp_path: Path, rules: Rules, expected: dict[str, str]) -> None:
    result = filters.select([shards], str(tmp_path / "out"), rules=rules, processes=1)
    assert dropped(tmp_path / "out") == expected
    assert keys(tmp_path / "out") == [f"k{i}" for i in range(6) if f"k{i}" not in expected]
    assert result["good"] == result["written"] == 6 - len(expected)
    assert result["good"] + sum(result["dropped"].values()) == result["samples"] == 6
    assert (tmp_path / "out" / "classnames.txt").read_text() == "even\nodd\n"


def test_what_passes_is_byte_identical(shards: str, tmp_path: Path) -> None:
    filters.select([shards], str(tmp_path / "out"), rules=Rules(min_words=2), processes=1)
    before = {record.key: record.members for tar in sorted(Path(shards).glob("*.tar")) for record in Shard(str(tar))}
    after = {record.key: record.members for tar in sorted((tmp_path / "out").glob("*.tar")) for record in Shard(str(tar))}
    assert after == {key: members for key, members in before.items() if key != "k2"}


def test_repeats_count_over_shards_and_only_what_passed(shards: str, tmp_path: Path) -> None:
    """k0, k1 and k4 (in another shard) have one caption, capitals and spaces apart."""
    result = filters.select([shards], str(tmp_path / "a"), max_repeats=1, processes=1)
    assert dropped(tmp_path / "a") == {"k1": "max_repeats", "k4": "max_repeats"}
    assert result["dropped"] == {"max_repeats": 2}
    filters.select([shards], str(tmp_path / "b"), max_repeats=2, processes=1)
    assert dropped(tmp_path / "b") == {"k4": "max_repeats"}
    filters.select([shards], str(tmp_path / "c"), rules=Rules(max_aspect=1.4), max_repeats=2, processes=1)
    assert dropped(tmp_path / "c") == {"k1": "max_aspect", "k2": "max_aspect"}  # without k1, k4 is the second


def test_what_was_dropped_is_told_by_shard_whatever_the_order_it_came_in() -> None:
    judged = Selection(Numbering(["a", "b", "c"]))
    judged.samples.counts[:] = 3, 0, 4
    drops = {6: ("score", "0.1"), 1: ("min_side", "ein Löwe, \ud800"), 3: ("score", ""), 5: ("cut", "x" * 70_000)}
    for sample, told in drops.items():
        judged.drop(sample, *told)
    assert judged.left().tolist() == [0, 2, 4]
    assert judged.dropped_by() == {"cut": 1, "min_side": 1, "score": 2}
    for _ in range(2):
        assert list(judged.parts()) == [
            Part("a", 3, ((1, *drops[1]),)), Part("b", 0), Part("c", 4, ((0, *drops[3]), (2, *drops[5]), (3, *drops[6])))
        ]  # fmt: skip


@pytest.mark.parametrize("command", ["filter", "dedup"])
def test_a_key_that_comes_twice_is_found_before_anything_is_written(tmp_path: Path, command: str) -> None:
    for name, level in (("a", 10), ("b", 200)):
        (tmp_path / name).mkdir()
        records = [Record(f"{i:04d}", {"png": png((40, 40), level + 20 * i), "txt": b"small" if i else b"kept of both"}) for i in range(2)]
        write_shards(records, tmp_path / name)
    spec, out = [str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out"
    write = {
        "filter": lambda **more: filters.select(spec, str(out), processes=1, **more),
        "dedup": lambda: dedup.deduplicate(spec, str(out), options=Options(near=None), processes=1),
    }[command]
    with pytest.raises(ValueError, match=r"key '0000' comes twice, in .*a/00000.tar and .*b/00000.tar.*build shards --keys shard"):
        write()
    assert not out.exists()
    if command == "filter":
        with pytest.raises(ValueError, match="comes twice"):
            write(rules=Rules(min_words=2))
        assert write(rules=Rules(min_words=4))["good"] == 0  # what is dropped may come twice


def test_repeated_against_a_count() -> None:
    digests = np.random.default_rng(0).integers(0, 40, 500).astype(np.uint64)
    seen: dict[int, int] = {}
    expected = []
    for digest in digests.tolist():
        expected.append(seen.get(digest, 0) >= 3)
        seen[digest] = seen.get(digest, 0) + 1
    assert repeated(digests, 3).tolist() == expected
    assert not repeated(np.zeros(0, np.uint64), 1).size


def test_language(shards: str, tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    filters.select([shards], str(tmp_path / "fr"), rules=Rules(languages=("fr",), min_words=6), processes=1)
    assert keys(tmp_path / "fr") == ["k5"]
    assert dropped(tmp_path / "fr")["k3"] == "language"
    with pytest.raises(ValueError, match=r"--language xx: expected codes among .* en "):
        filters.select([shards], rules=Rules(languages=("xx",)))


def test_a_missing_language_package_is_named(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("py3langid"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    from data_prep import captions

    captions.known.cache_clear()
    result = CliRunner().invoke(app, [shards, "--language", "en"], env={"COLUMNS": "300", "TERM": "dumb"})
    assert result.exit_code == 2
    assert "mmpretrain-clip[prep]" in result.output


PREDICATES = """
def all_members(sample):
    assert sample.key.startswith("k") and sample.metadata["n"] == int(sample.key[1:])
    assert sample.size == sample.image.shape[1::-1]
    return sample.label == "0" and sample.image[0, 0, 0] > 0 and sample.captions[0] != "dog"

def broken(sample):
    return sample.nothing

def vague(sample):
    return "yes"
"""


def test_a_predicate_of_the_user(shards: str, tmp_path: Path) -> None:
    file = tmp_path / "rules.py"
    file.write_text(PREDICATES)
    rules = Rules(where=Predicate.read(f"{file}:all_members"))
    filters.select([shards], str(tmp_path / "out"), rules=rules, processes=1)
    assert keys(tmp_path / "out") == ["k4"]
    assert set(dropped(tmp_path / "out").values()) == {"where"}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("{file}:broken", "line 8: AttributeError"),
        ("{file}:vague", "returned 'yes'"),
        ("{file}:absent", "no function 'absent'; it has all_members, broken, vague"),
        ("{file}", "FILE.py:function"),
        ("/none.py:f", "No such file"),
    ],
)
def test_a_wrong_predicate_is_an_error_and_drops_nothing(shards: str, tmp_path: Path, where: str, message: str) -> None:
    file = tmp_path / "rules.py"
    file.write_text(PREDICATES)
    out = tmp_path / "out"
    options = [shards, "--out", str(out), "--where", where.replace("{file}", str(file)), "--processes", "1"]
    result = CliRunner().invoke(app, options, env={"COLUMNS": "400", "TERM": "dumb"})
    assert result.exit_code == 2
    assert message in result.output
    assert not out.exists()


class RedModel:
    """Texts point along the first axis, an image along it by its red: the cosine rises with the red."""

    fingerprint, precision = "red", "fp32"

    def __init__(self) -> None:
        from mmpretrain.types import Preprocess

        self.preprocess = Preprocess(size=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    def images(self, pixels: torch.Tensor):
        from mmpretrain.types import Encoded

        red = pixels.mean((2, 3))[:, 0]
        return Encoded(features=torch.stack([red, torch.full_like(red, 0.5)], 1))

    def texts(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[2.0, 0.0] if text != "dog" else [-1.0, 0.0] for text in texts])


@pytest.mark.parametrize("name", ["scores.jsonl", "scores.parquet"])
def test_scores_under_a_model(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from data_prep import embed

    monkeypatch.setattr(embed, "load_model", lambda *_, **__: RedModel())
    file = tmp_path / name
    run = {"score": "x", "processes": 1}
    result = filters.select([shards], str(tmp_path / "a"), keep_top=0.5, save_scores=str(file), **run)
    assert keys(tmp_path / "a") == ["k3", "k4", "k5"]
    assert result["dropped"] == {"score": 3}
    rows = [json.loads(line) for line in file.read_text().splitlines()] if name.endswith("jsonl") else pq.read_table(file).to_pylist()
    assert [row["key"] for row in rows] == [f"k{i}" for i in range(6)]
    red = np.arange(6) * 10 / 255
    expected = red / np.hypot(red, 0.5) * np.array([1, 1, -1, 1, 1, 1])
    assert np.allclose([row["score"] for row in rows], expected, atol=1e-5)
    filters.select([shards], str(tmp_path / "b"), rules=Rules(max_aspect=1.9), min_score=float(expected[4]) - 1e-4, **run)
    assert dropped(tmp_path / "b") == {"k0": "score", "k1": "max_aspect", "k2": "max_aspect", "k3": "score"}


def test_too_low_keeps_the_fraction_and_the_first_of_equals() -> None:
    scores = np.array([0.1, 0.3, 0.3, 0.3, 0.2], np.float32)
    assert too_low(scores, None, 0.4)[0].tolist() == [True, False, False, True, True]
    assert too_low(scores, None, 0.41)[0].sum() == 2  # rounded up
    assert too_low(scores, None, 1.0)[0].sum() == 0
    assert too_low(scores, None, 0.0)[0].sum() == 5
    assert too_low(scores, 0.2, None)[0].tolist() == [True, False, False, False, False]


def test_bad_samples_are_dropped_with_their_own_reason(tmp_path: Path) -> None:
    records = [
        Record("good", {"png": png((30, 30)), "txt": b"a b"}),
        Record("text", {"txt": b"a b"}),
        Record("mute", {"png": png((30, 30))}),
        Record("odd", {"png": b"<html>", "txt": b"a b"}),
        Record("latin", {"png": png((30, 30)), "txt": b"caf\xe9 noir"}),
    ]
    write_shards(records, tmp_path / "in")
    result = filters.select([str(tmp_path / "in")], str(tmp_path / "out"), rules=Rules(min_side=8, min_words=1), processes=1)
    expected = {"text": "missing_image", "mute": "missing_field", "odd": "unknown_format", "latin": "not_utf8"}
    assert dropped(tmp_path / "out") == expected
    assert (result["samples"], result["good"], result["written"]) == (5, 1, 1)


def test_a_corrupt_member_that_no_rule_reads_is_listed(shards: str, tmp_path: Path) -> None:
    shard = Path(shards) / "00000.tar"
    place = Shard(str(shard)).index.members(1)["json"]
    with open(shard, "r+b") as file:
        file.seek(place.offset)
        file.write(b"X")
    filters.select([shards], str(tmp_path / "out"), rules=Rules(min_words=1), processes=1)
    assert dropped(tmp_path / "out") == {"k1": "checksum"}


def test_a_shard_that_changes_between_judging_and_writing_is_refused(shards: str) -> None:
    with pytest.raises(ShardError, match="4 samples, but 5 when it was judged"):
        list(keep(Part(os.path.join(shards, "00000.tar"), 5)))


def test_a_key_that_cannot_be_written_names_the_way_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "theirs.tar", "w") as file:
        info = tarfile.TarInfo("a dog.png")
        info.size = len(png((20, 20)))
        file.addfile(info, io.BytesIO(png((20, 20))))
    with pytest.raises(ShardError, match=r"key 'a dog'.*build shards"):
        list(keep(Part(str(tmp_path / "theirs.tar"), 1)))


def test_sample_reads_only_what_is_asked(shards: str) -> None:
    shard = Shard(os.path.join(shards, "00000.tar"))
    read = []
    original = shard.read
    shard.read = lambda at, extensions=None: read.append(set(extensions)) or original(at, extensions)
    assert Rules(min_words=1).verdict(Sample(shard, 0)) is None
    assert read == [{"txt"}]


@pytest.mark.parametrize("options", [["--keep-top", "0.5"], ["--score", "x"], ["--score", "x", "--keep-top", "0.5", "--min-score", "0.1"]])
def test_score_options_go_together(shards: str, options: list[str]) -> None:
    result = CliRunner().invoke(app, [shards, *options])
    assert result.exit_code == 2
    assert "--score" in result.output


def test_nothing_left_is_an_error_where_shards_were_asked_for(shards: str, tmp_path: Path) -> None:
    options = [shards, "--min-side", "5000", "--processes", "1"]
    assert CliRunner().invoke(app, options).exit_code == 0  # only to count
    result = CliRunner().invoke(app, [*options, "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "no sample is left to write" in result.output
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 6
