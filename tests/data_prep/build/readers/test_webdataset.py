"""Shards of others and img2dataset's output, made with tarfile."""

import io
import json
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.build.readers.img2dataset import img2dataset
from data_prep.build.readers.webdataset import shards
from data_prep.records import InputError
from tests.data_prep.build.readers.support import collect, image

PNG = image()


def sample(key: str, **members: bytes | str) -> list[tuple[str, bytes]]:
    data = {"png": PNG, "txt": f"of {key}"} | members
    return [(f"{key}.{extension}", value.encode() if isinstance(value, str) else value) for extension, value in data.items()]


def tar(path: Path, *samples: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        for name, data in (member for members in samples for member in members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(path)


@pytest.mark.parametrize("count", [1, 3, 100])
def test_samples_pass_through_whatever_the_shard_size(tmp_path: Path, count: int) -> None:
    samples = [sample(f"x/{i:03d}", json=json.dumps({"n": i}), extra=b"\0\1") for i in range(7)]
    names = [tar(tmp_path / "0.tar", *samples[:4]), tar(tmp_path / "1.tar", *samples[4:]), tar(tmp_path / "2.tar")]
    found, skipped = collect(shards(names), count)
    assert found == {f"x/{i:03d}": {name.partition(".")[2]: data for name, data in samples[i]} for i in range(7)}
    assert not skipped


def test_a_key_with_a_tilde_is_no_repetition(tmp_path: Path) -> None:
    found, skipped = collect(shards([tar(tmp_path / "0.tar", sample("a"), sample("b~2"), sample("a"))]), 10)
    assert [item.reason for item in skipped] == ["duplicate_key"]
    assert [members["txt"] for members in found.values()] == [b"of a", b"of b~2"]


def test_damaged_samples_are_counted(tmp_path: Path) -> None:
    good = [sample("a"), sample("b"), sample("c b"), sample("d#")]
    bad = {
        "f": (sample("f", png=b"GIF?"), "unknown_format"),
        "g": (sample("g", png=b""), "unknown_format"),
        "h": (sample("h", txt=b"\xff"), "not_utf8"),
        "i": (sample("i", txt=" "), "empty_caption"),
        "j": ([("j.txt", b"no image")], "missing_member"),
    }
    name = tar(tmp_path / "0.tar", *good, *(members for members, _ in bad.values()))
    found, skipped = collect(shards([name], require=("png", "txt")))
    assert [members["txt"] for members in found.values()] == [b"of a", b"of b", b"of c b", b"of d#"]
    assert all(key.replace("_", "").isalnum() for key in found)
    assert [item.reason for item in skipped] == [reason for _, reason in bad.values()]
    assert [item.where for item in skipped] == [f"{name}, sample {key}" for key in bad]


def test_a_cut_shard_gives_what_is_whole(tmp_path: Path) -> None:
    name = tar(tmp_path / "0.tar", *(sample(f"{i}") for i in range(5)))
    data = Path(name).read_bytes()
    Path(name).write_bytes(data[: data.index(b"3.txt")])
    found, skipped = collect(shards([name]))
    assert list(found) == ["0", "1", "2"]
    assert [item.reason for item in skipped] == ["missing_member", "cut"]
    assert "txt: the shard is damaged" in skipped[0].detail
    assert skipped[1].where == f"{name}, byte {data.index(b'3.txt')}"


def test_files_that_are_no_shards(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"<html>not found</html>")
    (tmp_path / "1.tar").write_bytes(b"")
    whole = tar(tmp_path / "2.tar", sample("a"))
    found, skipped = collect(shards([str(tmp_path / "0.tar"), str(tmp_path / "1.tar"), whole]))
    assert list(found) == ["a"]
    assert [item.reason for item in skipped] == ["unreadable_shard"] * 2
    assert "web page" in skipped[0].detail


def test_keys_that_come_again(tmp_path: Path) -> None:
    names = []
    for folder in ("p", "q"):
        (tmp_path / folder).mkdir()
        names.append(tar(tmp_path / folder / "0.tar", sample("1"), sample("2"), sample("1", txt="again")))
    found, skipped = collect(shards(names))
    assert {key: members["txt"] for key, members in found.items()} == {"1": b"of 1", "2": b"of 2"}
    assert [item.reason for item in skipped] == ["duplicate_key"] * 4
    found, skipped = collect(shards(names, keys="shard"))
    assert list(found) == ["p_0_1", "p_0_2", "q_0_1", "q_0_2"]
    assert [item.reason for item in skipped] == ["duplicate_key"] * 2


def test_counts_beside_shards_are_held_against_them(tmp_path: Path) -> None:
    name = tar(tmp_path / "0.tar", sample("a"))
    (tmp_path / "sizes.json").write_text('{"0.tar": 2}')
    found, skipped = collect(shards([name]))
    assert list(found) == ["a"]
    assert [(item.reason, item.detail) for item in skipped] == [("count_disagrees", "1 samples found, sizes.json says 2")]


def test_members_are_chosen(tmp_path: Path) -> None:
    name = tar(tmp_path / "0.tar", sample("a", pickle=b"x"), [("b.json", b"{}")])
    found, skipped = collect(shards([name], members=("png", "txt")))
    assert {key: set(members) for key, members in found.items()} == {"a": {"png", "txt"}}
    assert [item.reason for item in skipped] == ["missing_member"]
    with pytest.raises(InputError, match="--require json is not among --member png"):
        shards([name], ("png",), ("json",))
    with pytest.raises(InputError, match="named more than once"):
        shards([name, name])
    with pytest.raises(InputError, match="expected keep or shard"):
        shards([name], keys="x")


def downloads(folder: Path, successes: int) -> None:
    for shard in range(2):
        keys = [f"{shard:05d}{i:04d}" for i in range(3)]
        metadata = [json.dumps({"key": key, "status": "success", "caption": f"of {key}"}) for key in keys]
        tar(folder / f"{shard:05d}.tar", *(sample(key, json=text) for key, text in zip(keys, metadata)))
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"count": 5, "successes": 3 if shard == 0 else successes}))
        (folder / f"{shard:05d}.parquet").write_bytes(b"not read")


