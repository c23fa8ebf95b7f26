"""Captions and labels: a member, or a field of a JSON member."""

import unicodedata

import pytest

from mmpretrain.config.build import OptionError
from mmpretrain.data.fields import FieldName, Fields, captions_from, decode_json, label_from, place_of
from mmpretrain.data.formats import decode_text
from mmpretrain.data.index import Member
from mmpretrain.data.schema import BadSample

MEMBERS = {
    "txt": b" a cat \n",
    "cls": b"1",
    "json": b'{"caption": ["a cat", "", "Felis"], "class": "dog", "n": 3}',
    "more.json": b'{"n": 4}',
}


def test_a_name_is_a_member_or_a_field_of_one() -> None:
    assert FieldName.parse("txt") == FieldName("txt")
    assert FieldName.parse("json:a:b") == FieldName("json", "a:b")
    assert str(FieldName.parse("json:a:b")) == "json:a:b"
    for text in ("", "json:", ":caption"):
        with pytest.raises(OptionError, match=r"expected a member such as txt or cls, or json:FIELD"):
            FieldName.parse(text)


def test_fields_read_members_and_json_alike() -> None:
    fields = Fields.of(MEMBERS)
    assert fields.captions("txt") == ["a cat"]
    assert fields.captions("json:caption") == ["a cat", "Felis"]
    assert fields.label("cls", None) == 1
    assert fields.label("json:class", {"cat": 0, "dog": 1}) == 1
    assert (fields.value("json:n"), fields.value("more.json:n")) == (3, 4)


def test_lines_of_a_text_are_captions() -> None:
    fields = Fields.of({"txt": b"a cat\n\na dog\n"})
    assert fields.captions("txt", lines=True) == ["a cat", "a dog"]
    assert fields.captions("txt") == ["a cat\n\na dog"]


def test_what_is_missing_is_named_beside_what_is_there() -> None:
    fields = Fields.of(MEMBERS)
    with pytest.raises(BadSample, match=r"missing_field: vtt; it has cls, json, more\.json, txt"):
        fields.captions("vtt")
    with pytest.raises(BadSample, match="missing_field: json:title; it has caption, class, n"):
        fields.captions("json:title")


def test_members_of_a_shard_have_limits_and_are_read_once() -> None:
    reads = []

    def read(member: Member) -> bytes:
        reads.append(member.offset)
        return MEMBERS["json"]

    members = {"json": Member(512, len(MEMBERS["json"]), None), "txt": Member(2048, (1 << 16) + 1, None)}
    fields = Fields.placed(members, read, 1000)
    assert (fields.value("json:n"), fields.value("json:class")) == (3, "dog")
    assert reads == [512]
    with pytest.raises(BadSample, match="too_many_bytes: txt has 65537 bytes, the limit is 65536"):
        fields.captions("txt")
    with pytest.raises(BadSample, match="too_many_bytes: json has"):
        Fields.placed(members, read, 10).json()
    with pytest.raises(BadSample, match="missing_field: image; it has json, txt"):
        place_of(members, None, 10)


def test_captions() -> None:
    assert decode_text("  cafe\u0301 \n".encode()) == unicodedata.normalize("NFC", "café")
    assert decode_text(b"\xef\xbb\xbfword") == "word"
    for data, reason in [(b"", "empty_caption"), (b" \n\t", "empty_caption"), (b"\xff\xfe", "not_utf8")]:
        with pytest.raises(BadSample) as caught:
            decode_text(data)
        assert caught.value.reason == reason


def test_json_captions_and_labels() -> None:
    assert captions_from(["a", " ", "b "], "json:c") == ["a", "b"]
    assert captions_from("a", "json:c") == ["a"]
    classes = {"cat": 0, "dog": 1}
    assert [label_from(v, classes, "cls") for v in (b"1", "dog", 0, "cat")] == [1, 1, 0, 0]
    assert label_from(b"7\n", None, "cls") == 7
    for value in (b"2", "bird", -1, 0.5, None, True):
        with pytest.raises(BadSample, match="bad_label"):
            label_from(value, classes, "cls")
    for value in (3, ["a", 1], [], [""]):
        with pytest.raises(BadSample):
            captions_from(value, "json:c")
    with pytest.raises(BadSample, match="bad_json"):
        decode_json(b"[1")
