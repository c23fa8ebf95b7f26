"""Rows of delimited text (CSV), one reader for `data_prep build` and evaluators: a bad cell costs its row. Imports no torch."""

from __future__ import annotations

import csv
import io
import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, BinaryIO

from mmpretrain.config.build import OptionError
from mmpretrain.data.formats import foreign_kind, printable
from mmpretrain.data.schema import BadSample
from mmpretrain.data.shard_names import is_remote
from mmpretrain.errors import file_errors

MAX_FIELD = 16 << 20  # characters; a field that nothing closes would go on to the end of the table
MAX_LINE = 256 << 20
SEPARATORS = (",", "\t", ";", "|")  # a header line tells which
START = 1 << 16  # bytes that show what a file is
csv.field_size_limit(MAX_FIELD)

Row = tuple[int, list[str] | str]  # the first line, and the fields; in place of fields, what is wrong with that line


class TableError(OptionError):
    """A file that is not a table of the kind that was asked for. The message names it, what it is, and the remedy."""


def encoding_of(start: bytes) -> str:
    """Return the encoding that the byte order mark at the start of a text names; UTF-8 without one."""
    if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    return "utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"


def as_text(file: BinaryIO) -> io.TextIOWrapper:
    """A file of bytes as lines of text, with their ends. In UTF-8, other bytes are read as surrogates.

    Args:
        file: at its beginning; seekable.
    """
    encoding = encoding_of(file.read(4))
    file.seek(0)
    errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
    return io.TextIOWrapper(file, encoding=encoding, errors=errors, newline="")


def check_text(file: str, start: bytes, bytewise: bool = False) -> None:
    """Check the first bytes of a table.

    Args:
        file: its name, for the message.
        start: the first bytes, up to `START` of them.
        bytewise: the reader looks for line feeds in UTF-8, and can read nothing else.

    Raises:
        TableError: it is compressed, a web page, a Git LFS pointer, UTF-16 that cannot be read ...
    """
    encoding = encoding_of(start)
    if encoding != "utf-8-sig":
        if bytewise:
            raise TableError(f"{file}: a text in {encoding.upper()}, expected UTF-8. Convert it, e.g. with iconv -f UTF-16 -t UTF-8.")
        return
    if (foreign := foreign_kind(start)) is not None:
        noun, remedy = foreign
        remedy = "Use `data_prep build parquet`." if noun == "a parquet file" else remedy or "Fetch it again."
        raise TableError(f"{file}: {noun}, expected a table. {remedy}")
    if start.count(b"\0") * 3 > len(start):
        raise TableError(f"{file}: a third of its bytes are zero: UTF-16 without a byte order mark? Convert it to UTF-8, e.g. with iconv.")
    if bytewise and b"\r" in start.rstrip() and b"\n" not in start:
        raise TableError(f"{file}: its lines end with carriage returns alone. Convert it, e.g. with tr '\\r' '\\n' < FILE.")


@contextmanager
def open_local(path: str | os.PathLike[str]) -> Iterator[IO[str]]:
    """A local table as text. Raises TableError, and FileError where it is missing or unreadable."""
    with file_errors(), open(path, "rb") as file:
        check_text(os.fspath(path), file.read(START))
        file.seek(0)
        with as_text(file) as text:
            yield text


def separator_of(line: str) -> str:
    """What separates the columns that a header line names: a comma where it holds one, else the mark that gives most columns."""
    counts = {}
    for separator in SEPARATORS:
        try:
            counts[separator] = len(next(csv.reader([line], delimiter=separator), []))
        except csv.Error:
            counts[separator] = 1
    return "," if counts[","] > 1 else max(SEPARATORS, key=counts.__getitem__)


def read_rows(text: IO[str], separator: str) -> Iterator[Row]:
    """The rows of a table, the header's first, without blank lines.

    A quote that nothing closes swallows the lines below: these are read again as rows of their own. Bytes that are not UTF-8 stay apart as
    surrogates, and are found when they are used.
    """
    again: deque[str] = deque()  # lines to read before those of the file
    taken: list[str] = []  # the lines of the row under way
    line = 1
    while True:
        try:
            for row in csv.reader(_lines(text, again, taken), delimiter=separator, strict=True):
                if row:
                    yield line, row
                line += len(taken)
                taken.clear()
            return
        except csv.Error as error:
            remedy = "Close its quotes, and double those that are meant literally"
            yield line, f"{error}. {remedy}" + (", or build it as `tsv`, which knows no quotes." if separator == "\t" else ".")
            again.extendleft(reversed(taken[1:]))
            line += 1
            taken.clear()


def _lines(text: IO[str], again: deque[str], taken: list[str]) -> Iterator[str]:
    """Raises csv.Error for a line that is too long to hold, once it is passed."""
    while line := again.popleft() if again else text.readline(MAX_LINE):
        taken.append(line)
        if len(line) == MAX_LINE and not line.endswith("\n"):
            while (rest := text.readline(MAX_LINE)) and not rest.endswith("\n"):
                pass
            raise csv.Error(f"a line of more than {MAX_LINE} characters")
        yield line


@dataclass(frozen=True)
class Header:
    """The names of a table's columns. Unnamed ones, as Excel writes them beside a table, cannot be asked for."""

    file: str
    names: tuple[str, ...]

    @classmethod
    def read(cls, file: str, rows: Iterator[Row]) -> Header:
        """Take the first row. Raises TableError where there is none."""
        line, names = next(rows, (0, ""))
        if not line:
            raise TableError(f"{file}: an empty table, expected a header line that names the columns")
        if isinstance(names, str):
            raise TableError(f"{file}, line {line}: {names}")
        return cls(file, tuple(names))

    @property
    def named(self) -> list[str]:
        return [name for name in self.names if name.strip()]

    def place(self, column: str) -> int:
        """Which field of a row holds a column. Raises TableError where two do."""
        if self.names.count(column) > 1:
            raise TableError(f"{self.file}: column {column!r} comes twice in its header. Rename one.")
        return self.names.index(column)

    def fit(self, row: list[str]) -> list[str] | str:
        """A row with as many fields as the header, or what is wrong with it: only unnamed columns may be left out, or added empty."""
        count = len(self.names)
        if len(row) < count and not any(name.strip() for name in self.names[len(row) :]):
            return row + [""] * (count - len(row))
        if len(row) > count and not any(cell.strip() for cell in row[count:]):
            return row[:count]
        return row if len(row) == count else f"expected {count} fields ({some(self.names)}), found {len(row)}"


def some(names: Iterable[object], max_names: int = 50) -> str:
    """Names for a message, which stays readable."""
    given = [printable(str(name)) for name in names]
    return ", ".join(given[:max_names]) + (f" and {len(given) - max_names} more" if len(given) > max_names else "")


def distinct_integers(texts: Iterable[str]) -> bool:
    """Return whether all texts are integers of which no two spellings, such as 007 and 7, stand for one number."""
    spelt = set(texts)
    if not all(text.removeprefix("-").isdecimal() and len(text) < 20 for text in spelt):
        return False
    return len(set(map(int, spelt))) == len(spelt)


def slashed(folder: str, name: str) -> str:
    """A path that a table names, with slashes where it has backslashes, unless a file of that very name lies in the folder.

    Raises:
        BadSample: bad_path for the path of a Windows drive or server.
    """
    if "\\" not in name or is_remote(name) or os.path.exists(os.path.join(folder, name)):
        return name
    if name[1:3] == ":\\" or name.startswith("\\\\"):
        raise BadSample("bad_path", f"{name[:200]} is a path of another system: write paths relative to the folder of the images")
    return name.replace("\\", "/")
