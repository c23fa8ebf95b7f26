"""Captions from the columns of a row."""

import pytest

from mmpretrain.config.build import OptionError
from mmpretrain.data.captions import CaptionTemplate
from mmpretrain.data.schema import BadSample

ROW = {
    "name": "red  apple",
    "tags": ["round", "", "sweet"],
    "none": None,
    "n": 3,
    "nan": float("nan"),
    "meta": {"by": "Ann"},
    "a|b": "p|q",
}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("name", ["red  apple"]),
        ("tags", ["round", "", "sweet"]),
        ("n", ["3"]),
        ("nan", [""]),
        ("meta.by", ["Ann"]),
        ("{name}: {tags}", ["red apple: round, sweet"]),
        ("{name}: {none}", ["red apple"]),
        ("{none} {nan}", [""]),
        ("{meta.by} has {n}", ["Ann has 3"]),
        ("{{{name}}}", ["{red apple}"]),
        ("{a|b}", ["p, q"]),
    ],
)
def test_captions(caption: str, expected: list[str]) -> None:
    assert CaptionTemplate.parse(caption).fill(ROW, {"a|b": "|"}) == expected


@pytest.mark.parametrize("caption", ["{", "{}", "{name!r}", "{n:03d}", "{0.__class__!s}", "a}"])
def test_formats_that_are_no_columns(caption: str) -> None:
    with pytest.raises(OptionError, match="caption"):
        CaptionTemplate.parse(caption)


def test_templates_reach_no_attributes() -> None:
    assert CaptionTemplate.parse("{name.__class__}").fill(ROW, {}) == [""]


def test_an_object_is_no_caption() -> None:
    with pytest.raises(BadSample, match=r"name one as \{meta.NAME\}"):
        CaptionTemplate.parse("{meta}").fill(ROW, {})
