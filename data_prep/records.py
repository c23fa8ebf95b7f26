"""Records, skipped inputs, splits, and the error for inputs that a user must correct."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from mmpretrain.data.schema import SAFE_KEY
from mmpretrain.errors import MMPretrainError

TAR_BLOCK = 512


class RecordError(MMPretrainError, ValueError):
    """A sample that cannot be written: its key is unsafe or repeated, or its members have odd names."""


@dataclass(frozen=True)
class Record:
    """One sample: a key without dots, its members' bytes by extension ("jpg", "txt", "cls", "json"), and where they come from."""

    key: str
    members: dict[str, bytes]
    where: str = field(default="", compare=False)  # the file or the row, for messages

    def check(self) -> None:
        """Raises RecordError for an unsafe or dotted key, no members, or odd extensions."""
        if len(self.key) > 200 or not SAFE_KEY.fullmatch(self.key):
            raise RecordError(
                f"key {self.key!r}: expected at most 200 letters, digits, _ and -, with / between folders. "
                "A dot would begin the extension; other characters are unsafe in paths."
            )
        if not self.members:
            raise RecordError(f"key {self.key!r} has no members")
        for extension in self.members:
            if not extension or extension != extension.lower() or "/" in extension or "\0" in extension:
                raise RecordError(f"key {self.key!r}: {extension!r} is not an extension (lower case, no slash)")

    def tar_bytes(self) -> int:
        """Returns an upper bound of its bytes in a shard, for members whose names need no pax header."""
        return sum(2 * TAR_BLOCK + len(data) for data in self.members.values())


class InputError(MMPretrainError, ValueError):
    """An input or option that must be corrected. The message names it, its place and the remedy."""


class OutputError(MMPretrainError, FileExistsError):
    """An output folder that holds something else than what is to be written. It is never overwritten."""


@dataclass(frozen=True)
class Skipped:
    """An input that was left out, as OUT/skipped.jsonl lists it."""

    where: str
    reason: str  # a stable identifier, such as "checksum"
    detail: str
    harmless: bool = False  # nothing that was meant to be read: a build goes on without --skip-bad


class Split(Protocol):
    """Assigns records to the parts of OUT, a folder each. Picklable; its repr identifies the split in build digests."""

    @property
    def parts(self) -> tuple[str, ...]: ...

    def __call__(self, record: Record) -> str: ...
