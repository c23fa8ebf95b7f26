"""`validate`: every kind of damage is found, named with its place, and good + mendable + bad + lost = total."""

import json
import os
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import fsspec
import pytest
import typer
import webdataset
from typer.testing import CliRunner, Result

from data_prep.records import Record
from data_prep.shards.read import Shard
from data_prep.shards.serial import write_shards
from data_prep.validate.command import validate
from data_prep.validate.kinds import KINDS
from data_prep.validate.layout import Layout
from data_prep.validate.members import Checks
from data_prep.validate.shard import Examine
from mmpretrain.data.index import index_path
from tests.data.generated import encoded, pair, picture, tar_bytes

app = typer.Typer()
app.command()(validate)
Members = list[tuple[str, bytes]]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments] + ["--processes", "1"], env={"COLUMNS": "400"})


def check(*arguments: object) -> dict[str, Any]:
    """The JSON verdict, of which the sums always hold."""
    result = run(*arguments, "--json")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    found = json.loads(result.stdout)
    assert found["good"] + found["mendable"] + found["bad"] + found["lost"] == found["total"]
    assert result.exit_code == (found["verdict"] == "findings")
    assert sum(found["counts"].values()) == len(found["findings"]) + found["findings_left_out"]
    assert all(finding["remedy"] for finding in found["findings"])
    return found


def pairs(count: int, start: int = 0) -> Members:
    return [member for i in range(start, start + count) for member in pair(i)]


