"""What one sample's members hold: can training use them?"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

from mmpretrain.data import decode
from mmpretrain.data.decode import ImageLimits
from mmpretrain.data.index import Member
from mmpretrain.data.schema import IMAGE_EXTENSIONS, LABEL_EXTENSION, METADATA_EXTENSION, BadSample, image_extension
from mmpretrain.data.source import MAX_CAPTION_BYTES
from mmpretrain.data.tar import read_at

# Members that readers' default decoders run as code (pickles), and those that have no business in a data set.
EXECUTABLE = frozenset(
    ["pyd", "pickle", "pkl", "pth", "pt", "dill", "joblib", "py", "pyc", "so", "dll", "exe", "sh", "bat", "com", "cmd", "ps1", "jar"]
)
COMPRESSED = frozenset(["gz", "bz2", "xz", "zst", "zip"])
EXTENSION = re.compile(r"[a-z0-9_+-]+(\.[a-z0-9_+-]+)*")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
_HEAD = 2048  # bytes in which an image's format, and mostly its size, can be seen

Found = tuple[str, int, str]  # kind, offset, detail


@dataclass(frozen=True)
class Checks:
    """What is asked of every sample."""

    need: tuple[str, ...] = ()  # extensions; "image" stands for any image
    caption: str = "txt"  # the member that holds it, or json:FIELD
    decode: bool = True
    checksums: bool = True
    limits: ImageLimits = field(default_factory=ImageLimits)
    max_member_bytes: int = 64 << 20


class Members:
    """A sample's members, each read once."""

    def __init__(self, file: int, places: dict[str, Member]) -> None:
        self.places, self._file, self._read = places, file, {}

    def __call__(self, extension: str) -> bytes:
        """Raises BadSample where the bytes are not there or the disk fails."""
        if extension not in self._read:
            member = self.places[extension]
            self._read[extension] = self.head(extension, member.size)
        return self._read[extension]

    def head(self, extension: str, size: int) -> bytes:
        member = self.places[extension]
        try:
            return read_at(self._file, member.offset, min(size, member.size))
        except OSError as error:
            raise BadSample("unreadable", f"{extension}: {error}") from error


def _dimensions(kind: str, data: bytes) -> tuple[int, int]:
    """(width, height) without decoding a pixel."""
    if kind == "jpeg" and (header := decode.jpeg_header(data)) is not None:
        return header[0], header[1]
    if kind == "png" and len(data) >= 24:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    try:
        with Image.open(io.BytesIO(data), formats=[decode.PILLOW_FORMATS[kind]]) as image:
            return image.size
    except Image.DecompressionBombError as error:
        raise BadSample("too_many_pixels", str(error)) from error
    except (Exception, MemoryError) as error:  # decoders raise all sorts over hostile bytes
        raise BadSample("undecodable_image", f"{kind}: {' '.join(str(error).split())[:200]}") from error


def _image(members: Members, extension: str, checks: Checks) -> None:
    if checks.decode:
        decode.decode_image(members(extension), checks.limits)
        return
    head = members.head(extension, _HEAD)
    kind = decode.sniff(head)
    if kind is None:
        raise BadSample("unknown_format", f"begins with {head[:12]!r}; decoded are {', '.join(decode.PILLOW_FORMATS)}")
    seen = kind == "png" or (kind == "jpeg" and decode.jpeg_header(head) is not None)
    checks.limits.check(*_dimensions(kind, head if seen else members(extension)))


def _caption(members: Members, caption: str) -> str:
    extension, _, name = caption.partition(":")
    if not name:
        return decode.decode_text(members(extension))
    fields = decode.decode_json(members(extension))
    if name not in fields:
        raise BadSample("missing_field", f"{caption}; it has {', '.join(sorted(fields))[:200]}")
    return "\n".join(decode.captions_from(fields[name], caption))


def _content(members: Members, extension: str, checks: Checks, image: str | None) -> Iterator[Found]:
    member = members.places[extension]
    if checks.checksums and member.checksum is not None and not member.holds(members(extension)):
        raise BadSample("checksum", f"{extension}: the {member.size} bytes at {member.offset} are not those that the index was written for")
    if extension == checks.caption.partition(":")[0]:
        if ":" not in checks.caption and member.size > MAX_CAPTION_BYTES:
            raise BadSample("too_many_bytes", f"{extension} has {member.size} bytes, the limit is {MAX_CAPTION_BYTES}")
        if control := _CONTROL.search(_caption(members, checks.caption)):
            yield "control_characters", member.offset, f"{extension} holds U+{ord(control[0]):04X}"
    elif extension == METADATA_EXTENSION:
        decode.decode_json(members(extension))
    elif extension == LABEL_EXTENSION:
        try:
            text = decode.decode_text(members(extension))
        except BadSample as error:
            raise BadSample("bad_label", str(error)) from error
        if re.fullmatch(r"-\d+", text):
            raise BadSample("bad_label", f"{extension} holds {text}, expected at least 0 or a name")
    elif extension == image:
        _image(members, extension, checks)


def examine(members: Members, checks: Checks, size: int) -> Iterator[Found]:
    """Everything wrong with a sample's members, of a shard of `size` bytes."""
    places = members.places
    image = image_extension(list(places))
    for wanted in checks.need:
        if (image if wanted == "image" else places.get(wanted)) is None:
            start = min((member.offset for member in places.values()), default=-1)
            yield "missing_member", start, f"{wanted}; it has {', '.join(sorted(places)) or 'nothing'}"
    if not kept(places):
        yield "missing_member", -1, f"nothing that may be kept; it has {', '.join(sorted(places))[:200] or 'nothing'}"
    for extension, member in places.items():
        last = extension.rpartition(".")[2]
        if last in EXECUTABLE:
            yield "executable_member", member.offset, f"{extension}, {member.size} bytes"
            continue
        if not EXTENSION.fullmatch(extension):
            yield "odd_extension", member.offset, repr(extension)[:100]
            continue
        if last in COMPRESSED:
            yield "compressed_member", member.offset, extension
        try:
            if member.offset + member.size > size:
                raise BadSample("cut", f"{extension}: {member.size} bytes at {member.offset}, the shard has {size}")
            if member.size > checks.max_member_bytes:
                raise BadSample("too_many_bytes", f"{extension} has {member.size} bytes, the limit is {checks.max_member_bytes}")
            yield from _content(members, extension, checks, image)
        except BadSample as error:
            yield error.reason, member.offset, error.detail or extension


def kept(places: dict[str, Member]) -> list[str]:
    """The members that --repair keeps."""
    return [e for e in places if e.rpartition(".")[2] not in EXECUTABLE and EXTENSION.fullmatch(e)]


def is_image(extension: str) -> bool:
    return extension in IMAGE_EXTENSIONS
