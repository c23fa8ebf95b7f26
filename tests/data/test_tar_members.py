"""Members of a tar that are not plain files: each is read as what it stands for, or listed with the reason."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpretrain.data import index as shard_index
from mmpretrain.data.index import ShardIndex, scan_bytes
from mmpretrain.data.source import Source, SourceConfig
from tests.data.generated import encoded, picture

Entry = tuple[str, bytes, str | bytes]  # name, type, and the bytes of a file or what a link leads to


def tar_of(entries: list[Entry], format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, kind, content in entries:
            info = tarfile.TarInfo(name)
            info.type = kind
            if isinstance(content, str):
                info.linkname = content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def contents(index: ShardIndex, data: bytes) -> dict[str, bytes]:
    found = {}
    for i, key in enumerate(index.keys):
        for extension, member in index.members(i).items():
            found[f"{key}.{extension}"] = data[member.offset : member.offset + member.size]
    return found


def reasons(index: ShardIndex) -> dict[str, str]:
    return {member.name: member.reason for member in index.left_out or ()}


FILE, HARD, SOFT = tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_links_are_read_as_the_file_that_they_lead_to(format: int) -> None:
    long = "d" * 90 + "/" + "e" * 90
    data = tar_of(
        [
            ("a/001.jpg", FILE, b"one"),
            ("a/007.jpg", HARD, "a/001.jpg"),
            ("b/008.jpg", SOFT, "../a/001.jpg"),
            ("b/009.jpg", SOFT, "./008.jpg"),
            ("later.jpg", SOFT, "z.jpg"),
            ("z.jpg", FILE, b"last"),
            (f"{long}.jpg", FILE, b"long"),
            (f"{long}2.jpg", HARD, f"{long}.jpg"),
            ("shelf", SOFT, "a"),
            ("through.jpg", SOFT, "shelf/001.jpg"),
        ],
        format,
    )
    index = scan_bytes(data, "x.tar")
    assert index.keys == ["a/001", "a/007", "b/008", "b/009", "later", "z", long, f"{long}2", "through"]
    assert list(contents(index, data).values()) == [b"one", b"one", b"one", b"one", b"last", b"last", b"long", b"long", b"one"]
    assert index.left_out == []
    assert not index.damage


def test_what_cannot_be_read_is_listed_with_its_reason() -> None:
    entries: list[Entry] = [
        ("000.jpg", FILE, b"zero"),
        ("001.jpg", SOFT, "/etc/passwd"),
        ("002.jpg", SOFT, "../../x.jpg"),
        ("003.jpg", SOFT, "004.jpg"),
        ("004.jpg", SOFT, "003.jpg"),
        ("005.jpg", HARD, "gone.jpg"),
        ("006.jpg", tarfile.FIFOTYPE, ""),
        ("007.jpg", tarfile.CHRTYPE, ""),
        ("008.jpg", b"Q", b""),
        ("009.txt", FILE, b"caption"),
        ("009.jpg", SOFT, "nowhere.jpg"),
        ("folder.d", tarfile.DIRTYPE, ""),
        ("again.d", SOFT, "folder.d"),
        ("latest", SOFT, "nowhere"),
    ]
    index = scan_bytes(tar_of(entries), "x.tar")
    assert index.keys == ["000", "009"]
    dangling = dict.fromkeys(["001.jpg", "002.jpg", "003.jpg", "004.jpg", "005.jpg", "009.jpg"], "dangling_link")
    special = dict.fromkeys(["006.jpg", "007.jpg", "008.jpg"], "special_member")
    assert reasons(index) == dangling | special | {"again.d": "link_to_folder"}
    assert [member.key for member in index.left_out or () if member.lost] == [f"{i:03d}" for i in range(1, 9)]
    details = {member.name: member.detail for member in index.left_out or ()}
    assert "'/etc/passwd'" in details["001.jpg"]
    assert "circle" in details["003.jpg"]
    assert "FIFO" in details["006.jpg"]


def test_sparse_files_are_listed_and_what_follows_is_read(tmp_path: Path) -> None:
    """An old GNU sparse header with its map continued in two blocks, then a file."""
    sparse = bytearray(tar_of([("s.jpg", b"S", b"x" * 700)], tarfile.GNU_FORMAT)[: 512 + 1024])
    sparse[482] = 1
    sparse[148:156] = b" " * 8
    sparse[148:156] = b"%06o\0 " % sum(sparse[:512])
    more = bytearray(1024)
    more[504] = 1  # the first of them goes on in the second
    data = bytes(sparse[:512] + more + sparse[512:]) + tar_of([("t.jpg", FILE, b"t")])
    index = scan_bytes(data, "x.tar")
    assert index.keys == ["t"]
    assert not index.damage
    assert reasons(index) == {"s.jpg": "sparse_member"}


def test_sparse_files_of_pax_are_listed_under_their_own_name() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("GNUSparseFile.1/s.jpg")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s.jpg", "GNU.sparse.realsize": "9"}
        info.size = 3
        tar.addfile(info, io.BytesIO(b"1\n0"))
    index = scan_bytes(out.getvalue(), "x.tar")
    assert not len(index)
    assert reasons(index) == {"s.jpg": "sparse_member"}


def test_a_hard_link_that_carries_the_bytes_again_is_a_file() -> None:
    data = bytearray(tar_of([("a.jpg", FILE, b"abc"), ("b.jpg", FILE, b"abc")]))
    header = memoryview(data)[1024:1536]
    header[156:157] = HARD
    header[157:162] = b"a.jpg"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    index = scan_bytes(bytes(data), "x.tar")
    assert contents(index, bytes(data)) == {"a.jpg": b"abc", "b.jpg": b"abc"}
    assert not index.damage
    assert index.linked is not None
    assert not index.linked.any()


def test_pax_records_of_any_size_are_passed_over() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "c" * 200_000}) as tar:
        for i in range(3):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = 1
            info.pax_headers = {"LIBARCHIVE.xattr.note": "A" * 70_000, "SCHILY.xattr.user.x": "B" * 3_000_000} if i == 1 else {}
            tar.addfile(info, io.BytesIO(b"%d" % i))
    index = scan_bytes(out.getvalue(), "x.tar")
    assert contents(index, out.getvalue()) == {"0.jpg": b"0", "1.jpg": b"1", "2.jpg": b"2"}
    assert not index.damage


def test_a_pax_path_of_absurd_length_is_damage() -> None:
    data = tar_of([("a" * 70_000 + ".jpg", FILE, b"x")])
    (damage,) = scan_bytes(data, "x.tar").damage
    assert damage.reason == "corrupt_header"
    assert "70004 bytes" in damage.detail


PATHS = st.sampled_from(["a.jpg", "b.jpg", "d/a.jpg", "d/b.jpg", "d/e/c.jpg", "f.jpg", "d2", "d2/g.jpg", "d/e/up"])
TARGETS = st.sampled_from(
    ["a.jpg", "b.jpg", "../a.jpg", "d/a.jpg", "e/c.jpg", "d", "d/e", "..", "../..", "./b.jpg", "d2/a.jpg", "up/b.jpg", "d/e/up/a.jpg", "no"]
)


@given(st.dictionaries(PATHS, st.one_of(st.binary(min_size=1, max_size=3), TARGETS), min_size=2))
def test_symbolic_links_lead_where_the_file_system_leads_them(tree: dict[str, bytes | str]) -> None:
    inner = {path: content for path, content in tree.items() if not any(other.startswith(f"{path}/") for other in tree)}
    entries: list[Entry] = [(path, FILE if isinstance(content, bytes) else SOFT, content) for path, content in inner.items()]
    data = tar_of(entries)
    index = scan_bytes(data, "x.tar")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        for path, content in inner.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                (root / path).write_bytes(content)
            else:
                os.symlink(content, root / path)
        real = os.path.realpath(root)
        expected = {
            path: (root / path).read_bytes()
            for path in inner
            if path.endswith(".jpg") and (root / path).is_file() and os.path.realpath(root / path).startswith(real + "/")
        }
    assert contents(index, data) == expected
    assert set(reasons(index)) == {path for path in inner if path.endswith(".jpg")} - set(expected)


def test_an_index_written_without_a_look_at_links_is_written_again(tmp_path: Path) -> None:
    shard = tmp_path / "0.tar"
    shard.write_bytes(tar_of([("0.jpg", FILE, b"0"), ("1.jpg", SOFT, "0.jpg")]))
    whole = shard_index.scan(shard)
    earlier = shard_index.scan_bytes(tar_of([("0.jpg", FILE, b"0")]), "x.tar")
    earlier.tar_bytes, earlier.left_out = whole.tar_bytes, None
    shard_index.save(earlier, shard_index.index_path(shard), shard.stat().st_mtime_ns)
    assert shard_index.open_index(shard).keys == ["0", "1"]
    saved, _ = shard_index.load(shard_index.index_path(shard))
    assert saved.keys == ["0", "1"]
    assert saved.left_out == []


def test_an_index_with_checksums_that_passes_over_links_is_used_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = tmp_path / "0.tar"
    shard.write_bytes(tar_of([("0.jpg", FILE, b"0"), ("1.jpg", SOFT, "0.jpg")]))
    earlier = shard_index.scan_bytes(tar_of([("0.jpg", FILE, b"0")]), "x.tar")
    earlier.tar_bytes, earlier.left_out = shard.stat().st_size, None
    shard_index.add_checksums(earlier, shard)
    shard_index.save(earlier, shard_index.index_path(shard), shard.stat().st_mtime_ns)
    assert shard_index.open_index(shard).keys == ["0"]
    assert "lists 1 samples and passes over links; the shard holds 2" in caplog.text


def test_training_reads_links_and_counts_what_it_cannot_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    photo = encoded(picture(3))
    entries: list[Entry] = [("0.jpg", FILE, photo), ("1.jpg", HARD, "0.jpg"), ("2.jpg", SOFT, "/nowhere/2.jpg")]
    (tmp_path / "0.tar").write_bytes(tar_of(entries))
    source = Source("web", SourceConfig(str(tmp_path / "0.tar"), batch_size=2), ())
    assert source.num_samples == 2
    assert {bytes(source.read(0, 0, i)[2]["jpg"]) for i in range(2)} == {photo}
    (record,) = source.damaged()
    assert (record["key"], record["reason"]) == ("2", "dangling_link")
    assert "/nowhere/2.jpg" in record["detail"]
    assert "1 members cannot be read, 1 samples lost" in caplog.text


def test_a_shard_of_dangling_links_is_refused(tmp_path: Path) -> None:
    entries: list[Entry] = [("0.jpg", FILE, b"x"), *((f"{i}.jpg", SOFT, f"../{i}.jpg") for i in range(1, 20))]
    (tmp_path / "0.tar").write_bytes(tar_of(entries))
    with pytest.raises(ValueError, match=r"1 damaged shards, about 19 samples lost; the first is .*0\.tar, dangling_link"):
        Source("web", SourceConfig(str(tmp_path / "0.tar"), batch_size=1), ())


def test_headers_keep_the_order_of_the_tar_where_links_lead_back() -> None:
    data = tar_of([("0.jpg", FILE, b"0"), ("0.txt", FILE, b"a"), ("1.jpg", HARD, "0.jpg"), ("1.txt", FILE, b"b")])
    index = scan_bytes(data, "x.tar")
    assert index.header is not None
    assert (np.diff(index.header) > 0).all()
    assert contents(index, data) == {"0.jpg": b"0", "0.txt": b"a", "1.jpg": b"0", "1.txt": b"b"}
