"""Checks of the members of one sample: whether training can use them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from data_prep.validate.kinds import Problem
from data_prep.validate.layout import MAX_KEY, Layout
from mmpretrain.data import decode, raster
from mmpretrain.data.decode import ImageLimits
from mmpretrain.data.fields import MAX_CAPTION_BYTES, FieldName, Fields, decode_json, member_of
from mmpretrain.data.formats import decode_text
from mmpretrain.data.index import BYTES, Member, checksum
from mmpretrain.data.schema import LABEL_EXTENSION, METADATA_EXTENSION, SAFE_KEY, BadSample, image_extension
from mmpretrain.data.tar import read_at

# Members that default decoders of readers execute (pickles), and programs, which do not belong in a data set.
EXECUTABLE = frozenset(
    ["pyd", "pickle", "pkl", "pth", "pt", "dill", "joblib", "py", "pyc", "so", "dll", "exe", "sh", "bat", "com", "cmd", "ps1", "jar"]
)
COMPRESSED = frozenset(["gz", "bz2", "xz", "zst", "zip"])
EXTENSION = re.compile(r"[a-z0-9_+-]+(\.[a-z0-9_+-]+)*")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd]")
_HEAD = 2048  # first bytes, which show the format of an image and usually its size


@dataclass(frozen=True)
class Checks:
    """The requirements on every sample."""

    need: tuple[str, ...] = ()  # extensions; "image" stands for any image
    image_member: str | None = None  # the member that is the image; None: the first of the usual ones
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
        """Reads a member once. Raises BadSample where the bytes are missing or the disk fails."""
        if extension not in self._read:
            member = self.places[extension]
            self._read[extension] = self.head(extension, member.size)
        return self._read[extension]

    def head(self, extension: str, size: int) -> bytes:
        """Reads the first `size` bytes of a member, or all that are read already. Raises BadSample."""
        if extension in self._read:
            return self._read[extension]
        member = self.places[extension]
        try:
            return read_at(self._file, member.offset, min(size, member.size))
        except OSError as error:
            raise BadSample("unreadable", f"{extension}: {error}") from error


def image(data: Callable[[int], bytes], size: int, checks: Checks) -> None:
    """Checks an image.

    Args:
        data: n -> the first n bytes.
        size: of the image, in bytes.
        checks: the requirements.

    Raises:
        BadSample: the image violates them or cannot be decoded.
    """
    if checks.decode:
        decode.decode_image(data(size), checks.limits)
        return
    head = data(min(_HEAD, size))
    kind = decode.sniff(head)
    if kind is None:
        raise BadSample("unknown_format", f"begins with {head[:12]!r}; supported are {', '.join(decode.PILLOW_FORMATS)}")
    checks.limits.check(*(raster.header_size(head, kind) or raster.read_header(data(size), kind)[:2]))


def text(data: bytes, role: str, checks: Checks) -> str | None:
    """Checks a text member by its role (caption, json or label). Returns a control character of a caption. Raises BadSample."""
    if role == "json":
        decode_json(data)
    elif role == "label":
        try:
            label = decode_text(data)
        except BadSample as error:
            raise BadSample("bad_label", str(error)) from error
        if re.fullmatch(r"-\d+", label):
            raise BadSample("bad_label", f"{LABEL_EXTENSION} holds {label}, expected at least 0 or a name")
    elif control := _CONTROL.search("\n".join(Fields.of({member_of(checks.caption): data}).captions(checks.caption))):
        return control[0]
    return None


def role_of(extension: str, checks: Checks, image: str | None) -> str:
    """Returns the role of a member (caption, json, label or image); "" for one of which only the checksum is verified."""
    roles = {image: "image", LABEL_EXTENSION: "label", METADATA_EXTENSION: "json", member_of(checks.caption): "caption"}
    return roles.get(extension, "")


def max_bytes(role: str, checks: Checks) -> int:
    """Returns the maximum size of a member."""
    return MAX_CAPTION_BYTES if role == "caption" and FieldName.parse(checks.caption).key is None else checks.max_member_bytes


def _content(members: Members, extension: str, checks: Checks, role: str) -> Iterator[Problem]:
    member = members.places[extension]
    if checks.checksums and member.checksum is not None and not member.holds(members(extension)):
        raise BadSample("checksum", f"{extension}: the {member.size} bytes at {member.offset} are not those that the index was written for")
    if role == "image":
        image(lambda size: members.head(extension, size), member.size, checks)
    elif role and (control := text(members(extension), role, checks)) is not None:
        yield "control_characters", member.offset, f"{extension} holds U+{ord(control):04X}"


def examine(members: Members, checks: Checks, size: int) -> Iterator[Problem]:
    """Yields the problems of a sample's members, in a shard of `size` bytes."""
    places = members.places
    picture = image_extension(places, checks.image_member)
    for wanted in checks.need:
        if (picture if wanted == "image" else places.get(wanted)) is None:
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
            role = role_of(extension, checks, picture)
            if member.size > (limit := max_bytes(role, checks)):
                raise BadSample("too_many_bytes", f"{extension} has {member.size} bytes, the limit is {limit}")
            yield from _content(members, extension, checks, role)
        except BadSample as error:
            yield error.reason, member.offset, error.detail or extension


