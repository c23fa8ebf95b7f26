"""Local paths, file:// and other URLs are the same to the stages."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data_prep import files
from mmpretrain.data.schema import ShardError


@pytest.fixture(params=["path", "file", "memory"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "memory":
        yield f"memory://{tmp_path.name}"
        fsspec.filesystem("memory").store.clear()
    else:
        yield str(tmp_path) if request.param == "path" else f"file://{tmp_path}"


def test_what_is_written_is_read(base: str, tmp_path: Path) -> None:
    name = files.join(base, "a.json")
    assert not files.exists(name)
    assert files.size(name) is None
    files.write_json(name, {"é": [1]})
    assert json.loads(files.read_bytes(name)) == {"é": [1]}
    assert files.size(name) == len(files.read_bytes(name))
    source = tmp_path / "elsewhere" / "x"
    source.parent.mkdir()
    source.write_bytes(b"12345")
    files.put(source, files.join(base, "x"))
    assert not source.exists()
    with files.local(files.join(base, "x")) as path:
        assert path.read_bytes() == b"12345"
    files.write_lines(files.join(base, "lines"), (f"{i}\n" for i in range(3)))
    with files.open_text(files.join(base, "lines")) as text:
        assert list(text) == ["0\n", "1\n", "2\n"]
    files.remove(files.join(base, "x"))
    files.remove(files.join(base, "x"))  # gone already
    names = [name.rpartition("/")[2] for name in files.listing(base)]
    assert [name for name in names if name != "elsewhere"] == ["a.json", "lines"]
    assert files.exists(files.listing(base)[0])


def test_walk_is_the_same_everywhere_and_leaves_hidden_ones_out(base: str) -> None:
    for name in ("b.jpg", "a-b/1.jpg", "a/2.jpg", "a/deep/1.jpg", ".hidden/x", "a/.DS_Store"):
        if "/" in name:
            files.make_folder(files.join(base, name.rpartition("/")[0]))
        files.write_text(files.join(base, name), name)
    # By parts: a folder's files stay together, whatever characters its neighbours' names hold.
    assert list(files.walk(base)) == ["a/2.jpg", "a/deep/1.jpg", "a-b/1.jpg", "b.jpg"]
    assert list(files.walk(files.join(base, "a"))) == ["2.jpg", "deep/1.jpg"]


def test_what_is_absent_is_named(base: str) -> None:
    missing = files.join(base, "missing")
    assert files.listing(missing) == []
    with pytest.raises(FileNotFoundError):
        files.read_bytes(missing)
    with pytest.raises((FileNotFoundError, ShardError)), files.local(missing) as path:
        path.read_bytes()
    with pytest.raises(ShardError, match="nosuch"):
        files.read_bytes("nosuch://a/b")


def test_local_leaves_no_copy() -> None:
    fsspec.filesystem("memory").pipe_file("/local-copy/x.tar", b"abc")
    with files.local("memory://local-copy/x.tar") as path:
        assert path.name == "x.tar"
        assert path.read_bytes() == b"abc"
    assert not path.exists()


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "lines"
    place.write_text("before")

    def lines() -> Iterator[str]:
        yield "half"
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_lines(place, lines())
    assert place.read_text() == "before"
    assert list(tmp_path.iterdir()) == [place]


def test_file_names_that_are_not_utf8_survive_json(tmp_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    files.write_json(tmp_path / "x.json", [name])
    assert json.loads((tmp_path / "x.json").read_bytes()) == [name]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "real" / "dogs").mkdir(parents=True)
    (tmp_path / "real" / "dogs" / "1.jpg").touch()
    (tmp_path / "real" / "dogs" / "up").symlink_to(tmp_path / "real")  # into itself
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dogs").symlink_to(tmp_path / "real" / "dogs")
    (tmp_path / "set" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert list(files.walk(tmp_path / "real")) == ["dogs/1.jpg"]
    assert list(files.walk(tmp_path / "set")) == ["dogs/1.jpg", "gone.jpg"]  # a broken link is there to be reported


def test_a_link_to_itself_is_a_name_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    os.symlink("loop.jpg", tmp_path / "loop.jpg")
    assert list(files.walk(tmp_path)) == ["a.jpg", "loop.jpg"]
