"""Captions and labels of a sample: a member (`txt`, `cls`) or a field of a JSON member (`json:caption`). Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmpretrain.config.build import OptionError
from mmpretrain.data.formats import clean_text, clean_texts, decode_text
from mmpretrain.data.index import Member
from mmpretrain.data.schema import BadSample

MAX_CAPTION_BYTES = 1 << 16  # of a member that is a caption or a label


@dataclass(frozen=True)
class FieldName:
    """The location of a caption or label: a member, or `key` of a member that holds a JSON object."""

    member: str
    key: str | None = None

    @classmethod
    def parse(cls, text: str) -> FieldName:
        """Parse `txt`, `cls` or `json:FIELD`.

        Raises:
            OptionError: a member or field without a name.
        """
        member, colon, key = text.partition(":")
        if not member or (colon and not key):
            raise OptionError(f"{text!r} names no field: expected a member such as txt or cls, or json:FIELD such as json:caption")
        return cls(member, key if colon else None)

    def __str__(self) -> str:
        return self.member if self.key is None else f"{self.member}:{self.key}"


def member_of(text: str) -> str:
    """Return the member that `txt` or `json:FIELD` is read from."""
    return FieldName.parse(text).member


def place_of(members: Mapping[str, Member], extension: str | None, limit: int) -> Member:
    """Return the location of a sample's member.

    Args:
        members: extension -> location.
        extension: of the member; None: an image that is missing.
        limit: greatest size in bytes.

    Raises:
        BadSample: missing_field, too_many_bytes.
    """
    if extension is None or extension not in members:
        raise _missing(extension or "image", members)
    if members[extension].size > limit:
        raise BadSample("too_many_bytes", f"{extension} has {members[extension].size} bytes, the limit is {limit}")
    return members[extension]


class Fields:
    """The captions and labels of one sample, each member read and each JSON object parsed at most once.

    Args:
        read: (extension, limit in bytes) -> the member's bytes. Raises BadSample for a missing member.
        max_member_bytes: limit of a JSON member.
    """

    def __init__(self, read: Callable[[str, int], bytes], max_member_bytes: int) -> None:
        self._read, self._max_member_bytes = read, max_member_bytes
        self._objects: dict[str, dict[str, Any]] = {}

    @classmethod
    def placed(cls, members: Mapping[str, Member], read: Callable[[Member], bytes], max_member_bytes: int) -> Fields:
        """Make the fields of members in a shard, which `read` reads."""
        return cls(lambda extension, limit: read(place_of(members, extension, limit)), max_member_bytes)

    @classmethod
    def of(cls, members: Mapping[str, bytes]) -> Fields:
        """Make the fields of members in memory, of any size."""

        def read(extension: str, limit: int) -> bytes:
            if extension not in members:
                raise _missing(extension, members)
            return members[extension]

        return cls(read, 0)

    def json(self, extension: str = "json") -> dict[str, Any]:
        """Return the object in a JSON member. Raises BadSample."""
        if extension not in self._objects:
            self._objects[extension] = decode_json(self._read(extension, self._max_member_bytes))
        return self._objects[extension]

    def value(self, name: str) -> Any:
        """Return a member's text, or the value of a JSON object's key. Raises BadSample: missing_field and those of the decoders."""
        field = FieldName.parse(name)
        if field.key is None:
            return decode_text(self._read(field.member, MAX_CAPTION_BYTES))
        values = self.json(field.member)
        if field.key not in values:
            raise _missing(name, values)
        return values[field.key]

    def captions(self, name: str, lines: bool = False) -> list[str]:
        """Return the captions of a field, at least one. `lines`: every line of a text is a caption. Raises BadSample."""
        value = self.value(name)
        if lines and isinstance(value, str):
            return captions_from(value.split("\n"), name)
        return [value] if FieldName.parse(name).key is None else captions_from(value, name)

    def label(self, name: str, classes: Mapping[str, int] | None) -> int:
        """Return a field as a class index; `classes`: name -> index. Raises BadSample."""
        return label_from(self.value(name), classes, name)


def _missing(name: str, existing: Mapping[str, Any]) -> BadSample:
    return BadSample("missing_field", f"{name}; it has {', '.join(sorted(existing))[:200]}")


def decode_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises BadSample: bad_json."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error)[:200]) from error
    if not isinstance(value, dict):
        raise BadSample("bad_json", f"expected an object, found {type(value).__name__}")
    return value


def captions_from(value: Any, what: str) -> list[str]:
    """Return the captions in a string, or in a list of strings without empty ones. Raises BadSample; `what` is for the message."""
    if isinstance(value, str):
        return [clean_text(value)]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise BadSample("bad_caption", f"{what} holds {type(value).__name__}, expected text or a list of texts")
    texts = clean_texts(value)
    if not texts:
        raise BadSample("empty_caption", what)
    return texts


def label_from(value: Any, classes: Mapping[str, int] | None, what: str) -> int:
    """Return the class index of a number, its digits, or a class name. Raises BadSample: bad_label; `what` is for the message."""
    if isinstance(value, bytes):
        value = decode_text(value)
    if isinstance(value, str) and classes is not None and value in classes:
        return classes[value]
    try:
        if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
            raise ValueError
        label = int(value)
    except (TypeError, ValueError):
        known = "and the source has no `classes:`" if classes is None else f"not among its {len(classes)} classes"
        raise BadSample("bad_label", f"{what} holds {value!r}, neither an index {known}") from None
    if label < 0 or (classes is not None and label >= len(classes)):
        raise BadSample(
            "bad_label", f"{what} holds {label}, " + ("expected at least 0" if classes is None else f"there are {len(classes)} classes")
        )
    return label
