"""Documentation of options: the comment behind each field of a Config, as shown by `--help`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import tokenize
import typing


@functools.cache
def documentation(cls: type) -> dict[str, str]:
    """Return field -> its one line of documentation: `metadata["help"]`, or the comment behind it in the source."""
    comments: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= _comments(base)
    helps = {f.name: f.metadata["help"] for f in dataclasses.fields(cls) if "help" in f.metadata}
    return comments | helps


def _comments(cls: type) -> dict[str, str]:
    comments: dict[str, str] = {}
    name = ""
    depth = 0
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        starts_line = previous in (tokenize.NEWLINE, tokenize.INDENT, tokenize.NL, tokenize.DEDENT)
        if token.type == tokenize.NAME and depth == 0 and starts_line:
            name = token.string
        if token.type == tokenize.COMMENT and name:
            comments.setdefault(name, token.string.lstrip("# ").strip())
        previous = token.type
    return comments


def describe(cls: type, prefix: str = "") -> list[tuple[str, str, str]]:
    """Return (option, default, documentation) of every field, with nested dataclasses expanded."""
    lines = []
    docs, hints = documentation(cls), typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        path = f"{prefix}{field.name}"
        inner = next((h for h in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(h)), None)
        if inner is not None and typing.get_origin(hints[field.name]) is not dict:
            if docs.get(field.name):
                lines.append((path, "", docs[field.name]))
            lines += describe(typing.cast(type, inner), f"{path}.")
        elif inner is not None:
            lines.append((f"{path}.NAME", "", docs.get(field.name, "")))
            lines += describe(typing.cast(type, inner), f"{path}.NAME.")
        else:
            lines.append((path, _default(field), docs.get(field.name, "")))
    return lines


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    return "null" if value is None else str(value)
