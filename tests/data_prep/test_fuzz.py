"""Shards and images damaged at random: no crash, no unexpected error, and good + counted bad = total."""

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_prep.records import Record
from data_prep.shards.read import Shard, captions, pixels
from data_prep.shards.serial import write_shards
from data_prep.validate.command import validate
from data_prep.validate.members import Checks, Sound
from data_prep.validate.shard import Examine
from mmpretrain.data import index as shard_index
from mmpretrain.data.decode import decode_image
from mmpretrain.data.schema import BadSample, BadSampleBudgetError, ShardError
from mmpretrain.data.source import Source, SourceConfig
from mmpretrain.data.views import ImageView, TextView
from tests.data.generated import encoded, pair, picture, tar_bytes

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "0"))  # for long runs by hand
COUNT = 8
RECORDS = [Record(f"{i:05d}", {name.partition(".")[2]: data for name, data in pair(i)} | {"json": b'{"n": 1}'}) for i in range(COUNT)]
FOREIGN = tar_bytes([(f"{r.key}.{e}", data) for r in RECORDS for e, data in sorted(r.members.items())])
IMAGES = [
    encoded(picture(3, (40, 30)), kind, **options)
    for kind, options in [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("WEBP", {}),
        ("GIF", {}),
        ("TIFF", {}),
        ("BMP", {}),
        ("PPM", {}),
    ]
] + [encoded(picture(4, (40, 30)).convert(mode), "PNG") for mode in ("P", "RGBA", "I;16", "1")]
CHECKS = Checks(need=("image", "txt"))


def fuzz(examples: int) -> Callable:
    return settings(
        max_examples=EXAMPLES or examples, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
    )


@st.composite
def mutation(draw: st.DrawFn, size: int, blocks: bool = False) -> Callable[[bytes], bytes]:
    """Flip, cut, insert, duplicate, remove or blank ranges, one to three times; on tars mostly near headers or by blocks."""
    steps = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["flip", "cut", "insert", "duplicate", "remove", "zeros"]))
        at = draw(st.integers(0, size - 1))
        if blocks and draw(st.booleans()):
            at -= at % 512
            at += draw(st.sampled_from([0, 0, 1, 100, 124, 130, 136, 148, 156, 257, 345]))
        length = 512 * draw(st.integers(1, 8)) if blocks and draw(st.booleans()) else draw(st.integers(1, 64))
        steps.append((kind, at, length, draw(st.binary(min_size=1, max_size=12))))

    def apply(data: bytes) -> bytes:
        for kind, at, length, noise in steps:
            at = min(at, len(data))
            if kind == "flip":
                data = data[:at] + bytes(a ^ b for a, b in zip(data[at : at + len(noise)], noise)) + data[at + len(noise) :]
            elif kind == "cut":
                data = data[:at]
            elif kind == "insert":
                data = data[:at] + (noise * length)[:length] + data[at:]
            elif kind == "duplicate":
                data = data[:at] + data[at : at + length] * 2 + data[at + length :]
            elif kind == "remove":
                data = data[:at] + data[at + length :]
            else:
                data = data[:at] + bytes(len(data[at : at + length])) + data[at + length :]
        return data

    return apply


def retold(data: bytes, mutate: Callable[[bytes], bytes]) -> bytes:
    """The tar with its header checksums made right again where the magic is there: damage that checksums do not catch."""
    data = bytearray(mutate(data))
    for at in range(0, len(data) - 511, 512):
        if data[at + 257 : at + 262] == b"ustar":
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def sums(name: Path) -> None:
    report = Examine(CHECKS)(str(name))
    assert report.good + report.mendable + report.bad == report.samples
    assert report.lost >= 0
    assert report.samples <= 4 * COUNT