def put(path: Path, members: Members | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(members if isinstance(members, bytes) else tar_bytes(members))
    return path


def built(folder: Path, count: int = 6, max_count: int = 100) -> Path:
    records = [Record(f"{i:05d}", {name.partition(".")[2]: data for name, data in pair(i)}) for i in range(count)]
    write_shards(records, folder, max_count=max_count)
    return folder / "00000.tar"


def bomb(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_clean_shards_are_clean(tmp_path: Path) -> None:
    built(tmp_path / "s", 5, 3)
    found = check(tmp_path / "s")
    assert (found["verdict"], found["total"], found["good"], found["counts"]) == ("clean", 5, 5, {})
    assert (found["shards"], found["verified"], found["need"], found["members"]) == (2, 5, ["image", "txt"], {"jpg": 5, "txt": 5})
    result = run(tmp_path / "s")
    assert result.exit_code == 0
    assert "clean: 5 samples in 2 shards: 5 good; 5 checked by checksum; needed: image, txt." in result.stdout
    assert check(tmp_path / "s", "--no-checksums")["verified"] == 0


JPG = encoded(picture(1))
BAD_SAMPLES: dict[str, Members] = {
    "missing_member": [("bad.jpg", JPG)],
    "missing_member ": [("bad.txt", b"no image")],
    "missing_member  ": [("bad.jpg", JPG), ("bad.json", b"{}")],
    "empty_caption": [("bad.jpg", JPG), ("bad.txt", b" \n\0")],
    "not_utf8": [("bad.jpg", JPG), ("bad.txt", b"caf\xe9")],
    "bad_json": [("bad.jpg", JPG), ("bad.txt", b"x"), ("bad.json", b"{")],
    "bad_json ": [("bad.jpg", JPG), ("bad.txt", b"x"), ("bad.json", b"[" * 100_000)],
    "bad_label": [("bad.jpg", JPG), ("bad.txt", b"x"), ("bad.cls", b"-1")],
    "bad_label ": [("bad.jpg", JPG), ("bad.txt", b"x"), ("bad.cls", b"")],
    "unknown_format": [("bad.jpg", b"%!PS-Adobe-3.0 EPSF-3.0"), ("bad.txt", b"a program")],
    "unknown_format ": [("bad.jpg", b""), ("bad.txt", b"nothing")],
    "unknown_format  ": [("bad.jpg", b"\0\0\0\x1cftypheic"), ("bad.txt", b"not decoded")],
    "too_many_pixels": [("bad.png", bomb(30_000, 30_000)), ("bad.txt", b"a bomb")],
    "too_small": [("bad.png", bomb(1, 3000)), ("bad.txt", b"a line")],
    "too_elongated": [("bad.png", bomb(100, 3000)), ("bad.txt", b"a ribbon")],
    "too_many_bytes": [("bad.jpg", JPG), ("bad.txt", b"x" * 70_000)],
}


@pytest.mark.parametrize("decode", ["--decode", "--no-decode"])
@pytest.mark.parametrize("kind", BAD_SAMPLES)
def test_a_bad_sample_is_named_with_its_place(kind: str, decode: str, tmp_path: Path) -> None:
    path = put(tmp_path / "0.tar", pairs(3) + BAD_SAMPLES[kind] + pairs(3, 5))
    found = check(path, decode)
    assert found["counts"] == {kind.strip(): 1}
    assert (found["total"], found["good"], found["bad"], found["lost"]) == (7, 6, 1, 0)
    (finding,) = found["findings"]
    assert (finding["shard"], finding["key"], finding["severity"]) == (str(path), "bad", "bad")
    with tarfile.open(path) as tar:
        assert finding["offset"] in [m.offset_data for m in tar.getmembers() if m.name.startswith("bad.")]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated_images_are_found_by_decoding(kind: str, tmp_path: Path) -> None:
    data = encoded(picture(size=(96, 96)), kind)
    path = put(
        tmp_path / "0.tar", [*pairs(3), ("bad.jpg", data[: len(data) // 2]), ("bad.txt", b"half"), ("good.jpg", data), ("good.txt", b"x")]
    )
    found = check(path)
    assert (found["counts"], found["good"]) == ({"undecodable_image": 1}, 4)
    counts = check(path, "--no-decode", "--max-pixels", 5000)["counts"]  # the sizes of all formats are seen
    assert counts == ({"undecodable_image": 1, "too_many_pixels": 1} if kind == "WEBP" else {"too_many_pixels": 2})


def test_limits_and_needs_are_options(tmp_path: Path) -> None:
    wide = [("w.jpg", encoded(picture(size=(100, 20)))), ("w.txt", b"wide")]
    path = put(tmp_path / "0.tar", pairs(2) + wide)
    assert check(path)["verdict"] == "clean"
    for option, value, kind in (
        ("--max-aspect", 4, "too_elongated"),
        ("--min-side", 21, "too_small"),
        ("--max-pixels", 1900, "too_many_pixels"),
    ):
        assert check(path, option, value)["counts"] == {kind: 1}
    assert check(path, "--need", "jpg,txt,cls")["counts"] == {"missing_member": 3}
    assert check(path, "--need", "jpg,txt,cls")["need"] == ["image", "txt", "cls"]
    lone = put(tmp_path / "1.tar", [("a.jpg", JPG)])
    assert check(path, lone)["counts"] == {"missing_member": 1}
    assert check(path, lone, "--need", "")["verdict"] == "clean"


def test_captions_from_json(tmp_path: Path) -> None:
    metas = [b'{"caption": "fine"}', b'{"caption": ""}', b'{"text": "other"}', b'{"caption": 3}', b'{"caption": "tab\\u0007bell"}']
    path = put(tmp_path / "0.tar", [m for i, meta in enumerate(metas) for m in ((f"{i}.jpg", JPG), (f"{i}.json", meta))])
    found = check(path, "--caption", "json:caption")
    assert found["counts"] == {"empty_caption": 1, "missing_field": 1, "bad_caption": 1, "control_characters": 1}
    assert (found["good"], found["bad"]) == (2, 3)
    assert check(path)["verdict"] == "clean"


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"", "zero bytes"), (b"<html>504</html>" * 50, "web page"), (b"\x1f\x8b" + b"z" * 900, "gzip"), (b"\0\1" * 600, "not a tar")],
)
def test_what_is_no_shard_is_named_and_the_others_are_read(data: bytes, words: str, tmp_path: Path) -> None:
    good, bad = put(tmp_path / "0.tar", pairs(2)), put(tmp_path / "1.tar", data)
    found = check(good, bad)
    (finding,) = found["findings"]
    assert (finding["kind"], finding["shard"], found["good"], found["lost_is_estimated"]) == ("no_tar", str(bad), 2, True)
    assert words in finding["detail"]
    put(tmp_path / "sizes.json", b'{"0.tar": 2, "1.tar": 500}')
    found = check(good, bad)
    assert (found["total"], found["lost"], found["lost_is_estimated"]) == (502, 500, False)


def test_an_empty_tar_is_a_note(tmp_path: Path) -> None:
    found = check(put(tmp_path / "0.tar", []), put(tmp_path / "1.tar", pairs(1)))
    assert (found["verdict"], found["counts"], found["total"]) == ("clean", {"empty_shard": 1}, 1)


@pytest.mark.parametrize("at", ["payload", "header", "between", "inside header"])
def test_a_foreign_shard_that_was_cut(at: str, tmp_path: Path) -> None:
    members = pairs(12)
    whole = tar_bytes(members)
    header = whole.rindex(b"00009.jpg")
    cut = {"payload": header + 600, "header": header, "between": whole.rindex(b"00009.txt"), "inside header": header + 100}[at]
    found = check(put(tmp_path / "0.tar", whole[:cut]))
    assert found["counts"]["cut"] == 1
    assert found["good"] == 9
    assert found["lost_is_estimated"] or found["lost"] == 0
    assert found["bad"] == (at == "between")  # its image is there, its caption is not
    assert found["findings"][0]["offset"] <= cut
    put(tmp_path / "sizes.json", b'{"0.tar": 12}')
    found = check(tmp_path / "0.tar")
    assert (found["total"], found["good"], found["bad"] + found["lost"], found["lost_is_estimated"]) == (12, 9, 3, False)


@pytest.mark.parametrize("kind", ["corrupt_header", "zeros"])
def test_damage_in_the_middle_of_a_foreign_shard(kind: str, tmp_path: Path) -> None:
    data = bytearray(tar_bytes(pairs(20)))
    at = data.rindex(b"00005.jpg")
    data[at : at + (5 if kind == "corrupt_header" else 1024)] = b"\xff" * 5 if kind == "corrupt_header" else bytes(1024)
    found = check(put(tmp_path / "0.tar", bytes(data)))
    assert found["counts"] == {kind: 1}
    assert (found["good"], found["findings"][0]["offset"]) == (5, at)
    assert 12 <= found["lost"] <= 18
    put(tmp_path / "0_stats.json", b'{"count": 30, "successes": 20}')
    found = check(tmp_path / "0.tar")
    assert (found["total"], found["lost"], found["counts"]) == (20, 15, {kind: 1, "count_disagrees": 1})


@pytest.mark.parametrize("damage", ["header", "cut", "page"])
def test_an_index_with_checksums_tells_exactly_what_is_lost(damage: str, tmp_path: Path) -> None:
    path = built(tmp_path / "s", 10)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"00004.jpg")
    if damage == "header":
        data[at : at + 3] = b"???"
    path.write_bytes({"header": bytes(data), "cut": bytes(data[: at + 700]), "page": b"<html>" + bytes(len(data) - 6)}[damage])
    found = check(path, "--no-checksums")  # they are needed here, and so they are used
    good = {"header": 10, "cut": 4, "page": 0}[damage]
    assert (found["total"], found["good"], found["bad"], found["lost"], found["verified"]) == (10, good, 10 - good, 0, 10)
    assert found["counts"]["index_disagrees"] == 1
    out = tmp_path / "out"
    run(path, "--repair", out)
    if good:
        keys = [record.key for record in Shard(str(out / "00000.tar"))]
        assert keys == [f"{i:05d}" for i in range(good)]


def test_a_flipped_byte_is_found_by_the_checksum(tmp_path: Path) -> None:
    path = built(tmp_path / "s")
    with Shard(str(path)) as shard:
        place = shard.index.members(3)["jpg"]
    data = bytearray(path.read_bytes())
    data[place.offset + place.size // 2] ^= 0x55
    path.write_bytes(data)
    (finding,) = check(path, "--no-decode")["findings"]
    assert (finding["kind"], finding["key"], finding["offset"]) == ("checksum", "00003", place.offset)
    assert "checksum" not in check(path, "--no-checksums")["counts"]


def test_a_flip_of_any_byte_of_a_sample_is_found(tmp_path: Path) -> None:
    """Of headers and members; only the padding behind a member, which nobody reads, may change."""
    path = built(tmp_path / "s", 2)
    whole = path.read_bytes()
    examine = Examine(Checks(need=("image", "txt"), decode=False))
    with Shard(str(path)) as shard:
        members = [place for i in range(2) for place in shard.index.members(i).values()]
    for place in members:
        for at in [*range(place.offset - 512, place.offset, 7), *range(place.offset, place.offset + place.size, 29)]:
            data = bytearray(whole)
            data[at] ^= 1 << at % 8
            path.write_bytes(data)
            report = examine(str(path))
            kind = "checksum" if at >= place.offset else "index_disagrees"
            assert report.counts[kind], at


def test_another_shard_under_the_index_is_said(tmp_path: Path) -> None:
    path = built(tmp_path / "s")
    put(path, pairs(30, 50))
    found = check(path)
    assert (found["counts"]["index_disagrees"], found["good"], found["bad"]) == (1, 30, 0)
    index_path(path).write_bytes(b"PK\x03\x04 no")
    assert check(path)["counts"]["bad_index"] == 1


def test_names_that_readers_take_apart(tmp_path: Path) -> None:
    (a_jpg, a_txt), (b_jpg, b_txt) = pair(1), pair(2)
    hostile = [("../../etc/x.jpg", JPG), ("../../etc/x.txt", b"out"), ("/abs.jpg", JPG), ("/abs.txt", b"root")]
    dotted = [("photo.1.jpg", JPG), ("photo.1.txt", b"one"), ("photo.2.jpg", JPG), ("photo.2.txt", b"two")]
    plain = [("with space.jpg", JPG), ("with space.txt", b"x"), ("what?#.jpg", JPG), ("what?#.txt", b"y")]
    path = put(tmp_path / "0.tar", [a_jpg, b_jpg, b_txt, a_txt, *pair(1), *hostile, *dotted, *plain, ("README", b"hi"), (".hidden", b"")])
    found = check(path)
    assert found["counts"] == {
        "interleaved": 1,
        "duplicate_key": 1,
        "unsafe_key": 2,
        "dotted_key": 2,
        "unusual_key": 2,
        "stray_member": 2,
    }
    assert (found["total"], found["good"], found["mendable"], found["bad"]) == (9, 3, 6, 0)
    by_kind = {kind: [f["key"] for f in found["findings"] if f["kind"] == kind] for kind in found["counts"]}
    assert by_kind["dotted_key"] == ["photo.1", "photo.2"]
    assert by_kind["duplicate_key"] == ["00001"]
    out = tmp_path / "out"
    assert check(path, "--repair", out)["repaired"] == {"out": str(out), "good": 9, "bad": 0, "total": 9, "listed_in": None}
    keys = [record.key for record in Shard(str(out / "00000.tar"))]
    assert keys == ["00001", "00002", "00001-2", "etc/x", "abs", "photo_1", "photo_2", "with_space", "what"] or keys[-1] == "what_"
    assert check(out)["verdict"] == "clean"
    found = {s["__key__"]: s["txt"] for s in webdataset.WebDataset(str(out / "00000.tar"), shardshuffle=False, empty_check=False)}
    assert (found["00001"], found["photo_1"], found["photo_2"], len(found)) == (a_txt[1], b"one", b"two", 9)


def test_a_member_with_a_dot_of_its_own_is_no_dotted_key(tmp_path: Path) -> None:
    path = put(tmp_path / "0.tar", [m for i in range(12) for m in (*pair(i), (f"{i:05d}.seg.png", encoded(picture(), "PNG")))])
    found = check(path)
    assert (found["verdict"], found["members"]["seg.png"], found["total"]) == ("clean", 12, 12)
    shadowed = [("00003.b.jpg", JPG), ("00003.b.txt", b"hidden in 00003")]
    found = check(put(tmp_path / "1.tar", pairs(12) + shadowed))
    assert (found["counts"], found["total"]) == (
        {"dotted_key": 1, "interleaved": 1, "duplicate_across_shards": 0} | {"dotted_key": 1},
        13,
    ) or (
        found["counts"]["dotted_key"],
        found["total"],
    ) == (1, 13)


def test_keys_of_other_shards_are_noted_and_made_unique(tmp_path: Path) -> None:
    first, second = put(tmp_path / "0.tar", pairs(3)), put(tmp_path / "1.tar", pairs(3, 1))
    found = check(first, second, "--repair", tmp_path / "out")
    assert (found["verdict"], found["counts"]) == ("clean", {"duplicate_across_shards": 2})
    assert [(f["shard"], f["key"]) for f in found["findings"]] == [(str(second), "00001"), (str(second), "00002")]
    keys = [r.key for i in range(2) for r in Shard(str(tmp_path / "out" / f"0000{i}.tar"))]
    assert keys == ["00000", "00001", "00002", "00001-s1", "00002-s1", "00003"]


def test_code_is_reported_and_never_kept(tmp_path: Path) -> None:
    evil = [(f"00000.{e}", b"import os; os.abort()") for e in ("pyd", "pickle", "pkl", "pth")]
    path = put(tmp_path / "0.tar", [*pair(0), *evil, ("00000.jpg.gz", b"\x1f\x8b"), *pair(1)])
    found = check(path, "--repair", tmp_path / "out")
    assert found["counts"] == {"executable_member": 4, "compressed_member": 1}
    assert (found["mendable"], found["repaired"]["good"]) == (1, 2)
    assert set(Shard(str(tmp_path / "out" / "00000.tar")).read(0).members) == {"jpg", "txt", "jpg.gz"}


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("sizes.json", {"0.tar": 3}, {"0.tar": 4}),
        ("__len__", 5, 6),
        (
            "_info.json",
            {"splits": {"train": {"filenames": ["0.tar", "1.tar"], "shard_lengths": [3, 2]}}},
            {"splits": {"train": {"filenames": ["0.tar"], "shard_lengths": [4]}}},
        ),
        ("manifest.json", {"shards": {"0.tar": {"count": 3}}}, {"shards": {"0.tar": {"count": 2}}}),
        ("0_stats.json", {"successes": 3, "count": 9}, {"successes": 9}),
    ],
)
def test_counts_beside_shards(file: str, right: object, wrong: object, tmp_path: Path) -> None:
    put(tmp_path / "0.tar", pairs(3)), put(tmp_path / "1.tar", pairs(2, 10))
    (tmp_path / file).write_text(json.dumps(right))
    assert check(tmp_path)["counts"] == {}
    (tmp_path / file).write_text(json.dumps(wrong))
    found = check(tmp_path)
    assert found["counts"] == {"count_disagrees": 1}
    assert file in found["findings"][0]["detail"]
    for broken in ("{", "[]", '"x"', '{"0.tar": "many"}', '{"splits": 3, "shards": [], "successes": -1, "0.tar": -1}'):
        (tmp_path / file).write_text(broken)
        assert check(tmp_path)["counts"] == {"bad_count_file": 1}, broken


