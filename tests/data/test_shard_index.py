"""The header scan: what tars of any making hold, and what is said of broken ones."""

import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpretrain.data import index as shard_index
from mmpretrain.data.index import ShardIndex, open_index, scan_bytes
from mmpretrain.data.schema import ShardError, split_name
from tests.data.generated import tar_bytes

names = st.text(st.characters(codec="utf-8", exclude_characters="\0/.", exclude_categories=["Cs"]), min_size=1, max_size=130)
extensions = st.sampled_from(["jpg", "txt", "json", "cls", "seg.png"])
FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def contents(index: ShardIndex, data: bytes) -> list[tuple[str, dict[str, bytes]]]:
    return [(key, {e: data[m.offset : m.offset + m.size] for e, m in index.members(i).items()}) for i, key in enumerate(index.keys)]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, st.dictionaries(extensions, st.binary(max_size=1200), min_size=1), max_size=6), st.sampled_from(FORMATS[1:]))
def test_reads_what_tarfile_wrote(samples: dict[str, dict[str, bytes]], format: int) -> None:
    data = tar_bytes([(f"{key}.{e}", body) for key, members in samples.items() for e, body in members.items()], format)
    index = scan_bytes(data, "x.tar")
    assert contents(index, data) == list(samples.items())
    assert index.damage == []
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:  # the same offsets as the reference reader
        assert sorted(index.offset.tolist()) == sorted(m.offset_data for m in tar.getmembers())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9 * 512 + 10240), st.integers(1, 4))
def test_any_cut_keeps_what_precedes_it_and_says_so(cut: int, count: int) -> None:
    members = [(f"{i}.{e}", bytes([65 + i]) * 700) for i in range(count) for e in ("jpg", "txt")]
    whole = tar_bytes(members)
    cut = min(cut, len(whole))
    if cut == 0:
        with pytest.raises(ShardError, match="zero bytes"):
            scan_bytes(b"", "x.tar")
        return
    data = whole[:cut]
    end_of_members = len(members) * (512 + 1024)
    if cut < 512:
        with pytest.raises(ShardError, match=r"x\.tar: not a tar"):
            scan_bytes(data, "x.tar")
        return
    index = scan_bytes(data, "x.tar")
    found = [body for _, sample in contents(index, data) for body in sample.values()]
    intact = sum(i * 1536 + 512 + 700 <= cut for i in range(len(members)))
    assert found == [body for _, body in members[:intact]]
    assert bool(index.damage) == (cut < end_of_members + 512)
    if index.damage:
        assert index.damage[0].reason == "cut"
        assert index.damage[0].offset <= cut


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=3000))
def test_garbage_never_crashes(data: bytes) -> None:
    try:
        index = scan_bytes(data, "x.tar")
    except ShardError:
        return
    assert len(index) == 0  # a valid checksum by chance is out of the question


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_flipped_header_bytes_are_noticed(data: st.DataObject) -> None:
    whole = bytearray(tar_bytes([(f"{i}.jpg", b"x" * 600) for i in range(5)]))
    header = data.draw(st.integers(0, 4))
    at = header * 1536 + data.draw(st.integers(0, 511))
    whole[at] ^= data.draw(st.integers(1, 255))
    try:
        index = scan_bytes(bytes(whole), "x.tar")
    except ShardError:
        assert header == 0
        return
    same = index.keys == [str(i) for i in range(5)]  # bits of the stated checksum that do not change its value
    assert same or (len(index) == header and index.damage[0].offset == header * 1536)