@fuzz(60)
@given(mutation(len(FOREIGN), blocks=True), st.booleans())
def test_a_damaged_foreign_tar(mutate: Callable[[bytes], bytes], checksummed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        path.write_bytes(retold(FOREIGN, mutate) if checksummed else mutate(FOREIGN))
        sums(path)
        try:
            with Shard(str(path)) as shard:
                for record in shard:
                    assert record.members
        except (ShardError, BadSample):
            pass


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    write_shards(RECORDS, folder)
    return folder / "00000.tar"


@fuzz(60)
@given(mutation(len(FOREIGN), blocks=True))
def test_a_damaged_tar_with_its_index_loses_nothing_uncounted(built: Path, mutate: Callable[[bytes], bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        data = mutate(built.read_bytes())
        path.write_bytes(data)
        shard_index.index_path(path).write_bytes(shard_index.index_path(built).read_bytes())
        report = Examine(CHECKS)(str(path))
        assert report.good + report.mendable + report.bad == report.samples
        index, _ = shard_index.load(shard_index.index_path(path))
        same = sum(  # samples whose bytes stand where the index says
            all(data[m.offset : m.offset + m.size] == record.members[e] for e, m in index.members(i).items())
            for i, record in enumerate(RECORDS)
        )
        if report.verified:
            assert (report.samples, report.good) == (COUNT, same)
        else:  # a sound tar of other samples: all of them are accounted for
            assert report.counts["index_disagrees"]


@fuzz(60)
@given(mutation(len(FOREIGN), blocks=True), st.booleans(), st.booleans(), st.booleans())
def test_samples_passed_as_sound_are_those_that_full_examination_finds_nothing_in(
    built: Path, mutate: Callable[[bytes], bytes], indexed: bool, decode: bool, checksums: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        path.write_bytes(mutate(built.read_bytes()) if indexed else retold(FOREIGN, mutate))
        if indexed:
            shard_index.index_path(path).write_bytes(shard_index.index_path(built).read_bytes())
        examine = Examine(Checks(need=("image", "txt"), decode=decode, checksums=checksums))
        quick = examine(str(path))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Sound, "__call__", lambda *_: False)
            full = examine(str(path))
        assert quick.digests.tolist() == full.digests.tolist()
        said = [re.sub(r"object at 0x\w+", "", repr({**vars(report), "digests": None})) for report in (quick, full)]
        assert said[0] == said[1]


@fuzz(12)
@given(mutation(len(FOREIGN), blocks=True), st.booleans())
def test_training_reads_on_or_stops_with_a_named_error(mutate: Callable[[bytes], bytes], checksummed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        path.write_bytes(retold(FOREIGN, mutate) if checksummed else mutate(FOREIGN))
        config = SourceConfig(shards=str(path), max_bad_fraction=1.0, max_consecutive_bad=10, cache_dir=folder)
        try:
            source = Source("fuzz", config, [ImageView(size=8), TextView(context_length=77)])
            block = source.rows(range(source.num_samples))
        except (ShardError, BadSampleBudgetError) as error:
            named = "0.tar" in str(error)
            assert named
            return
        first = {record["key"] for record in block.skipped}
        read = {key.rpartition("/")[2] for key in block.keys}
        index = shard_index.scan(path)
        assert len(block.keys) == len(index) == source.num_samples
        assert read | first == set(index.keys)  # one pass meets every sample: read, or dropped with a record
        assert not read & first
        assert len(source.damaged()) == len(index.damage) + len(index.left_out or [])


@fuzz(150)
@given(st.data())
def test_damaged_images_decode_or_are_bad_samples(data: st.DataObject) -> None:
    image = data.draw(st.sampled_from(IMAGES))
    mutated = data.draw(mutation(len(image)))(image)
    try:
        found = decode_image(mutated)
    except BadSample as error:
        known = error.reason in ("unknown_format", "undecodable_image", "too_many_pixels", "too_small", "too_elongated")
        assert known
        return
    assert found.shape[0] == 3
    assert found.shape[1] * found.shape[2] <= 64_000_000


@fuzz(8)
@given(
    st.lists(st.tuples(st.sampled_from(["txt", "json", "jpg", "cls", "b.jpg", "pkl", "TXT", ""]), st.binary(max_size=60)), max_size=12),
    st.data(),
)
def test_any_members_are_accounted_for_by_validate_and_repair(members: list[tuple[str, bytes]], data: st.DataObject) -> None:
    names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=40) | st.sampled_from(
        ["a", "b/c", "../x"]
    )
    tar = tar_bytes([(f"{data.draw(names)}.{extension}", body) for extension, body in members] + pair(1) * data.draw(st.integers(0, 2)))
    app = typer.Typer()
    app.command()(validate)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        path.write_bytes(tar)
        arguments = [str(path), str(path), "--need", data.draw(st.sampled_from(["", "image,txt"])), "--json", "--processes", "1"]
        result = CliRunner().invoke(app, [*arguments, "--repair", f"{folder}/out"])
        assert result.exit_code in (0, 1), (result.output, result.exception)
        found = json.loads(result.stdout)
        assert found["good"] + found["mendable"] + found["bad"] + found["lost"] == found["total"]
        assert found["repaired"]["good"] + found["repaired"]["bad"] == found["repaired"]["total"] == found["total"]
        kept = sum(len(Shard(str(shard))) for shard in Path(folder, "out").glob("*.tar"))
        assert kept == found["repaired"]["good"]
        skipped = Path(folder, "out", "skipped.jsonl")
        lines = skipped.read_text().split("\n")[:-1] if skipped.exists() else []
        assert kept + len(lines) == found["total"]
        again = CliRunner().invoke(app, [f"{folder}/out", "--need", "", "--json", "--processes", "1"]) if kept else None
        assert again is None or json.loads(again.stdout)["good"] == kept


@fuzz(40)
@given(st.data())
def test_a_damaged_index_is_refused_or_harmless(built: Path, data: st.DataObject) -> None:
    whole = shard_index.index_path(built).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        path.write_bytes(built.read_bytes())
        shard_index.index_path(path).write_bytes(data.draw(mutation(len(whole)))(whole))
        report = Examine(CHECKS)(str(path))
        assert report.good + report.mendable + report.bad == report.samples == COUNT
        try:
            with Shard(str(path)) as shard:
                for i in range(len(shard)):
                    record = shard.read(i)
                    assert captions(record)
                    assert pixels(record.members["jpg"]).shape[0] == 3
        except (ShardError, BadSample):
            pass