def test_a_shard_that_is_counted_but_not_there(tmp_path: Path) -> None:
    put(tmp_path / "0.tar", pairs(3))
    (tmp_path / "sizes.json").write_text('{"0.tar": 3, "1.tar": 7}')
    (finding,) = check(tmp_path)["findings"]
    assert (finding["kind"], finding["shard"]) == ("missing_shard", str(tmp_path / "1.tar"))


def test_repair_writes_the_good_and_lists_the_bad(tmp_path: Path) -> None:
    data = bytearray(tar_bytes(pairs(5) + BAD_SAMPLES["not_utf8"] + pairs(15, 20)))
    at = data.rindex(b"00030.jpg")
    data[at : at + 3] = b"???"
    put(tmp_path / "a" / "0.tar", bytes(data))
    put(tmp_path / "a" / "1.tar", b"<html>")
    put(tmp_path / "a" / "2.tar", pairs(2, 40) + BAD_SAMPLES["unknown_format"])
    found = check(tmp_path / "a", "--repair", tmp_path / "out")
    assert found["repaired"]["good"] == found["good"] == 17
    assert found["repaired"]["good"] + found["repaired"]["bad"] == found["total"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["input"], line["reason"]) for line in lines] == [
        ("a/0.tar", "corrupt_header"),
        ("a/0.tar/bad", "not_utf8"),
        ("a/1.tar", "no_tar"),
        ("a/2.tar/bad", "unknown_format"),
    ]
    assert check(tmp_path / "out", "--checksums")["good"] == 17
    again = run(tmp_path / "a", "--repair", tmp_path / "a")
    assert again.exit_code == 2
    assert "not empty" in again.stderr


