"""Warnings of image libraries: the first of each kind is logged, with its text; a data set of a million images repeats few kinds."""

from __future__ import annotations

import ctypes
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from PIL import Image

log = logging.getLogger(__name__)

MAX_KINDS = 30  # logged by a process; texts hold bytes of the file, and a hostile set could vary them without end
_TEXT = 300  # characters of a message

_thread = threading.local()  # .messages: the list of the block that this thread is in
_kinds: set[str] = set()
_lock = threading.Lock()
_show = warnings.showwarning


def _collect(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    """`warnings.showwarning`, which `warnings.catch_warnings` cannot stand in for: loaders decode in several threads."""
    messages = getattr(_thread, "messages", None)
    if messages is None:
        _show(message, category, filename, lineno, file, line)
    elif not issubclass(category, Image.DecompressionBombWarning):  # `ImageLimits` judges sizes
        messages.append(f"Pillow: {message}")


warnings.showwarning = _collect


@cache
def _libtiff_handler() -> Any:
    """Has libtiff's errors collected rather than printed on stderr; None where its library cannot be reached."""
    try:
        libtiff, libc = ctypes.CDLL(str(Image.core.__file__)), ctypes.CDLL(None)
        set_handler, vsnprintf = libtiff.TIFFSetErrorHandler, libc.vsnprintf
    except (AttributeError, OSError, TypeError):
        return None
    set_handler.restype, set_handler.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    vsnprintf.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_void_p]

    @ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)
    def handler(module: bytes | None, form: bytes, values: int) -> None:  # values: a va_list
        text = ctypes.create_string_buffer(_TEXT)
        vsnprintf(text, _TEXT, form, values)
        where = "" if module in (None, b"tempfile.tif") else f"{module.decode('latin-1')}: "  # Pillow's name for what is in memory
        line = f"libtiff: {where}{text.value.decode('latin-1')}"
        messages = getattr(_thread, "messages", None)
        if messages is None:
            log.warning("%s", line)
        else:
            messages.append(line)

    set_handler(ctypes.cast(handler, ctypes.c_void_p))
    return handler  # kept alive by the cache: libtiff calls it as long as the process runs


@contextmanager
def collected(tiff: bool = False) -> Iterator[list[str]]:
    """The messages of image libraries in this block, by this thread. When it ends without an exception, kinds not seen before are logged.

    Args:
        tiff: whether libtiff may decode in the block.
    """
    if tiff:
        _libtiff_handler()
    outer = getattr(_thread, "messages", None)
    messages: list[str] = []
    _thread.messages = messages
    try:
        yield messages
    finally:
        _thread.messages = outer
    for message in messages:
        _log_once(" ".join(message.split())[:_TEXT])


def _log_once(message: str) -> None:
    kind = re.sub(r"\d+", "0", message)
    with _lock:
        if kind in _kinds or len(_kinds) > MAX_KINDS:
            return
        _kinds.add(kind)
        last = len(_kinds) > MAX_KINDS
    if last:
        log.warning("image libraries gave %d kinds of warnings in this process; further kinds are not logged", MAX_KINDS)
    else:
        log.warning("an image was decoded with a warning (the first of its kind in this process is shown): %s", message)
