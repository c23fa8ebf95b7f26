"""Members and keys of samples, for all readers: images, captions, labels, metadata. Unusable input raises BadSample."""

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
from mmpretrain.data.fields import MAX_CAPTION_BYTES
from mmpretrain.data.formats import clean_texts, foreign_kind, is_utf8, printable
from mmpretrain.data.schema import IMAGE_EXTENSIONS, SAFE_KEY, BadSample, ShardError
from mmpretrain.data.shard_names import is_remote
from mmpretrain.data.tables import distinct_integers

IMAGE_SUFFIXES = frozenset(f".{extension}" for extension in IMAGE_EXTENSIONS) - {".img"}  # of files that are taken for images


def attempt(where: str, make: Callable[[], Record]) -> Record | Skipped:
    """Returns the record that `make` makes, or for a BadSample a Skipped with its reason; `where` is the input."""
    try:
        return replace(make(), where=printable(where))
    except BadSample as error:
        return Skipped(printable(where), error.reason, printable(error.detail))


def image_member(data: bytes, what: str) -> tuple[str, bytes]:
    """Returns (extension by content, data). Raises BadSample: unknown_format; `what` names the image."""
    extension = extension_of(data)
    if extension is None:
        begin = f"it begins with {bytes(data[:12])!r}" if data else "it is empty"
        noun, remedy = foreign_kind(data) or ("", "")
        kind = f"{noun}, not an image of a known format" if noun else "not an image of a known format"
        raise BadSample("unknown_format", f"{what} is {kind}: {begin}" + (f". {remedy}" if remedy else ""))
    return extension, data


def read(url: str, reason: str = "missing_image") -> bytes:
    """Reads a file. Raises BadSample: `reason`, also for a pipe or device, which inputs may name and which has no end."""
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
    """Reads an image file; returns (extension by content, data). Raises BadSample."""
    return image_member(read(url), url)


def inside(base: str, name: str) -> str:
    """Returns `base`/`name` for a name from an annotation file. Raises BadSample: bad_path outside `base`."""
    name = name.replace("\\", "/")
    plain = posixpath.normpath(name)
    if not name or "\0" in name or is_remote(name) or plain.startswith(("/", "../")) or plain in ("..", "."):
        raise BadSample("bad_path", f"{name!r} does not lie in {base}")
    return files.join(base, plain)


def text_member(text: str, what: str) -> bytes:
    """Encodes a caption: UTF-8 in NFC without outer white space. Raises BadSample: empty_caption, not_utf8, too_many_bytes."""
    try:
        data = caption_text(text).encode()
    except BadSample as error:
        raise BadSample(error.reason, f"{what}: {error.detail}" if error.detail else what) from error
    if len(data) > MAX_CAPTION_BYTES:
        raise BadSample("too_many_bytes", f"{what}: a caption of {len(data)} bytes, training reads up to {MAX_CAPTION_BYTES}")
    return data


def caption_members(texts: Iterable[str], several: bool, metadata: dict[str, Any], what: str) -> dict[str, bytes]:
    """Makes the txt member of captions: the first one. Empty captions are ignored.

    Args:
        texts: the captions.
        several: also add all different captions to the metadata, as `captions`.
        metadata: the content of the json member; changed in place.
        what: names the captions in errors.

    Raises:
        BadSample: empty_caption where all are empty, not_utf8 for lone surrogates, too_many_bytes for the first caption.
    """
    try:
        kept = list(dict.fromkeys(clean_texts(texts)))
    except BadSample as error:
        raise BadSample(error.reason, f"{what}: {error.detail}") from error
    if not kept:
        raise BadSample("empty_caption", what)
    if several:
        metadata["captions"] = kept
    return {"txt": text_member(kept[0], what)}


def json_member(value: dict[str, Any]) -> bytes:
    """Encodes the json member. Raises BadSample: bad_metadata for values that JSON cannot hold, not_utf8 for lone surrogates."""
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise BadSample("not_utf8", str(error)[:200]) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise BadSample("bad_metadata", str(error)[:200]) from error


def path_key(relative: str, shared: bool = False) -> str:
    """Makes a key from the path of a file, without its suffix.

    Args:
        relative: the path in its folder.
        shared: another file has the same key.

    Returns:
        The path where it is a safe key and not shared; else a safe form with a digest, which keeps keys different.
    """
    stem = str(PurePosixPath(relative).with_suffix(""))
    if not shared and len(stem.encode("utf-8", "surrogateescape")) <= 100 and SAFE_KEY.fullmatch(stem):
        return stem
    digest = hashlib.sha256(relative.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    return f"{safe(stem) or 'image'}_{digest}"


def class_names(labels: Iterable[Any], what: str) -> tuple[str, ...] | None:
    """Returns the sorted names among labels; None where all are numbers or digits, each number spelt in one way.

    Raises InputError where names and numbers are mixed.
    """
    names: set[str] = set()
    numbers: set[int] = set()
    for label in labels:
        if isinstance(label, str) and label.strip() and is_utf8(label):
            names.add(label.strip())
        elif isinstance(label, int) and not isinstance(label, bool):
            numbers.add(label)
    # 007 and 7 are two classes
    indices = all(name.isdecimal() for name in names) and distinct_integers(names | {str(number) for number in numbers})
    if numbers and not indices:
        raise InputError(f"{what} holds names ({sorted(names)[-1]!r}) and {len(numbers)} numbers. Make it all names, or all class indices.")
    return None if indices else tuple(sorted(names))


def label_member(value: Any, classes: Mapping[str, int] | None, what: str) -> bytes:
    """Encodes a label as the digits of its class index.

    Args:
        value: a class name or index.
        classes: name -> index; None: there are only indices.
        what: names the label in errors.

    Raises:
        BadSample: missing_label, bad_label.
    """
    if value is None or value == "":
        raise BadSample("missing_label", what)
    if isinstance(value, str) and not is_utf8(value):
        raise BadSample("not_utf8", f"{what} holds {value[:50]!r}")
    if isinstance(value, str) and classes is not None:
        if value.strip() not in classes:
            near = ", ".join(list(classes)[:5]) + (", ..." if len(classes) > 5 else "")
            raise BadSample("bad_label", f"{what} holds {value!r}, not among the {len(classes)} classes {near}")
        return str(classes[value.strip()]).encode()
    if isinstance(value, str) and value.strip().isdecimal() and len(value.strip()) < 20:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0 or (classes is not None and value >= len(classes)):
        limit = "an index of 0 or more" if classes is None else f"an index below {len(classes)}"
        raise BadSample("bad_label", f"{what} holds {str(value)[:50]!r}, expected {limit}")
    return str(value).encode()
