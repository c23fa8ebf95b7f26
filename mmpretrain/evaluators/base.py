"""What an evaluator is, and how `key=value` texts reach its Config."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol

import yaml
from accelerate import Accelerator

from mmpretrain.config.build import OptionError, build
from mmpretrain.types import Model, Result


class Evaluator(Protocol):
    """Model in, result out. `Config` is a dataclass whose fields are documented by the comments behind them.

    A method `preflight()`, if there is one, looks at the first items before a run trains, and raises OptionError.
    """

    Config: ClassVar[type]
    config: Any

    def __init__(self, config: Any) -> None: ...

    def __call__(self, model: Model, accelerator: Accelerator) -> Result: ...


def result_line(kind: str, name: str, config: Any, model: Model, result: Result) -> dict[str, Any]:
    """A line of results.jsonl, but for its step.

    Args:
        kind: the evaluator's kind.
        name: the name of its result.
        config: the evaluator's. `seed` is taken from it, since it alone decides what is drawn (null where it has none); the run's seed is
            in the run's config.yaml.
    """
    line = {
        "evaluator": kind,
        "name": name,
        "dataset": result.dataset,
        "model": model.fingerprint,
        "n": result.n,
        "seed": getattr(config, "seed", None),
        "metrics": result.metrics,
    }
    return line | ({"baselines": result.baselines} if result.baselines else {})


def make_config(config_class: type, options: Iterable[str] | Mapping[str, Any]) -> Any:
    """`["k=5", "data=photos"]`, or a mapping (a recipe's YAML), merged over the defaults of `config_class`.

    A value is YAML, except where the field takes text alone: there it stays as typed (a regular expression such as `[a-z]` is valid
    YAML too). A list may be written without brackets: `c=0.1,1`. Raises OptionError for an unknown key (with the nearest known one), a
    value of the wrong type, or a missing required one.
    """
    if isinstance(options, Mapping):
        return build(config_class, options)
    hints = typing.get_type_hints(config_class)
    values: dict[str, Any] = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise OptionError(f"expected key=value, found {text!r}")
        values[key.strip()] = _value(value, hints.get(key.strip(), str))
    return build(config_class, values)


def _value(text: str, hint: Any) -> Any:
    accepted = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    origins = {typing.get_origin(choice) or choice for choice in accepted}
    if text in ("null", "") and type(None) in origins:
        return None
    if origins <= {str, type(None), typing.Literal}:
        return text
    try:
        parsed = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    if list in origins and str not in origins and isinstance(parsed, str | int | float):
        return [yaml.safe_load(item) for item in text.split(",")]
    if isinstance(parsed, dict) and any(map(dataclasses.is_dataclass, origins)):
        return parsed
    return text if isinstance(parsed, dict | list) and not origins & {type(parsed), tuple} else parsed
