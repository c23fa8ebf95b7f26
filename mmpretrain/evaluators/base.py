"""What an evaluator is, and how its options reach its Config."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import yaml
from accelerate import Accelerator

from ..types import Model, Result


class Evaluator(Protocol):
    """Model in, result out. `Config` is a dataclass; each field's `metadata["help"]` is its one-line documentation."""

    Config: ClassVar[type]
    config: Any

    def __init__(self, config: Any) -> None: ...

    def __call__(self, model: Model, accelerator: Accelerator) -> Result: ...


class OptionError(ValueError):
    """An option that does not exist or does not parse: the caller's mistake, exit status 2."""


def option(default: Any, help: str) -> Any:
    """A Config field with its one-line documentation, which `evaluate.py --help` prints."""
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def make_config(config_class: type, options: Iterable[str] | Mapping[str, Any]) -> Any:
    """`["k=5", "data=photos"]` or a mapping (a recipe's YAML) merged over the defaults of `config_class`.

    Raises OptionError for an unknown key (with the nearest known one), a value of the wrong type, or a missing required one.
    """
    if not isinstance(options, Mapping):
        options = dict(_split(text) for text in options)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    hints = typing.get_type_hints(config_class)
    for key in options:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise OptionError(f"unknown option {key!r}: {hint}known are {', '.join(fields)}")
    values = {key: _convert(key, value, hints[key]) for key, value in options.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise OptionError(f"option {name!r} is required: add {name}=... ({field.metadata.get('help', '')})")
    return config_class(**values)


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise OptionError(f"expected key=value, found {text!r}")
    return key.strip(), value


def _accepted(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type hint: `str | None` -> (str, NoneType)."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _convert(key: str, value: Any, hint: Any) -> Any:
    accepted = _accepted(hint)
    origins = tuple(typing.get_origin(a) or a for a in accepted)
    choices = [choice for a in accepted if typing.get_origin(a) is typing.Literal for choice in typing.get_args(a)]
    if isinstance(value, str) and not (set(origins) <= {str, type(None)} and value not in ("null", "")):
        # Text for a text-only field stays as typed (a regex such as [a-z] is valid YAML); anything else is YAML.
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        value = value if isinstance(parsed, (dict, list)) and type(parsed) not in origins else parsed
    if float in origins and isinstance(value, (int, str)) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            value = float(value)  # YAML reads 1e-3 as text and 1 as an integer
    if str in origins and isinstance(value, (int, float)) and not isinstance(value, bool) and not {int, float} & set(origins):
        value = str(value)
    if not isinstance(value, (dict, list)) and value in choices:
        return value
    plain = tuple(o for o in origins if isinstance(o, type))
    if isinstance(value, plain) and not (isinstance(value, bool) and bool not in plain):
        return value
    expected = " or ".join([repr(c) for c in choices] + ["null" if o is type(None) else o.__name__ for o in plain])
    raise OptionError(f"option {key}={value!r}: expected {expected}, found {type(value).__name__}")
