"""Plain data -> dataclasses: what is refused, and what the message says."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from mmpretrain.config.build import OptionError, build, hint, nearest
from mmpretrain.config.documentation import describe, documentation


@dataclass
class Inner:
    preset: str = "a"  # which one
    size: int = 3  # how many


@dataclass
class Outer:
    rate: float = 0.5  # per second
    count: int | None = None  # of things
    pair: tuple[float, float] = (0.0, 1.0)  # low, high
    mode: Literal["x", "y"] = "x"  # way of working
    inner: Inner = field(default_factory=Inner)  # nested
    many: dict[str, Inner] = field(default_factory=dict)  # by name
    flag: bool = False  # on or off
    names: list[str] = field(default_factory=list)  # some
    either: str | list[str] = ""  # one or more


def test_values_are_converted():
    got = build(
        Outer, {"rate": "1e-3", "count": 4, "pair": [1, 2], "inner": {"size": "7"}, "many": {"k": {"preset": "b"}}, "either": ["a"]}
    )
    assert got == Outer(rate=1e-3, count=4, pair=(1.0, 2.0), inner=Inner(size=7), many={"k": Inner("b")}, either=["a"])
    assert isinstance(got.pair[0], float)


def test_a_preset_may_stand_for_its_options():
    assert build(Outer, {"inner": "b"}).inner == Inner("b")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"rat": 1}, "unknown option 'rat'; did you mean 'rate'"),
        ({"inner": {"siz": 1}}, r"unknown option 'inner\.siz'; did you mean 'size'"),
        ({"rate": "fast"}, "option rate='fast': expected float, found str"),
        ({"count": 1.5}, "option count=1.5: expected int | null"),
        ({"flag": 1}, "option flag=1: expected bool"),
        ({"rate": True}, "option rate=True: expected float"),
        ({"pair": [1]}, "expected 2 values, found 1"),
        ({"mode": "z"}, "option mode='z'.*Known: x, y"),
        ({"inner": 3}, "must be a mapping"),
        ({"names": "abc"}, "expected list"),
        ([], "must be a mapping"),
        ({"rate": float("inf")}, "option rate=inf: expected a finite number"),
        ({"rate": "1e999"}, "option rate=1e999: expected a finite number"),
        ({"rate": 10**400}, "expected float, found int"),
        ({"count": 10**26}, "option count=1000.*: expected a finite number"),
        ({"inner": {"size": float("nan")}}, "option inner.size=nan: expected a finite number"),
    ],
)
def test_refusals_name_the_option(data, message):
    with pytest.raises(OptionError, match=message.replace("|", r"\|")):
        build(Outer, data)


def test_null_takes_an_entry_out():
    assert build(Outer, {"many": {"a": None, "b": {}}}).many == {"b": Inner()}


def test_documentation_is_the_comment_behind_the_field():
    assert documentation(Outer)["rate"] == "per second"
    assert ("inner.size", "3", "how many") in describe(Outer)
    assert ("many.NAME.preset", "a", "which one") in describe(Outer)


def test_a_misspelt_name_gets_the_closest_known_one():
    known = ["red", "green", "blue", "grey"]
    assert nearest("gren", known) == "; did you mean 'green'? Known: blue, green, grey, red."
    assert nearest("purple", known) == " Known: blue, green, grey, red."
    assert hint("gren", known, count=2) == " (did you mean green or grey?)"
    assert hint("gren", known) == " (did you mean green?)"
    assert hint("purple", known) == ""
