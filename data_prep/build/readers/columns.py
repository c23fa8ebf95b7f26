"""The mapping from columns of a row to members of a sample, shared by all tables: csv, jsonl, tsv, parquet, datasets.

Captions are those of mmpretrain.data.captions: a column, or a template over columns in braces.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from data_prep import files
from data_prep.build.readers.base import safe
from data_prep.build.readers.members import caption_members, image_member, json_member, label_member, read
from data_prep.records import InputError, Record
from mmpretrain.data.captions import CaptionTemplate, cell_text, lookup
from mmpretrain.data.schema import BadSample
from mmpretrain.data.shard_names import is_remote
from mmpretrain.data.tables import slashed, some

_DATA_URI = re.compile(r"data:image/[\w.+-]+;base64,")


@dataclass(frozen=True)
class BadCell:
    """Stands in a row for a value that cannot be read."""

    detail: str


CELL_ERRORS = (ArithmeticError, LookupError, TypeError, ValueError)  # of values that Python cannot hold, such as far dates


@dataclass(frozen=True)
class Columns:
    """The columns that a sample is made of.

    `root` is the folder that image paths are relative to and must not leave, except into one of `folders`.
    """

    image: str = "image"
    captions: tuple[str, ...] = ()
    key: str | None = None
    label: str | None = None
    classes: tuple[str, ...] | None = None
    extra: tuple[str, ...] = ()
    join: tuple[tuple[str, str], ...] = ()
    base64: bool = False
    root: str = ""
    folders: tuple[str, ...] = ()
    table: str | None = field(default=None, repr=False)  # the table's folder, which `../` may lead out of where `root` allows it

    @cached_property
    def texts(self) -> list[CaptionTemplate]:
        """The parsed captions."""
        return [CaptionTemplate.parse(caption) for caption in self.captions]

    @cached_property
    def numbers(self) -> dict[str, int] | None:
        """Class name -> index; None where there are no names."""
        return None if self.classes is None else {name: i for i, name in enumerate(self.classes)}

    def wanted(self) -> dict[str, str]:
        """Returns column -> the option that names it."""
        options = {self.image: "--image-column"}
        for caption in self.texts:
            options |= dict.fromkeys(caption.columns, "--caption")
        options |= {name: option for name, option in ((self.key, "--key-column"), (self.label, "--label-column")) if name}
        return options | dict.fromkeys(self.extra, "--extra") | {name: "--join" for name, _ in self.join}

    def top(self, existing: Collection[str]) -> list[str]:
        """Returns the columns that must be read, `a` for `a.b`."""
        return list(dict.fromkeys(c if c in existing else c.partition(".")[0] for c in self.wanted()))

    def check(self, existing: Collection[str], what: str) -> None:
        """Raises InputError for a missing column, with the existing ones; `what` names the table."""
        for column, option in self.wanted().items():
            if column not in existing and column.partition(".")[0] not in existing:
                raise InputError(f"{what} has no column {column!r} ({option}); it has {some(existing) or 'none'}")

    def image_bytes(self, value: Any) -> bytes:
        """Returns the image file that a cell holds: bytes, {bytes, path}, base64 text or a path. Raises BadSample."""
        value = _held(value)
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        if value is None or value == "":
            raise BadSample("missing_image", f"column {self.image} is empty")
        if not isinstance(value, str):
            raise BadSample("bad_image", f"column {self.image} holds {type(value).__name__}, expected bytes, base64 text or a path")
        uri = _DATA_URI.match(value[:100])
        if self.base64 or uri:
            try:
                return base64.b64decode("".join(value[uri.end() if uri else 0 :].split()), validate=True)
            except (binascii.Error, ValueError) as error:
                raise BadSample("bad_base64", f"column {self.image}, which begins with {value[:24]!r}: {error}") from error
        return read(self._place(value))

    def _place(self, path: str) -> str:
        if is_remote(path) and not (is_remote(self.root) and path.startswith(self.root)):
            raise BadSample("not_local", f"{path[:200]}: images are not downloaded. Fetch them first, e.g. with img2dataset")
        if len(path) > 4000 or "\0" in path:
            raise BadSample("bad_path", f"column {self.image} holds {len(path)} characters, {path[:24]!r} ...: for base64 pass --base64")
        if is_remote(self.root):
            path = path if "/" in path else path.replace("\\", "/")
            if ".." in path.split("/") or (path.startswith("/") and not is_remote(path)):
                raise BadSample("outside_root", f"{path[:200]} does not lie in {self.root}; see --root")
            return path if is_remote(path) else files.join(self.root, path)
        try:
            os.fsencode(path)
        except UnicodeEncodeError as error:
            raise BadSample("bad_path", f"column {self.image} holds {path[:200]!r}, which no file can be called") from error
        root = str(files.place(self.root or "."))
        path = slashed(root, path)
        if ".." not in path and not path.startswith("/"):
            return files.join(self.root, path)
        places = [os.path.join(root, path)]
        if self.table is not None and not path.startswith("/"):
            places.append(os.path.join(files.place(self.table or "."), path))
        folders = [str(files.place(folder)) for folder in (self.root or ".", *self.folders)]
        allowed = [place for place in places if any(_inside(folder, place) for folder in folders)]
        if not allowed:
            remedy = "if it is yours to read, pass --root with a folder that holds it"
            raise BadSample("outside_root", f"{path[:200]} does not lie in {self.root or '.'}: {remedy}")
        return next((place for place in allowed if os.path.exists(place)), allowed[0])

    def source(self, row: Mapping[str, Any]) -> str | None:
        """Returns the image file that a row names; None where it names none that may be read."""
        value = _held(lookup(row, self.image))
        if not isinstance(value, str) or not value or self.base64 or _DATA_URI.match(value[:100]):
            return None
        try:
            return self._place(value)
        except BadSample:
            return None

    def record(self, number: int, row: Mapping[str, Any]) -> Record:
        """Makes the record of row `number`; its key is the number, followed by the text of the key column. Raises BadSample."""
        for column, value in row.items():
            if isinstance(value, BadCell):
                raise BadSample("bad_cell", f"column {column} cannot be read: {value.detail}")
        if self.image not in row and lookup(row, self.image) is None:
            raise BadSample("missing_column", f"no {self.image!r}, but {', '.join(map(str, row))}"[:300])
        metadata: dict[str, Any] = {column: _plain(lookup(row, column)) for column in self.extra}
        members: dict[str, bytes] = {}
        if self.texts:  # before the image: captions are cheaper to refuse
            join = dict(self.join)
            several = len(self.texts) > 1 or any(t.plain and isinstance(lookup(row, t.plain), list | tuple) for t in self.texts)
            captions = [text for caption in self.texts for text in caption.fill(row, join)]
            columns = ", ".join(column for caption in self.texts for column in caption.columns)
            members |= caption_members(captions, several, metadata, f"of {columns}")
        if self.label is not None:
            members["cls"] = label_member(lookup(row, self.label), self.numbers, f"column {self.label}")
        if metadata:
            members["json"] = json_member(metadata)
        extension, data = image_member(self.image_bytes(lookup(row, self.image)), f"column {self.image}")
        suffix = safe(cell_text(lookup(row, self.key), self.key, None)) if self.key else ""
        return Record(f"{number:08d}" + (f"_{suffix}" if suffix else ""), members | {extension: data})


def _held(value: Any) -> Any:
    """Returns the bytes of {bytes, path}, or else the path; other values as they are."""
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        return value.get("bytes") if value.get("bytes") is not None else value.get("path")
    return value


def _inside(folder: str, path: str) -> bool:
    """Returns whether a path lies in a folder, by name or with links resolved."""
    return any(os.path.commonpath([resolve(folder), resolve(path)]) == resolve(folder) for resolve in (os.path.abspath, os.path.realpath))


def _plain(value: Any) -> Any:
    """Converts a value for JSON: NaN to null, dates and decimals to text. Raises BadSample: bad_metadata for bytes."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bytes):
        raise BadSample("bad_metadata", "bytes do not go into the json member; leave that column out of --extra")
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
