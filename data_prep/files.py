"""File access by local path or fsspec URL. Remote files are read and written whole, with retries."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from mmpretrain.atomic import write_atomically
from mmpretrain.config.build import OptionError
from mmpretrain.data import folders
from mmpretrain.data.cache import filesystem, retried
from mmpretrain.data.shard_names import is_remote
from mmpretrain.data.tables import as_text


def local_path(name: str | Path) -> str | None:
    """Returns the path of a local file or file:// URL; None for other URLs.

    A string, since building a Path takes microseconds and this is called for every image.
    """
    text = str(name)
    return None if is_remote(text) else text.removeprefix("file://")


def place(name: str | Path) -> str | Path:
    """Returns a local name as a Path, and any other URL as it is."""
    path = local_path(name)
    return str(name).rstrip("/") if path is None else Path(path)


def local_folder(name: str | Path) -> Path:
    """Returns the path of a local folder. Raises OptionError for a URL, also one mangled by a Path ("s3:/bucket")."""
    if re.match(r"(?!file:)\w{2,}:/", str(name)):
        raise OptionError(f"{name} is a URL; this writes to a local folder only. Copy the result there afterwards.")
    return Path(local_path(name) or name)


def join(base: str | Path, name: str) -> str:
    return f"{str(base).rstrip('/')}/{name}" if is_remote(str(base)) else str(Path(place(base)) / name)


def read_bytes(url: str | Path) -> bytes:
    """Reads a whole file. Raises FileNotFoundError, or ShardError for a remote file that stays unreachable."""
    if (path := local_path(url)) is not None:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(file).st_size
            data = os.read(file, size + 1)  # one byte more detects a file that grows
            if len(data) == size > 0:
                return data
            parts = [data]  # a pipe, a kernel file, or a file that is being written
            while part := os.read(file, 1 << 16):
                parts.append(part)
            return b"".join(parts)
        finally:
            os.close(file)
    where = str(place(url))
    system, path = filesystem(where)
    if not retried(lambda: system.exists(path), where):
        raise FileNotFoundError(2, "no such file", where)
    return retried(lambda: system.cat_file(path), where)


@contextmanager
def open_binary(url: str | Path) -> Iterator[BinaryIO]:
    """Opens a file as a stream of bytes. Raises FileNotFoundError, or ShardError for a remote file that stays unreachable."""
    where = place(url)
    if isinstance(where, Path):
        with where.open("rb") as file:
            yield file
        return
    system, path = filesystem(where)
    with retried(lambda: system.open(path, "rb"), where) as file:
        yield file


@contextmanager
def open_text(url: str | Path) -> Iterator[IO[str]]:
    """Opens a text file as a stream: UTF-8, where other bytes are read as surrogates, or what its byte order mark says."""
    with open_binary(url) as file, as_text(file) as text:
        yield text


def head(url: str | Path, num_bytes: int) -> bytes:
    """Reads the first bytes of a remote file. Raises ShardError where it stays unreachable."""
    system, path = filesystem(str(place(url)))
    return retried(lambda: system.cat_file(path, start=0, end=num_bytes), str(url))


def exists(url: str | Path) -> bool:
    where = place(url)
    if isinstance(where, Path):
        return where.exists()
    system, path = filesystem(where)
    return retried(lambda: system.exists(path), where)


def size(url: str | Path) -> int | None:
    """Returns the size of a file in bytes; None for a missing file."""
    where = place(url)
    if isinstance(where, Path):
        return where.stat().st_size if where.is_file() else None
    system, path = filesystem(where)
    return retried(lambda: system.size(path) if system.exists(path) else None, where)


def states(names: Iterable[str | None]) -> str:
    """Digests the sizes and modification times of local files (or that they are missing), and the names alone of URLs."""
    digest = hashlib.blake2b(digest_size=16)
    for name in names:
        if name is None:
            continue
        state = "-"
        if (path := local_path(name)) is not None:
            with suppress(OSError, ValueError):
                status = os.stat(path)
                state = f"{status.st_size} {status.st_mtime_ns}"
        digest.update(_encoded(f"{name}\0{state}\0"))
    return digest.hexdigest()


def _encoded(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate that does not stand for a byte
        return text.encode("utf-8", "surrogatepass")


def make_folder(url: str | Path) -> None:
    """Creates a local folder with its parents; object stores need none."""
    if isinstance(where := place(url), Path):
        where.mkdir(parents=True, exist_ok=True)


def listing(url: str | Path) -> list[str]:
    """Returns the full names of the files and folders in a folder, sorted; [] for a missing folder."""
    where = place(url)
    if isinstance(where, Path):
        return sorted(str(path) for path in where.iterdir()) if where.is_dir() else []
    system, path = filesystem(where)

    def names() -> list[str]:
        system.invalidate_cache()
        return system.ls(path, detail=False) if system.exists(path) and system.isdir(path) else []

    return sorted(join(where, name.rstrip("/").rpartition("/")[2]) for name in retried(names, where))


def walk(url: str | Path) -> Iterator[str]:
    """Yields the names of all files below a folder, relative to it with /, sorted by their parts; without hidden ones.

    Memory holds the names of one local folder at a time, but all names below a URL. Symbolic links are followed, except to
    a parent folder.
    """
    where = place(url)
    if isinstance(where, Path):
        yield from folders.walk(where)
        return
    system, path = filesystem(where)
    below = path.strip("/") + "/"
    names = [name.lstrip("/").removeprefix(below) for name in retried(lambda: system.find(path), where)]
    yield from sorted((name for name in names if not name.startswith(".") and "/." not in name), key=lambda name: name.replace("/", "\0"))


@contextmanager
def local(url: str | Path) -> Iterator[Path]:
    """Provides a local file with the content: the file itself, or a temporary copy of a remote one."""
    where = place(url)
    if isinstance(where, Path):
        yield where
        return
    system, path = filesystem(where)
    with tempfile.TemporaryDirectory(prefix="data_prep-") as folder:
        copy = Path(folder) / (where.rpartition("/")[2] or "file")
        size = retried(lambda: system.size(path), where)

        def fetch() -> None:
            system.get_file(path, str(copy))
            if size is not None and copy.stat().st_size != size:
                raise OSError(f"received {copy.stat().st_size} bytes, expected {size}")

        retried(fetch, where)
        yield copy


def put(path: Path, url: str | Path) -> None:
    """Moves a finished local file to its name, atomically: by renaming within one file system, else by copying."""
    where = place(url)
    if isinstance(where, Path):
        try:
            os.replace(path, where)
        except OSError:  # another file system
            with path.open("rb") as source:
                write_atomically(where, lambda file: shutil.copyfileobj(source, file, 1 << 20))
            path.unlink()
        return
    system, target = filesystem(where)
    retried(lambda: system.put_file(str(path), target), where)
    path.unlink()


def remove(url: str | Path) -> None:
    """Deletes a file if it exists."""
    where = place(url)
    if isinstance(where, Path):
        where.unlink(missing_ok=True)
        return
    system, path = filesystem(where)
    retried(lambda: system.rm_file(path) if system.exists(path) else None, where)


def write_text(url: str | Path, text: str) -> None:
    """Writes UTF-8 text atomically.

    Lone surrogates, which stand for file names that are not UTF-8, are written as escapes that JSON reads back.
    """
    where, encoded = place(url), text.encode("utf-8", "backslashreplace")
    if isinstance(where, Path):
        write_atomically(where, encoded)
        return
    system, path = filesystem(where)
    retried(lambda: system.pipe_file(path, encoded), where)


def write_lines(url: str | Path, lines: Iterable[str]) -> None:
    """Writes lines as `write_text` does, without holding them all in memory."""
    where = place(url)

    def write(file: BinaryIO) -> None:
        file.writelines(line.encode("utf-8", "backslashreplace") for line in lines)

    if isinstance(where, Path):
        write_atomically(where, write)
        return
    with tempfile.TemporaryDirectory(prefix="data_prep-") as folder:
        path = Path(folder) / "text"
        write_atomically(path, write)
        put(path, url)


def write_json(url: str | Path, value: Any) -> None:
    write_text(url, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
