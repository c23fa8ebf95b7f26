"""Atomic file writes: a file is complete or absent, even after a crash of the machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def flush(path: Path | str) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path | str, content: str | bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file so that readers see all of the old content or all of the new.

    It is written under a temporary name beside `path`, synced to disk and renamed.

    Args:
        path: replaced where it exists. Temporary names begin with its name and `.tmp-`.
        content: text, written as UTF-8; bytes; or a function that writes to a given file.

    Raises:
        OSError: the file cannot be written. As for any error of `content`, `path` is unchanged and no temporary file
            remains.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.tmp-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
