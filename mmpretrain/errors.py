"""Errors whose message is for the user. Entry points catch their base alone, so that a bug keeps its traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar


class MMPretrainError(Exception):
    """An expected failure. The message states what failed, where, and the remedy."""

    status: ClassVar[int] = 1  # exit status of the process; 2: the caller's mistake


class ModelError(MMPretrainError, ValueError):
    """A model that cannot be built, or weights that cannot be read or do not fit it."""


class UnsuitableModelError(MMPretrainError, TypeError):
    """A model that lacks what is asked of it, such as a text tower."""


class NotFiniteError(MMPretrainError, RuntimeError):
    """A model whose outputs hold a NaN or an infinity."""


class HangError(MMPretrainError, TimeoutError):
    """A read or a decoder that does not come back. Its thread cannot be ended, so the process must exit without waiting for threads."""


class FileError(MMPretrainError, OSError):
    """A file that the operating system cannot read or write: missing, forbidden, on a full disk."""


class MissingFileError(FileError, FileNotFoundError):
    """A file or folder that does not exist."""


@contextmanager
def file_errors() -> Iterator[None]:
    """Raises an OSError of the operating system as a FileError with the same text; also a decorator.

    Any call that touches a file may fail so, whatever is wrong with the disk, and none of it is a bug. An OSError without an error number
    was not raised by the system, and stays as it is.
    """
    try:
        yield
    except MMPretrainError:
        raise
    except OSError as error:
        if error.errno is None:
            raise
        kind = MissingFileError if isinstance(error, FileNotFoundError) else FileError
        raise kind(error.errno, error.strerror, error.filename, None, error.filename2) from error
