"""`index`: shards that others built get an index, and damage is said aloud."""

import io
import json
import tarfile
from pathlib import Path

import fsspec
import pytest
import typer
from typer.testing import CliRunner, Result

from data_prep.index import index
from data_prep.records import Record
from data_prep.shards.serial import write_shards
from mmpretrain.data.cache import remote_index
from mmpretrain.data.index import index_path, load

app = typer.Typer()
app.command()(index)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300"})


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    for s in range(2):
        with tarfile.open(tmp_path / f"{s}.tar", "w") as tar:
            for i in range(3):
                info = tarfile.TarInfo(f"{i}.jpg")
                info.size = 600
                tar.addfile(info, io.BytesIO(bytes([s]) * 600))
    return tmp_path


def test_index_and_sizes_are_written(foreign: Path) -> None:
    result = run(foreign / "{0..1}.tar")
    assert result.exit_code == 0, result.output
    assert "3 samples (3 jpg)" in result.output
    assert json.loads((foreign / "sizes.json").read_text()) == {"0.tar": 3, "1.tar": 3}
    assert load(index_path(foreign / "1.tar"))[0].checksum is not None
    assert run(foreign, "--no-checksums", "--replace").exit_code == 0
    assert load(index_path(foreign / "1.tar"))[0].checksum is None


def test_damage_makes_the_exit_status_one(foreign: Path) -> None:
    (foreign / "0.tar").write_bytes((foreign / "0.tar").read_bytes()[:2000])
    (foreign / "2.tar").write_bytes(b"<html>")
    result = run(foreign)
    assert result.exit_code == 1
    assert "0.tar: cut at byte 1536" in result.output
    assert "2.tar: a web page rather than a tar" in result.output
    assert json.loads((foreign / "sizes.json").read_text()) == {"0.tar": 1, "1.tar": 3}
    assert run(foreign / "nothing" / "*.tar").exit_code == 1


def test_a_builders_checksums_are_not_replaced_by_those_of_a_corrupt_shard(tmp_path: Path) -> None:
    write_shards([Record(f"{i}", {"jpg": b"x" * 600}) for i in range(3)], tmp_path / "s")
    path = tmp_path / "s" / "00000.tar"
    assert run(path).exit_code == 0
    data = bytearray(path.read_bytes())
    data[512 + 1536 + 7] ^= 1
    path.write_bytes(data)
    result = run(path)
    assert result.exit_code == 1
    assert "of sample 1, do not match its checksum" in result.output
    assert run(path, "--replace").exit_code == 0


def test_known_checksums_outlive_an_index_without_them(tmp_path: Path) -> None:
    write_shards([Record(f"{i}", {"jpg": b"x" * 600}) for i in range(3)], tmp_path / "s")
    path = tmp_path / "s" / "00000.tar"
    known = load(index_path(path))[0].checksum
    assert run(path, "--no-checksums").exit_code == 0
    assert (load(index_path(path))[0].checksum == known).all()
    write_shards([Record(f"{i}", {"jpg": b"x" * 600}) for i in range(2)], tmp_path / "t")
    path.write_bytes((tmp_path / "t" / "00000.tar").read_bytes())  # another shard under the same name
    refused = run(path, "--no-checksums")
    assert refused.exit_code == 1
    assert "pass --replace" in refused.output
    assert (load(index_path(path))[0].checksum == known).all()


def test_processes_make_no_difference(foreign: Path) -> None:
    assert run(foreign, "--processes", 1).exit_code == 0
    before = [index_path(foreign / f"{s}.tar").read_bytes() for s in range(2)]
    again = run(foreign, "--replace", "--processes", 2)
    assert again.output.index("0.tar: 3 samples") < again.output.index("1.tar: 3 samples")
    assert [index_path(foreign / f"{s}.tar").read_bytes() for s in range(2)] == before


def test_remote_shards_get_their_index_beside_them(foreign: Path) -> None:
    memory = fsspec.filesystem("memory")
    for s in range(2):
        memory.put_file(str(foreign / f"{s}.tar"), f"/theirs/{s}.tar")
    memory.pipe_file("/theirs/sizes.json", b'{"9.tar": 5}')
    result = run("memory://theirs/{0..1}.tar")
    assert result.exit_code == 0, result.output
    assert json.loads(memory.cat_file("/theirs/sizes.json")) == {"0.tar": 3, "1.tar": 3, "9.tar": 5}
    run(foreign)
    local = load(index_path(foreign / "1.tar"))[0]
    remote = remote_index("memory://theirs/1.tar")
    assert remote is not None
    assert (remote.keys, remote.tar_bytes) == (local.keys, local.tar_bytes)
    assert (remote.checksum == local.checksum).all()
    data = bytearray(memory.cat_file("/theirs/1.tar"))
    data[600] ^= 1
    memory.pipe_file("/theirs/1.tar", bytes(data))
    refused = run("memory://theirs/1.tar")
    assert refused.exit_code == 1
    assert "memory://theirs/1.tar: the bytes at 512, of sample 0, do not match its checksum" in refused.output
    assert run("memory://theirs/2.tar").exit_code == 1
    memory.store.clear()


def test_a_sizes_file_that_is_none_is_named(foreign: Path) -> None:
    (foreign / "sizes.json").write_text("[1]")
    result = run(foreign)
    assert result.exit_code == 1
    assert "sizes.json: expected" in result.output
    assert (foreign / "sizes.json").read_text() == "[1]"
