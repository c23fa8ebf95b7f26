"""Parsing of caption templates, and captions from the columns of a row: one grammar for data_prep and the evaluators.

A caption is a column's name, whose text is used unchanged and whose list of texts gives several captions, or a
template over columns in braces, `{name}: {keywords}`; `{{` and `}}` are literal braces. `{a.b}` and `a.b` are the key
b of a column `a` that holds an object.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from types import MappingProxyType
from typing import Any

from mmpretrain.config.build import OptionError
from mmpretrain.data.schema import BadSample


def lookup(row: Mapping[str, Any], column: str) -> Any:
    """Return a column's value; None where the row, or an object in it, lacks it."""
    if column in row or "." not in column:
        return row.get(column)
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def cell_text(value: Any, column: str, mark: str | None) -> str:
    """Convert a column's value to text inside a template.

    Args:
        value: a list is joined by commas; None and NaN give "".
        column: for errors.
        mark: a separator of words in the text, which becomes ", ".

    Raises:
        BadSample: not_utf8, bad_caption for an object.
    """
    if value is None or value != value:  # NaN marks an empty cell in tables
        return ""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise BadSample("not_utf8", f"column {column}: {error}") from error
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, (cell_text(item, column, mark) for item in value)))
    if isinstance(value, Mapping):
        raise BadSample("bad_caption", f"column {column} holds an object with {', '.join(map(str, value))}; name one as {{{column}.NAME}}")
    text = str(value)
    return re.sub(r"\s+", " ", text.replace(mark, ", ") if mark else text).strip()


@dataclass(frozen=True)
class CaptionTemplate:
    """A caption made of columns: alternating literal text and column names; `plain`: the name of a column used unchanged."""

    parts: tuple[tuple[str, str | None], ...]
    plain: str | None = None

    @classmethod
    def parse(cls, text: str) -> CaptionTemplate:
        """Parse a column's name or a template. Raises OptionError for anything else in braces than columns."""
        if "{" not in text and "}" not in text:
            return cls((), text)
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as error:
            raise OptionError(f"caption {text!r}: {error}. Name columns in braces, e.g. '{{name}}: {{keywords}}'.") from error
        if any(name == "" or form or conversion for _, name, form, conversion in parsed):
            raise OptionError(f"caption {text!r}: name columns in braces, and nothing else there, e.g. '{{name}}: {{keywords}}'.")
        return cls(tuple((literal, name) for literal, name, _, _ in parsed))

    @property
    def columns(self) -> list[str]:
        """The columns of the caption."""
        return [self.plain] if self.plain is not None else [name for _, name in self.parts if name is not None]

    def fill(self, row: Mapping[str, Any], join: Mapping[str, str] = MappingProxyType({})) -> list[str]:
        """Return the captions of a row, "" among them where columns are empty.

        Args:
            row: column -> value.
            join: column -> separator of its words, which becomes ", ".

        Raises:
            BadSample: bad_caption, not_utf8.
        """
        if self.plain is not None:
            value = lookup(row, self.plain)
            values = value if isinstance(value, list | tuple) else [value]
            if self.plain in join or not all(isinstance(item, str) for item in values):
                return [cell_text(item, self.plain, join.get(self.plain)) for item in values]
            return list(values)
        words = {name: cell_text(lookup(row, name), name, join.get(name)) for name in self.columns}
        if words and not any(words.values()):
            return [""]
        text = "".join(literal + words.get(name or "", "") for literal, name in self.parts).strip()
        # An empty column must not leave a dangling "name: ".
        return [text if all(words.values()) else text.rstrip(":;,-").strip()]
