"""The interface of evaluators, their result lines, and the parsing of `key=value` options."""

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
    """An evaluator: model in, result out. `Config` is a dataclass whose fields are documented by the comments behind them.

    An optional method `preflight()` checks the first items before a run trains, and raises OptionError.
    """

    Config: ClassVar[type]
    config: Any

    def __init__(self, config: Any) -> None: ...

    def __call__(self, model: Model, accelerator: Accelerator) -> Result: ...


def result_line(kind: str, name: str, config: Any, model: Model, result: Result) -> dict[str, Any]:
    """Return a line of results.jsonl, without its step.

    Args:
        kind: the evaluator's kind.
        name: of the result.
        config: the evaluator's. Its `seed` is recorded, since that alone determines random draws (null without one);
            the run's seed is in the run's config.yaml.
        model: that was evaluated.
        result: of the evaluator.
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
    """Merge options over the defaults of `config_class`.

    Args:
        config_class: a dataclass.
        options: `["k=5", "data=photos"]`, or a mapping from a recipe. A value is YAML, except for fields of text
            alone, which keep it unchanged (a regular expression such as `[a-z]` is valid YAML too). A list needs no
            brackets: `c=0.1,1`.

    Raises:
        OptionError: an unknown key (with the nearest known one), a value of the wrong type, or a missing required one.
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
