"""JSON Lines and tab-separated tables."""

import base64
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.build.readers import json_lines as reader_module
from data_prep.build.readers.columns import Columns
from data_prep.build.readers.json_lines import json_lines, parse_json, tab_separated
from data_prep.records import InputError
from mmpretrain.data.schema import BadSample
from tests.data_prep.build.readers.support import collect, image, reasons


def write(path: Path, *items: object) -> str:
    path.write_bytes(b"".join((i if isinstance(i, bytes) else json.dumps(i).encode()) + b"\n" for i in items))
    return str(path)


def columns(root: Path, **options: object) -> Columns:
    return Columns(captions=("caption",), root=str(root), **options)  # type: ignore[arg-type]


def test_every_line_is_a_sample_or_a_reason(tmp_path: Path) -> None:
    png = image()
    (tmp_path / "a.png").write_bytes(png)
    (tmp_path / "b.txt").write_bytes(b"no image")
    coded = base64.b64encode(png).decode()
    file = write(
        tmp_path / "t.jsonl",
        {"image": "a.png", "caption": "first"},
        b"{broken",
        b"",
        {"image": f"data:image/png;base64,{coded}", "caption": " se\u0301cond "},
        b"\xff\xfe",
        b"[1]",
        {"image": "absent.png", "caption": "x"},
        {"image": "b.txt", "caption": "x"},
        {"image": "a.png", "caption": "  "},
        {"caption": "x"},
        {"image": "data:image/png;base64,@@@", "caption": "x"},
        {"image": "https://example.org/a.png", "caption": "x"},
        b'{"image": "a.png", "caption": "\\ud800"}',
        {"image": 7, "caption": "x"},
        {"image": {"bytes": None, "path": "a.png"}, "caption": "last"},
    )
    found, skipped = collect(json_lines([file], columns(tmp_path)))
    assert {key: members["txt"].decode() for key, members in found.items()} == {
        "00000000": "first",
        "00000003": "s\u00e9cond",
        "00000014": "last",
    }
    assert all(members["png"] == png for members in found.values())
    assert reasons(skipped) == {
        "t.jsonl, line 2": "bad_json",
        "t.jsonl, line 5": "not_utf8",
        "t.jsonl, line 6": "bad_json",
        "t.jsonl, line 7": "missing_image",
        "t.jsonl, line 8": "unknown_format",
        "t.jsonl, line 9": "empty_caption",
        "t.jsonl, line 10": "missing_column",
        "t.jsonl, line 11": "bad_base64",
        "t.jsonl, line 12": "not_local",
        "t.jsonl, line 13": "not_utf8",
        "t.jsonl, line 14": "bad_image",
    }
    assert len(found) + len(skipped) == 14  # all but the blank line


@pytest.mark.parametrize("count", [1, 2, 100])
def test_spans_do_not_change_what_is_read(tmp_path: Path, count: int) -> None:
    coded = base64.b64encode(image()).decode()
    one = write(tmp_path / "a.jsonl", *({"image": coded, "caption": f"a{i}"} for i in range(5)))
    two = tmp_path / "b.jsonl"
    two.write_text("\r\n".join(json.dumps({"image": coded, "caption": text}) for text in ("b0", "b1")), encoding="utf-8-sig")
    found, skipped = collect(json_lines([one, str(two)], columns(tmp_path, base64=True)), count)
    assert [members["txt"].decode() for members in found.values()] == ["a0", "a1", "a2", "a3", "a4", "b0", "b1"]
    assert list(found) == [f"{i:08d}" for i in range(7)]
    assert not skipped


def test_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", {"img": "a", "title": "b"})
    with pytest.raises(InputError, match=r"no column 'image' \(--image-column\); it has img, title"):
        json_lines([file], Columns())
    with pytest.raises(InputError, match=r"no column 'caption' \(--caption\)"):
        json_lines([file], Columns(image="img", captions=("{title}: {caption}",)))


@pytest.mark.parametrize(("content", "says"), [(b"[{}]", "one object a line"), (b"\x1f\x8b\x08", "gzip-compressed")])
def test_other_files_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "t.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=says):
        json_lines([str(tmp_path / "t.jsonl")], Columns())


def test_labels_extras_and_keys(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image())
    rows = [
        {"image": "a.png", "kind": kind, "id": f"x {i}.jpg", "meta": {"n": i}} for i, kind in enumerate(["pear", "apple", None, "pear"])
    ]
    reader = json_lines([write(tmp_path / "t.jsonl", *rows)], Columns(label="kind", key="id", extra=("meta.n",), root=str(tmp_path)))
    found, skipped = collect(reader)
    assert reader.classes == ["apple", "pear"]
    assert {key: members["cls"] for key, members in found.items()} == {
        "00000000_x_0_jpg": b"1",
        "00000001_x_1_jpg": b"0",
        "00000003_x_3_jpg": b"1",
    }
    assert json.loads(found["00000003_x_3_jpg"]["json"]) == {"meta.n": 3}
    assert reasons(skipped) == {"t.jsonl, line 3": "missing_label"}


def test_a_line_too_long_is_skipped_and_not_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "MAX_LINE", 200)
    (tmp_path / "a.png").write_bytes(image())
    good = {"image": "a.png", "caption": "x"}
    file = write(tmp_path / "t.jsonl", good, {"image": "a.png", "caption": "x" * 10_000}, good)
    found, skipped = collect(json_lines([file], columns(tmp_path)))
    assert list(found) == ["00000000", "00000002"]
    assert reasons(skipped) == {"t.jsonl, line 2": "long_line"}


def test_tab_separated(tmp_path: Path) -> None:
    png = image()
    (tmp_path / "a.png").write_bytes(png)
    file = write(
        tmp_path / "t.tsv",
        b"image\tcaption",
        b'a.png\tsays "hi"',
        b"a.png",
        b"a.png\tc\td",
        "\u00fc".encode("latin-1") + b"\tx",
        b"a.png\t2",
    )
    found, skipped = collect(tab_separated([file], columns(tmp_path)))
    assert [members["txt"] for members in found.values()] == [b'says "hi"', b"2"]
    assert reasons(skipped) == {"t.tsv, line 3": "bad_row", "t.tsv, line 4": "bad_row", "t.tsv, line 5": "not_utf8"}


def test_tab_separated_without_a_header(tmp_path: Path) -> None:
    coded = base64.b64encode(image())
    file = write(tmp_path / "t.tsv", b"7\t" + coded + b"\tone", b"8\t" + coded + b"\ttwo")
    reader = tab_separated([file], Columns(captions=("text",), base64=True, image="img", key="id"), ["id", "img", "text"])
    assert {key: members["txt"] for key, members in collect(reader)[0].items()} == {"00000000_7": b"one", "00000001_8": b"two"}


@given(st.binary(max_size=200))
def test_any_line_is_an_object_or_a_bad_sample(line: bytes) -> None:
    try:
        found = parse_json(line)
    except BadSample as error:
        found = error.reason
    assert isinstance(found, dict) or found in ("not_utf8", "bad_json")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), st.just(b'{"image": "QUFB", "caption": "x"}'), st.just(b"[" * 5000))), st.integers(1, 5))
def test_no_line_is_lost(found: list[bytes], count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "t.jsonl"
        data = b"\n".join(found)
        file.write_bytes(data)
        reader = reader_module.Lines((str(file),), Columns(captions=("caption",), base64=True))
        good, bad = collect(reader, count)
        assert len(good) + len(bad) == sum(bool(line.strip(b" \t\r\n\xef\xbb\xbf")) for line in data.split(b"\n"))