def test_remote_shards_and_count_files(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    whole = tar_bytes(pairs(4))
    base = f"/{tmp_path.name}"
    memory.pipe(f"{base}/0.tar", whole)
    memory.pipe(f"{base}/1.tar", whole[: whole.rindex(b"00003.jpg") + 520])
    memory.pipe(f"{base}/sizes.json", b'{"0.tar": 4, "1.tar": 4, "2.tar": 1}')
    found = check(f"memory:/{base}", "--repair", f"memory:/{base}/out")
    assert found["counts"] == {"cut": 1, "count_disagrees": 1, "missing_shard": 1, "duplicate_across_shards": 3}
    assert (found["total"], found["good"], found["lost"], found["lost_is_estimated"]) == (8, 7, 1, False)
    assert len(Shard(f"memory:/{base}/out/00001.tar")) == 3
    lost = check(f"memory:/{base}/0.tar", f"memory:/{base}/9.tar")
    assert (lost["counts"]["unreachable"], lost["good"], lost["lost"]) == (1, 4, 1)


def test_a_failing_disk_costs_the_samples_it_fails_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = built(tmp_path / "s")
    with Shard(str(path)) as shard:
        place = shard.index.members(2)["jpg"]
    real = os.pread

    def failing(file: int, size: int, offset: int) -> bytes:
        if offset <= place.offset < offset + size:
            raise OSError(5, "Input/output error")
        return real(file, size, offset)

    monkeypatch.setattr(os, "pread", failing)
    found = check(path)
    assert (found["counts"], found["good"], found["findings"][0]["key"]) == ({"unreadable": 1}, 5, "00002")


def test_many_findings_are_counted_and_some_listed(tmp_path: Path) -> None:
    path = put(tmp_path / "0.tar", [(f"{i}.jpg", b"junk") for i in range(30)])
    found = check(path, path, "--max-findings", 10)
    assert found["counts"] == {"unknown_format": 60, "duplicate_across_shards": 30}
    assert (len(found["findings"]), found["findings_left_out"], found["bad"]) == (30, 60, 60)


def test_the_table_shows_kinds_examples_and_remedies_without_terminal_codes(tmp_path: Path) -> None:
    put(tmp_path / "0.tar", [*pairs(3), ("evil\x1b[2J.jpg", b"[red]not[/] \x1b]0;title\x07 an image"), ("evil\x1b[2J.txt", b"x")])
    result = run(tmp_path)
    assert result.exit_code == 1
    assert "unknown_format" in result.stdout
    assert "NOT clean: 4 samples in 1 shards: 3 good + 1 bad" in result.stdout
    assert "leave it out with --repair" in result.stdout
    assert "\x1b[2J" not in result.stdout
    assert "\x07" not in result.stdout


@pytest.mark.parametrize(
    "arguments", [["none/*.tar"], ["--engine", "cluster", "0.tar"], ["--max-aspect", "0", "0.tar"], ["pipe:cat 0.tar"]]
)
def test_bad_arguments_are_status_2(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "0.tar", pairs(1))
    assert run(*arguments).exit_code == 2


def test_every_finding_has_a_remedy() -> None:
    assert all(severity in ("bad", "mend", "note") and remedy for severity, remedy in KINDS.values())


def test_a_shard_is_closed_where_its_reading_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def fail(layout: Layout, _: Path) -> None:
        opened.append(layout.file)
        raise MemoryError

    monkeypatch.setattr(Layout, "_read", fail)
    with pytest.raises(MemoryError):
        Layout(str(built(tmp_path / "s")))
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened[0])


@pytest.mark.parametrize("where", [0, 1])
def test_a_size_of_eight_gigabytes_in_a_small_file_is_a_cut_shard(where: int, tmp_path: Path) -> None:
    data = bytearray(tar_bytes(pairs(3)))
    at = data.index(b"00000.jpg") if where == 0 else data.rindex(b"00002.txt")
    data[at + 124 : at + 136] = b"77777777777\0"
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    found = check(put(tmp_path / "0.tar", bytes(data)))
    assert (found["verdict"], found["counts"]["cut"]) == ("findings", 1)
    assert "needs 8589934591 bytes" in found["findings"][0]["detail"]
    assert found["lost"] + found["bad"] >= 1
