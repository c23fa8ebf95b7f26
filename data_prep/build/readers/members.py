"""What every reader makes samples of: image bytes, captions, metadata, keys; each refuses what cannot be used with a BadSample."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from data_prep import files
from data_prep.build.readers.base import caption_text, extension_of, safe
from data_prep.records import InputError, Record, Skipped
from mmpretrain.data.schema import IMAGE_EXTENSIONS, SAFE_KEY, BadSample, ShardError
from mmpretrain.data.shard_names import is_remote

IMAGE_SUFFIXES = frozenset(f".{extension}" for extension in IMAGE_EXTENSIONS) - {".avif", ".img"}  # of files that are taken for images


def attempt(where: str, make: Callable[[], Record]) -> Record | Skipped:
    """The record, or why there is none."""
    try:
        return replace(make(), where=printable(where))
    except BadSample as error:
        return Skipped(printable(where), error.reason, printable(error.detail))


def printable(text: str) -> str:
    """File names that are not UTF-8 are written as such nowhere."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def some(names: Iterable[object], most: int = 50) -> str:
    """Names for a message, which stays one that can be read; what is not UTF-8 in them is replaced."""
    given = [printable(str(name)) for name in names]
    return ", ".join(given[:most]) + (f" and {len(given) - most} more" if len(given) > most else "")


def image_member(data: bytes, what: str) -> tuple[str, bytes]:
    """(extension by content, the bytes as they are). Raises BadSample: unknown_format."""
    extension = extension_of(data)
    if extension is None:
        found = f"it begins with {bytes(data[:12])!r}" if data else "it is empty"
        raise BadSample("unknown_format", f"{what} is no image that is read: {found}")
    return extension, data


def read(url: str, reason: str = "missing_image") -> bytes:
    """A file's bytes. Raises BadSample: `reason`, also for a pipe or a device, which inputs may name and which has no end."""
    try:
        if (path := files.local_path(url)) is not None:
            mode = os.stat(path).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise BadSample(reason, f"{url}: a pipe, a device or a socket, expected a file")
        return files.read_bytes(url)
    except MemoryError as error:
        raise BadSample(reason, f"{url}: larger than the memory that is free") from error
    except (OSError, ShardError, ValueError) as error:
        raise BadSample(reason, f"{url}: {getattr(error, 'strerror', None) or error}") from error


def read_image(url: str) -> tuple[str, bytes]:
    return image_member(read(url), url)


def inside(base: str, name: str) -> str:
    """`base`/`name`, which an annotation file names: never a place outside `base`. Raises BadSample: bad_path."""
    name = name.replace("\\", "/")
    plain = posixpath.normpath(name)
    if not name or "\0" in name or is_remote(name) or plain.startswith(("/", "../")) or plain in ("..", "."):
        raise BadSample("bad_path", f"{name!r} does not lie in {base}")
    return files.join(base, plain)


def text_member(text: str, what: str) -> bytes:
    """A caption as UTF-8 in NFC without outer white space. Raises BadSample: empty_caption, not_utf8."""
    try:
        return caption_text(text).encode()
    except BadSample as error:
        raise BadSample(error.reason, f"{what}: {error.detail}" if error.detail else what) from error


def caption_members(texts: Iterable[str], several: bool, metadata: dict[str, Any], what: str) -> dict[str, bytes]:
    """`txt` is the first caption; where `several`, all different ones are in the json's `captions`. Empty ones are left out.

    Raises BadSample: empty_caption where all are, not_utf8 for lone surrogates.
    """
    kept = list(dict.fromkeys(text_member(text, what) for text in texts if text.strip()))
    if not kept:
        raise BadSample("empty_caption", what)
    if several:
        metadata["captions"] = [text.decode() for text in kept]
    return {"txt": kept[0]}


def json_member(value: dict[str, Any]) -> bytes:
    """Raises BadSample: bad_metadata for what JSON in UTF-8 cannot hold, not_utf8 for text that is none."""
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise BadSample("not_utf8", str(error)[:200]) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise BadSample("bad_metadata", str(error)[:200]) from error


def path_key(relative: str, shared: bool = False) -> str:
    """A key from a file's path without its suffix. One that had to be changed, or is `shared`, gets its digest, which keeps keys apart."""
    stem = str(PurePosixPath(relative).with_suffix(""))
    if not shared and len(stem.encode("utf-8", "surrogateescape")) <= 100 and SAFE_KEY.fullmatch(stem):
        return stem
    digest = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    return f"{safe(stem) or 'image'}_{digest}"


def class_names(labels: Iterable[Any], what: str) -> tuple[str, ...] | None:
    """The sorted names among labels, or None where all are numbers or digits. Raises InputError where they are mixed."""
    names: set[str] = set()
    numbers = 0
    for label in labels:
        if isinstance(label, str) and label.strip():
            names.add(label.strip())
        elif isinstance(label, int) and not isinstance(label, bool):
            numbers += 1
    if numbers and not all(name.isdecimal() for name in names):
        raise InputError(f"{what} holds names ({sorted(names)[-1]!r}) and {numbers} numbers. Make it all names, or all class indices.")
    return None if all(name.isdecimal() for name in names) else tuple(sorted(names))


def label_member(value: Any, classes: Mapping[str, int] | None, what: str) -> bytes:
    """The class index as digits. Raises BadSample: missing_label, bad_label."""
    if value is None or value == "":
        raise BadSample("missing_label", what)
    if isinstance(value, str) and classes is not None:
        if value.strip() not in classes:
            near = ", ".join(list(classes)[:5]) + (", ..." if len(classes) > 5 else "")
            raise BadSample("bad_label", f"{what} holds {value!r}, not among the {len(classes)} classes {near}")
        return str(classes[value.strip()]).encode()
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (classes is not None and value >= len(classes)):
        limit = "an index of 0 or more" if classes is None else f"an index below {len(classes)}"
        raise BadSample("bad_label", f"{what} holds {value!r}, expected {limit}")
    return str(value).encode()