def kept(places: dict[str, Member]) -> list[str]:
    """Returns the members that --repair keeps."""
    return [e for e in places if e.rpartition(".")[2] not in EXECUTABLE and EXTENSION.fullmatch(e)]


class Sound:
    """A fast test whether a sample has no problem at all: a safe key, regular members, and every check passed."""

    def __init__(self, layout: Layout, checks: Checks) -> None:
        index = layout.index
        self._file, self._size, self._checks, self._crossed = layout.file, layout.size, checks, layout.crossed
        self._linked = None if layout.linked is None or not layout.linked.any() else layout.linked
        self._keys, self._names = index.keys, index.extensions
        self._starts, self._kinds = index.starts.tolist(), index.extension.tolist()
        self._offsets, self._sizes = index.offset.tolist(), index.size.tolist()
        checksum = index.checksum
        known = checksum is not None and checksum.shape[1] == BYTES
        usable = checksum if known and checks.checksums else None
        self._checksums = None if usable is None else memoryview(usable.tobytes())
        # Behind damage, and with checksums of another kind, all samples are examined in full.
        self._any = layout.trusted and (checksum is None or known or not checks.checksums)
        self._times: Counter[tuple[int, ...]] = Counter()
        self._roles: dict[tuple[int, ...], list[str] | None] = {}  # by the kinds of a sample's members

    def __call__(self, i: int) -> bool:
        key = self._keys[i]
        if not self._any or len(key) > MAX_KEY or not SAFE_KEY.fullmatch(key) or (self._crossed is not None and self._crossed[i]):
            return False
        first, end = self._starts[i], self._starts[i + 1]
        if self._linked is not None and self._linked[first:end].any():
            return False  # to report it
        kinds = tuple(self._kinds[first:end])
        if kinds not in self._roles:
            self._roles[kinds] = self._plan([self._names[kind] for kind in kinds])
        roles = self._roles[kinds]
        try:
            good = roles is not None and all(map(self._member, range(first, end), roles))
        except (BadSample, OSError):
            return False
        if good:
            self._times[kinds] += 1
        return good

    @property
    def members(self) -> Counter[str]:
        """Extension -> number of sound samples with it."""
        counts: Counter[str] = Counter()
        for kinds, times in self._times.items():
            counts.update({self._names[kind]: times for kind in kinds})
        return counts

    def _plan(self, extensions: list[str]) -> list[str] | None:
        """Returns the roles of the members; None where one must be reported, or one is missing."""
        picture = image_extension(extensions, self._checks.image_member)
        for wanted in self._checks.need:
            if (picture is None) if wanted == "image" else (wanted not in extensions):
                return None
        if any("." in e or e in EXECUTABLE or e in COMPRESSED or not EXTENSION.fullmatch(e) for e in extensions):
            return None
        return [role_of(extension, self._checks, picture) for extension in extensions]

    def _member(self, m: int, role: str) -> bool:
        offset, size = self._offsets[m], self._sizes[m]
        if offset + size > self._size or size > max_bytes(role, self._checks):
            return False
        whole = None
        if self._checksums is not None:
            whole = read_at(self._file, offset, size)
            if checksum(whole) != self._checksums[m * BYTES : (m + 1) * BYTES]:
                return False
        if role == "image":
            image(lambda length: whole[:length] if whole is not None else read_at(self._file, offset, length), size, self._checks)
        elif role:
            return text(read_at(self._file, offset, size) if whole is None else whole, role, self._checks) is None
        return True
