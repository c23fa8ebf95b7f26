"""Conversion of plain data to dataclasses: types and ranges are checked, unknown names refused (did you mean ...?)."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
import math
import operator
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mmpretrain.config.documentation import documentation
from mmpretrain.errors import MMPretrainError


class OptionError(MMPretrainError, ValueError):
    """An option is unknown, or its value does not fit: the caller's mistake."""

    status = 2


@dataclasses.dataclass(frozen=True)
class Range:
    """The range of a numeric option, written on its field: `Annotated[float, Range(0, below=1)]`.

    Args:
        low: inclusive lower bound.
        high: inclusive upper bound.
        above: exclusive lower bound.
        below: exclusive upper bound.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def refusal(self, number: float) -> str:
        """Return the expected range where `number` lies outside; else ""."""
        sides = (
            (self.low, operator.ge, "at least"), (self.above, operator.gt, "more than"),
            (self.high, operator.le, "at most"), (self.below, operator.lt, "less than"),
        )  # fmt: skip
        return next((f"expected {words} {bound:g}" for bound, holds, words in sides if bound is not None and not holds(number, bound)), "")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a message: ", did you mean 'x'?" where a known name is similar, and the known names."""
    known = list(known)
    close = _close(name, known, 1)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" Known: {', '.join(sorted(known))}."


def hint(name: str, known: Iterable[str], count: int = 1) -> str:
    """ " (did you mean x or y?)" with at most `count` of the closest; "" where none is close. For names too many to list."""
    close = _close(name, known, count)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _close(name: str, known: Iterable[str], count: int) -> list[str]:
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)


@contextlib.contextmanager
def blaming(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Raises an error of these kinds, which is the recipe's fault, as an OptionError that names the option `what`.

    Args:
        kinds: by default ValueError and OSError, with which other libraries, and objectives from outside, refuse a name or an option.
            Where code runs that takes no options, name what it raises for them (ModelError): a ValueError there is a bug.
    """
    try:
        yield
    except OptionError:
        raise
    except kinds or (ValueError, OSError) as error:  # noqa: B030 (a tuple of classes)
        raise OptionError(f"{what}: {error}") from error


def build(cls: type, data: Any, where: str = "", place: typing.Callable[[str], str] = lambda path: "") -> Any:
    """Build an instance of the dataclass `cls` from a mapping.

    Args:
        cls: the dataclass.
        data: option -> value; an instance of `cls` is returned as it is.
        where: dotted path of `data` in the recipe, for messages.
        place: dotted path -> " (file, line n)", for messages.

    Raises:
        OptionError: an unknown key, or a value of the wrong type.
    """
    if dataclasses.is_dataclass(data) and isinstance(data, cls):
        return data
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise OptionError(f"{where or 'the recipe'}{place(where)} must be a mapping of options, found {data!r}")
    if upgraded := getattr(cls, "upgraded", None):  # options in the spelling of earlier versions
        data = upgraded(data)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    hints = typing.get_type_hints(cls, include_extras=True)
    values = {}
    for key, value in data.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in fields:
            raise OptionError(f"unknown option {path!r}{place(path)}{nearest(str(key), fields)}")
        values[key] = convert(value, hints[key], path, place)
    for name, field in fields.items():
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            path = f"{where}.{name}" if where else name
            raise OptionError(f"option {path!r}{place(where)} is required: {documentation(cls).get(name, '')}")
    try:
        return cls(**values)
    except ValueError as error:  # what its __post_init__ refuses
        raise OptionError(f"{where + ': ' if where else ''}{error}{place(where)}") from error


def convert(value: Any, hint: Any, path: str, place: typing.Callable[[str], str] = lambda path: "") -> Any:
    """Convert `value` to the type `hint`. Numbers are also read from text; a bool is never a number.

    Args:
        value: plain data.
        hint: a type annotation.
        path: dotted path of the option, for messages.
        place: dotted path -> " (file, line n)", for messages.

    Raises:
        OptionError: the value does not fit.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    wrong = OptionError(f"option {path}={value!r}{place(path)}: expected {_name(hint)}, found {type(value).__name__}")
    if hint is Any:
        return value
    if origin is typing.Annotated:
        value = convert(value, arguments[0], path, place)
        numbers = [(path, value)] if not isinstance(value, list | tuple) else [(f"{path}.{i}", item) for i, item in enumerate(value)]
        for (where, number), limit in itertools.product(numbers, hint.__metadata__):
            if isinstance(limit, Range) and isinstance(number, int | float) and (refusal := limit.refusal(number)):
                raise OptionError(f"option {where}={number!r}{place(where)}: {refusal}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        nested = [choice for choice in arguments if dataclasses.is_dataclass(choice)]
        if len(nested) == 1 and isinstance(value, Mapping):  # errors inside name the inner option
            return convert(value, nested[0], path, place)
        for choice in arguments:
            if isinstance(choice, type) and type(value) is choice:
                return convert(value, choice, path, place)
        for choice in arguments:
            if choice is not type(None):
                try:
                    return convert(value, choice, path, place)
                except OptionError:
                    continue
        raise wrong
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise OptionError(f"option {path}={value!r}{place(path)}{nearest(str(value), map(str, arguments))}")
    if origin is dict:
        if value is None:  # `evaluators=null` on the command line: none of them
            return {}
        if not isinstance(value, Mapping):
            raise wrong
        # `objectives.simclr=null` removes an entry.
        return {str(k): convert(v, arguments[1], f"{path}.{k}", place) for k, v in value.items() if v is not None}
    if origin is list:
        if isinstance(value, str) or not isinstance(value, typing.Sequence):
            raise wrong
        return [convert(v, arguments[0], f"{path}.{i}", place) for i, v in enumerate(value)]
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, typing.Sequence):
            raise wrong
        if arguments[-1] is not Ellipsis and len(value) != len(arguments):
            raise OptionError(f"option {path}={value!r}{place(path)}: expected {len(arguments)} values, found {len(value)}")
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(convert(v, kind, f"{path}.{i}", place) for i, (v, kind) in enumerate(zip(value, kinds)))
    if dataclasses.is_dataclass(hint):
        if isinstance(value, str) and "preset" in {f.name for f in dataclasses.fields(hint)}:
            value = {"preset": value}
        return build(typing.cast(type, hint), value, path, place)
    if hint is bool and not isinstance(value, bool):
        raise wrong
    if hint in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise wrong
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise wrong from None
        if not math.isfinite(number) or (hint is int and abs(number) >= 2**63):
            raise OptionError(f"option {path}={value}{place(path)}: expected a finite number, a whole one of at most 63 bits")
        if hint is int and number != int(number):
            raise wrong
        return int(value) if hint is int and isinstance(value, int | str) and str(value).lstrip("+-").isdigit() else hint(number)
    if hint is str:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise wrong
    if (hint is dict and not isinstance(value, Mapping)) or (hint is list and not isinstance(value, list | tuple)):
        raise wrong
    return value


def _name(hint: Any) -> str:
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return str(hint).replace("typing.", "").replace("NoneType", "null").replace("None", "null")
