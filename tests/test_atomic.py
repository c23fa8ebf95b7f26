"""A file that is written atomically is whole or as it was."""

import os
from pathlib import Path
from typing import BinaryIO

import pytest

from mmpretrain.atomic import write_atomically


@pytest.mark.parametrize("content", ["größer", "größer".encode(), lambda file: file.write("größer".encode())])
def test_content_replaces_what_was_there_and_is_readable_to_all(content: object, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")
    write_atomically(path, content)  # type: ignore[arg-type]
    assert path.read_text(encoding="utf-8") == "größer"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_the_old_content_and_nothing_temporary(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def writer(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, writer)
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_the_file_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, calls = tmp_path / "file.txt", []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: calls.append(f"fsync of {os.fstat(handle).st_size} bytes") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("rename") or replace(a, b))
    write_atomically(path, b"12345")
    assert calls == ["fsync of 5 bytes", "rename"]