def test_zeros_in_the_middle_are_damage_with_an_estimate() -> None:
    data = bytearray(tar_bytes([(f"{i}.jpg", b"x" * 600) for i in range(20)]))
    data[5 * 1536 : 5 * 1536 + 2048] = bytes(2048)
    index = scan_bytes(bytes(data), "x.tar")
    assert len(index) == 5
    (damage,) = index.damage
    assert (damage.offset, damage.reason) == (5 * 1536, "zeros")
    assert 14 <= damage.lost <= 22


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "zero bytes"),
        (b"<!DOCTYPE html><html>" + b" " * 600, "web page"),
        (b"\x1f\x8b\x08" + b"z" * 600, "gzip"),
        (b"PK" * 400, "not a tar"),
    ],
)
def test_what_is_no_tar_is_named(data: bytes, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        scan_bytes(data, "some.tar")


def test_empty_tar_is_fine() -> None:
    assert len(scan_bytes(tar_bytes([]), "x.tar")) == 0
    assert scan_bytes(bytes(1024), "x.tar").damage == []


def test_interleaved_members_join_and_repeated_keys_stay_apart() -> None:
    members = [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3"), ("b.txt", b"4"), ("a.jpg", b"5"), ("a.txt", b"6")]
    data = tar_bytes(members)
    index = scan_bytes(data, "x.tar")
    assert contents(index, data) == [
        ("a", {"jpg": b"1", "txt": b"3"}),
        ("b", {"jpg": b"2", "txt": b"4"}),
        ("a~2", {"jpg": b"5", "txt": b"6"}),
    ]
    assert index.duplicates == 1


def test_folders_links_and_dot_files_are_no_samples() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, kind in [
            ("d", tarfile.DIRTYPE),
            ("l.jpg", tarfile.SYMTYPE),
            ("d/.hidden", tarfile.REGTYPE),
            ("noextension", tarfile.REGTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info, io.BytesIO())
        info = tarfile.TarInfo("d.e/k.x.JPG")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    index = scan_bytes(out.getvalue(), "x.tar")
    assert contents(index, out.getvalue()) == [("d.e/k", {"x.jpg": b"abc"})]


def test_split_name_follows_the_first_dot() -> None:
    assert split_name("a/b.c/d.seg.PNG") == ("a/b.c/d", "seg.png")
    assert split_name("./0001.jpg") == ("./0001", "jpg")
    assert split_name("a/.x") is split_name("a") is split_name("a.b/c") is None


def test_saved_index_reads_back(shard: Callable[..., Path]) -> None:
    path = shard([("é1.jpg", b"abc"), ("é1.txt", b"d"), ("2.jpg", b"")])
    first = open_index(path)
    assert shard_index.index_path(path).exists()
    again = open_index(path)
    shard_index.add_checksums(again, path)
    for name in ("starts", "extension", "offset", "size"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert first.keys == again.keys == ["é1", "2"]
    assert again.members(1)["jpg"].checksum.hex() == "99aa06d3014798d86001c324468d497f"  # XXH3-128 of nothing


def test_an_index_of_the_first_version_still_finds_damage(shard: Callable[..., Path]) -> None:
    path = shard([("1.jpg", b"abc"), ("2.jpg", b"de")])
    index = scan_bytes(path.read_bytes(), str(path))
    shard_index.add_checksums(index, path, 32)
    place = shard_index.index_path(path)
    shard_index.save(index, place)
    with np.load(place) as saved:
        arrays = dict(saved)
    arrays["sha256"] = arrays.pop("checksum")
    arrays["head"] = np.frombuffer(arrays["head"].tobytes().replace(b'"version": 2', b'"version": 1'), np.uint8)
    with place.open("wb") as file:
        np.savez(file, **arrays)
    member = open_index(path).members(1)["jpg"]
    assert member.checksum == hashlib.sha256(b"de").digest()
    assert (member.holds(b"de"), member.holds(b"dE")) == (True, False)
    arrays["sha256"] = arrays["sha256"][:, :20]  # no checksum that is known has 20 bytes
    with place.open("wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(ShardError, match="no checksum of a known kind"):
        open_index(path)


def test_changed_foreign_shard_is_scanned_again(shard: Callable[..., Path]) -> None:
    path = shard([("1.jpg", b"abc")])
    assert len(open_index(path)) == 1
    shard([("1.jpg", b"abc"), ("2.jpg", b"abc")])
    os.utime(path, ns=(1, 1))
    assert len(open_index(path)) == 2


def test_built_index_refuses_a_cut_shard(shard: Callable[..., Path]) -> None:
    path = shard([(f"{i}.jpg", b"x" * 5000) for i in range(9)])
    index = open_index(path, save_new=False)
    shard_index.add_checksums(index, path)
    shard_index.save(index, shard_index.index_path(path))
    os.truncate(path, 20_000)
    with pytest.raises(ShardError, match=r"00000\.tar: 20000 bytes, but its index says .* byte 20000 falls in or before sample 3 of 9"):
        open_index(path)


def test_stated_count_that_disagrees_is_an_error(shard: Callable[..., Path]) -> None:
    path = shard([(f"{i}.jpg", b"x" * 600) for i in range(9)], cut=5 * 1536)  # at a header: the tar itself looks whole
    with pytest.raises(ShardError, match=r"5 samples found, sizes\.json says 9; it stops at byte 7680"):
        open_index(path, expected=9)


def test_unreadable_index_says_what_to_do(shard: Callable[..., Path]) -> None:
    path = shard([("1.jpg", b"abc")])
    shard_index.index_path(path).write_bytes(b"PK\x03\x04 no")
    with pytest.raises(ShardError, match="Delete it"):
        open_index(path)


def test_read_only_folder_keeps_the_index_in_the_cache(shard: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard([("1.jpg", b"abc")], "ro/0.tar")
    real = shard_index.save

    def refuse(index: ShardIndex, place: Path, mtime_ns: int = 0) -> None:
        if place.parent == path.parent:
            raise PermissionError(13, "read-only")
        real(index, place, mtime_ns)

    monkeypatch.setattr(shard_index, "save", refuse)
    open_index(path, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    monkeypatch.setattr(shard_index, "scan", lambda _: pytest.fail("the saved index was not used"))
    assert open_index(path, cache=tmp_path / "cache").keys == ["1"]


def test_a_header_that_points_back_does_not_hang_the_walk() -> None:
    for kind in (b"g", b"L", b"x", b"0"):
        block = bytearray(tar_bytes([("1.jpg", b"x")])[:512])
        block[124:136], block[156:157] = b"-0000001000\0", kind
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        with pytest.raises(ShardError, match="not a tar"):
            scan_bytes(bytes(block) + bytes(1024), "x.tar")
        index = scan_bytes(tar_bytes([("0.jpg", b"x")])[:1024] + bytes(block), "x.tar")
        assert [(d.offset, d.reason) for d in index.damage] == [(1024, "corrupt_header")]


def test_odd_names_survive_saving(tmp_path: Path) -> None:
    """A NUL in a pax path, an empty extension, and more extensions than 16 bits count."""
    members = [("a.", b"1"), ("b.\udcff.jpg", b"2"), *((f"frame.{i:05d}.jpg", b"") for i in range(70_000))]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("n.txt")
        info.pax_headers, info.size = {"path": "k.txt\0.exe"}, 1
        tar.addfile(info, io.BytesIO(b"3"))
    nul = out.getvalue().rstrip(b"\0")
    index = scan_bytes(nul + bytes(-len(nul) % 512) + tar_bytes(members, tarfile.GNU_FORMAT), "x.tar")
    shard_index.save(index, tmp_path / "i.npz")
    again, _ = shard_index.load(tmp_path / "i.npz")
    assert again.keys == index.keys == ["k", "b", "frame"]
    assert list(again.members(2)) == [f"{i:05d}.jpg" for i in range(70_000)]


def retold(data: bytes | bytearray, at: int, checksum: bytes = b"%06o\0 ") -> bytes:
    """The header at `at` with its checksum made right, as `checksum` writes it."""
    block = bytearray(data[at : at + 512])
    block[148:156] = b" " * 8
    block[148:156] = checksum % sum(block)
    return bytes(data[:at] + block + data[at + 512 :])


@pytest.mark.parametrize("size", [b"77777777777\0", b"777777777777", b"\x80\0\0\0\0\0\0\x01\0\0\0\0", b"00000100001\0"])
def test_a_member_that_claims_more_than_the_file_holds_is_cut(size: bytes) -> None:
    whole = tar_bytes([("0.jpg", b"x" * 600), ("1.jpg", b"x" * 600)])
    for at, samples in ((0, 0), (1536, 1)):
        index = scan_bytes(retold(whole[: at + 124] + size + whole[at + 136 :], at), "x.tar")
        assert len(index) == samples
        assert [(d.offset, d.reason) for d in index.damage] == [(at, "cut")]
        assert f"{len(whole) - at - 512} are left" in index.damage[0].detail


@pytest.mark.parametrize("checksum", [b"%06o\0 ", b"%06o \0", b"%07o\0", b" %5o\0 ", b"%06o  "])
@pytest.mark.parametrize("size", [b"00000001130\0", b"00000001130 ", b"       1130 ", b"1130\0       ", b"000000001130"])
def test_numbers_are_read_however_they_are_written(size: bytes, checksum: bytes) -> None:
    whole = tar_bytes([("0.jpg", b"x" * 600), ("1.jpg", b"y" * 600)])
    index = scan_bytes(retold(whole[:124] + size + whole[136:], 0, checksum), "x.tar")
    assert contents(index, whole) == [("0", {"jpg": b"x" * 600}), ("1", {"jpg": b"y" * 600})]
    assert not index.damage


def test_damage_far_into_a_shard_keeps_what_precedes_it() -> None:
    """Headers are checked thousands at a time; folders kept apart and unusual names come in any of these."""
    many = 5000
    names = [f"{i}.jpg" for i in range(many)]
    names[2100], names[3000] = "f" * 80 + "/" + "n" * 80 + ".jpg", "é\udcff.jpg"
    whole = bytearray(tar_bytes([(name, b"") for name in names], tarfile.USTAR_FORMAT))
    assert scan_bytes(whole, "x.tar").keys == [name.removesuffix(".jpg") for name in names]
    whole[4100 * 512] ^= 1
    index = scan_bytes(whole, "x.tar")
    assert index.keys == [name.removesuffix(".jpg") for name in names[:4100]]
    assert [(d.offset, d.reason, d.lost) for d in index.damage] == [(4100 * 512, "corrupt_header", (len(whole) - 4100 * 512) // 512)]


def test_a_failure_of_the_interpreter_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython 3.11's parser of NumPy's headers fails now and then beside another thread's."""
    (tmp_path / "a.tar").write_bytes(tar_bytes([("a.txt", b"x")]))
    open_index(tmp_path / "a.tar")
    real, failures = np.load, [SystemError("AST constructor recursion depth mismatch")]

    def load(*arguments, **options):
        if failures:
            raise failures.pop()
        return real(*arguments, **options)

    monkeypatch.setattr(np, "load", load)
    assert shard_index.load(shard_index.index_path(tmp_path / "a.tar"))[0].keys == ["a"]
    assert not failures