def test_img2dataset_keeps_keys_captions_and_metadata(tmp_path: Path) -> None:
    downloads(tmp_path, 3)
    found, skipped = collect(img2dataset(str(tmp_path)), 4)
    assert list(found) == [f"{shard:05d}{i:04d}" for shard in range(2) for i in range(3)]
    assert found["000010002"]["txt"] == b"of 000010002"
    assert json.loads(found["000010002"]["json"])["status"] == "success"
    assert not skipped


def test_img2dataset_counts_that_disagree_are_said(tmp_path: Path) -> None:
    downloads(tmp_path, 4)
    (tmp_path / "00002_stats.json").write_text('{"successes": 9}')
    found, skipped = collect(img2dataset(str(tmp_path)))
    assert len(found) == 6
    assert [(Path(item.where).name, item.reason) for item in skipped] == [
        ("00001.tar", "count_disagrees"),
        ("00002.tar", "unreadable_shard"),
    ]
    assert skipped[0].detail == "3 samples found, 00001_stats.json says 4"


def test_img2dataset_output_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "00000.parquet").write_bytes(b"")
    with pytest.raises(InputError, match="It has parquet files"):
        img2dataset(str(tmp_path))
    tar(tmp_path / "00000.tar", sample("a"))
    with pytest.raises(InputError, match="For other shards use `build shards`"):
        img2dataset(str(tmp_path))
    (tmp_path / "00000_stats.json").write_text('{"successes": "many"}')
    with pytest.raises(InputError, match="count of `successes`"):
        img2dataset(str(tmp_path))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_nothing_is_lost_silently_from_a_changed_tar(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.tar"
        tar(path, *(sample(f"{i}") for i in range(4)))
        whole, _ = collect(shards([str(path)]))
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        del content[data.draw(st.integers(0, len(content))) :]
        path.write_bytes(content)
        found, skipped = collect(shards([str(path)]))
        assert skipped or {key: set(members) for key, members in found.items()} == {key: set(members) for key, members in whole.items()}
