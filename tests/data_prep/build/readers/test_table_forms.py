"""Tables as programs write them: what Excel, Windows and other countries make of a CSV is read alike by `build` and by evaluators."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from data_prep.__main__ import app
from data_prep.build.readers.columns import Columns
from data_prep.build.readers.csv_table import Table
from data_prep.build.readers.json_lines import json_lines, tab_separated
from data_prep.build.readers.members import label_member, text_member
from data_prep.records import InputError
from mmpretrain.data.formats import decode_text
from mmpretrain.data.schema import BadSample
from mmpretrain.data.tables import Header, TableError, as_text, distinct_integers, read_rows, separator_of
from mmpretrain.evaluators.base import OptionError
from mmpretrain.evaluators.data.datasets import DataConfig, open_dataset
from tests.data_prep.build.readers.support import collect, image, reasons

PHOTOS = {"a.jpg": image((200, 0, 0), "JPEG"), "b.jpg": image((0, 200, 0), "JPEG")}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, data in PHOTOS.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.jpg").write_bytes(PHOTOS["a.jpg"])
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "400", "TERM": "dumb"})


def built(file: Path, **options: Any) -> list[tuple[str, str]]:
    """(image, caption) of every row, by `build csv`."""
    records, left_out = collect(Table.open(str(file), Columns("image", ("caption",), **options)))
    assert not left_out, left_out
    names = {data: name for name, data in PHOTOS.items()}
    return [(names[members["jpg"]], members["txt"].decode()) for members in records.values()]


def evaluated(file: Path, **options: Any) -> list[tuple[str, str]]:
    """(image, caption) of every row, by an evaluator."""
    names = {data: name for name, data in PHOTOS.items()}
    dataset = open_dataset(DataConfig(str(file), image="image", caption="caption", **options), "retrieval")
    return [(names[item.read()], text) for item in dataset.items for text in item.captions]


ROWS = [("a.jpg", "one"), ("b.jpg", "two")]
FORMS = {
    "unnamed columns of Excel": b"image,caption,,\r\na.jpg,one,,\r\nb.jpg,two,,\r\n",
    "unnamed columns left out of a row": b"image,caption,,\r\na.jpg,one\r\nb.jpg,two,,\r\n",
    "empty cells beyond the header": b"image,caption\r\na.jpg,one,,,\r\nb.jpg,two\r\n",
    "a column of no interest comes twice": b"image,x,caption,x\na.jpg,1,one,2\nb.jpg,1,two,2\n",
    "UTF-16 little endian": "image,caption\na.jpg,one\nb.jpg,two\n".encode("utf-16"),
    "UTF-16 big endian": b"\xfe\xff" + "image,caption\r\na.jpg,one\r\nb.jpg,two\r\n".encode("utf-16-be"),
    "Unicode text of Excel": "image\tcaption\r\na.jpg\tone\r\nb.jpg\ttwo\r\n".encode("utf-16"),
    "semicolons": b"image;caption;note\na.jpg;one;1,5\nb.jpg;two;2,5\n",
    "tabs": b"image\tcaption\na.jpg\tone\nb.jpg\ttwo\n",
    "carriage returns": b"image,caption\ra.jpg,one\rb.jpg,two\r",
    "a byte order mark and quotes": b'\xef\xbb\xbf"image","caption"\n"a.jpg","one"\n"b.jpg","two"\n',
    "backslashes": b"image,caption\ndeep\\a.jpg,one\n.\\b.jpg,two\n",
}


@pytest.mark.parametrize("form", FORMS)
def test_tables_are_read_in_every_form_that_programs_write(form: str, photos: Path) -> None:
    (photos / "t.csv").write_bytes(FORMS[form])
    assert built(photos / "t.csv") == ROWS
    assert evaluated(photos / "t.csv") == ROWS


def test_a_file_whose_name_has_a_backslash_is_that_file(photos: Path) -> None:
    (photos / "deep\\a.jpg").write_bytes(PHOTOS["b.jpg"])
    (photos / "t.csv").write_text("image,caption\ndeep\\a.jpg,one\n")
    assert built(photos / "t.csv") == evaluated(photos / "t.csv") == [("b.jpg", "one")]


def test_a_backslash_leads_no_further_than_a_slash(photos: Path) -> None:
    (photos / "deep" / "t.csv").write_text("image,caption\n..\\b.jpg,x\nC:\\a.jpg,y\n\\\\server\\a.jpg,z\n")
    records, left_out = collect(Table.open(str(photos / "deep" / "t.csv"), Columns("image", ("caption",))))
    assert not records
    assert [item.reason for item in left_out] == ["outside_root", "bad_path", "bad_path"]


def test_a_root_lets_paths_lead_out_of_the_tables_folder(photos: Path) -> None:
    table = photos / "deep" / "t.csv"
    table.write_text("image,caption\n../a.jpg,one\n../deep/../b.jpg,two\n")
    assert built(table, root=str(photos)) == ROWS
    assert built(table, root=str(photos / "deep" / "..")) == ROWS
    table.write_text("image,caption\n../../etc.jpg,one\n")
    _, left_out = collect(Table.open(str(table), Columns("image", ("caption",), root=str(photos))))
    assert [item.reason for item in left_out] == ["outside_root"]
    refused = run("build", "csv", table, "--out", photos / "out", "--caption", "caption", "--processes", 1)
    assert "pass --root with a folder that holds it" in refused.output


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
FOREIGN = {
    "a Git LFS pointer": LFS,
    "a gzip-compressed file": b"\x1f\x8b\x08\0\0\0\0",
    "a ZIP archive or an Excel workbook": b"PK\3\4" + bytes(30),
    "a web page": b"<!DOCTYPE html><html></html>",
    "a parquet file": b"PAR1" + bytes(20),
    "UTF-16 without a byte order mark": "image,caption\na.jpg,x\n".encode("utf-16-le"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_files_that_are_no_table_are_called_what_they_are(what: str, photos: Path) -> None:
    file = photos / "t.csv"
    file.write_bytes(FOREIGN[what])
    with pytest.raises(TableError, match=what):
        Table.open(str(file), Columns("image", ("caption",)))
    with pytest.raises(OptionError, match=what):
        evaluated(file)
    for kind in ("jsonl", "tsv"):
        with pytest.raises(InputError, match=what):
            (json_lines if kind == "jsonl" else tab_separated)([str(file)], Columns("image", ("caption",)))
    for command in (("build", "csv"), ("build", "jsonl"), ("build", "tsv")):
        result = run(*command, file, "--out", photos / "out")
        assert result.exit_code == 2
        assert what in result.output
        assert "\0" not in result.output


@pytest.mark.parametrize(("data", "what"), [("image\tx\n".encode("utf-16"), "UTF-16"), (b"image\tx\ra.jpg\t1\r", "carriage returns alone")])
def test_line_readers_name_what_they_cannot_read(data: bytes, what: str, photos: Path) -> None:
    (photos / "t.tsv").write_bytes(data)
    with pytest.raises(InputError, match=what):
        tab_separated([str(photos / "t.tsv")], Columns("image"))


def test_pointers_in_place_of_images_and_names_are_called_so(photos: Path) -> None:
    (photos / "a.jpg").write_bytes(LFS)
    (photos / "t.csv").write_text("image,caption,kind\na.jpg,one,x\nb.jpg,two,x\n")
    _, left_out = collect(Table.open(str(photos / "t.csv"), Columns("image", ("caption",))))
    assert reasons(left_out) == {"t.csv, line 2": "unknown_format"}
    assert "Git LFS pointer" in left_out[0].detail
    assert "git lfs pull" in left_out[0].detail
    (photos / "names.txt").write_bytes(LFS)
    result = run("build", "csv", photos / "t.csv", "--out", photos / "out", "--label-column", "kind", "--classes", photos / "names.txt")
    assert result.exit_code == 2
    assert "a Git LFS pointer, expected class names" in result.output
    with pytest.raises(OptionError, match="a Git LFS pointer"):
        open_dataset(DataConfig(str(photos / "t.csv"), label="kind", classes=str(photos / "names.txt")), "classification")


@pytest.mark.parametrize("bad", [b'b.jpg,"' + b"x" * 200_000 + b'"', b"b.jpg,caf\xe9", b"b.jpg,one,two,three", b'b.jpg,"never closed'])
def test_a_bad_row_costs_itself_in_an_evaluator_too(bad: bytes, photos: Path) -> None:
    (photos / "c.jpg").write_bytes(image((9, 9, 9), "JPEG"))
    file = photos / "t.csv"
    file.write_bytes(b"image,caption,label\na.jpg,one,7\n" + bad + b",1\nc.jpg,three,8\n")
    records, _ = collect(Table.open(str(file), Columns("image", ("caption",))))
    dataset = open_dataset(DataConfig(str(file), max_bad_fraction=0.6), "retrieval")
    kept = [members["txt"].decode() for members in records.values() if len(members["txt"]) < 100]
    assert [text for item in dataset.items for text in item.captions if len(text) < 100] == kept == ["one", "three"]


def test_labels_that_differ_in_spelling_are_two_classes(photos: Path) -> None:
    file = photos / "t.csv"
    file.write_text("image,label\na.jpg,007\nb.jpg,7\n")
    table = Table.open(str(file), Columns("image", label="label"))
    assert table.classes == ["007", "7"]
    assert [members["cls"] for members in collect(table)[0].values()] == [b"0", b"1"]
    dataset = open_dataset(DataConfig(str(file)), "classification")
    assert (dataset.classes, dataset.labels.tolist()) == (["007", "7"], [0, 1])


def test_labels_that_are_padded_with_zeros_are_numbers(photos: Path) -> None:
    file = photos / "t.csv"
    file.write_text("image,label\na.jpg,02\nb.jpg,10\n")
    assert Table.open(str(file), Columns("image", label="label")).classes is None
    dataset = open_dataset(DataConfig(str(file)), "classification")
    assert (dataset.classes, dataset.labels.tolist()) == (["2", "10"], [0, 1])


def test_a_label_of_absurd_digits_costs_its_row() -> None:
    with pytest.raises(BadSample, match="bad_label"):
        label_member("9" * 5000, None, "column label")


def test_two_wanted_columns_of_one_name_are_refused(photos: Path) -> None:
    (photos / "t.csv").write_text("image,caption,caption\na.jpg,x,y\n")
    with pytest.raises(TableError, match="column 'caption' comes twice"):
        Table.open(str(photos / "t.csv"), Columns("image", ("caption",)))
    with pytest.raises(OptionError, match="column 'caption' comes twice"):
        evaluated(photos / "t.csv")


def test_paths_that_no_file_can_have_cost_their_rows(photos: Path) -> None:
    (photos / "t.jsonl").write_text('{"image": "\\ud800.jpg"}\n{"image": "../\\ud800.jpg"}\n{"image": "a.jpg"}\n')
    reader = json_lines([str(photos / "t.jsonl")], Columns("image", root=str(photos)))
    records, left_out = collect(reader)
    assert len(records) == 1
    assert [item.reason for item in left_out] == ["bad_path", "bad_path"]
    result = run("build", "jsonl", photos / "t.jsonl", "--out", photos / "out", "--skip-bad", "--processes", 1)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("line", "separator"),
    [("a,b;c", ","), ("a;b,c;d", ","), ("a;b", ";"), ("a\tb", "\t"), ("a|b", "|"), ("a", ","), ('"a;b";c', ";"), ('"a', ",")],
)
def test_a_header_shows_its_separator(line: str, separator: str) -> None:
    assert separator_of(line + "\n") == separator


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


@given(
    st.integers(1, 4).flatmap(lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), min_size=1, max_size=5)),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    st.sampled_from([",", ";", "\t", "|"]),
    st.sampled_from(["\r\n", "\n"]),
)
def test_what_the_csv_module_writes_is_read_back(rows: list[list[str]], encoding: str, separator: str, end: str) -> None:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=separator, lineterminator=end, quoting=csv.QUOTE_ALL).writerows(rows)
    if encoding == "utf-8" and out.getvalue().startswith("\ufeff"):
        return
    text = as_text(io.BytesIO(out.getvalue().encode(encoding)))
    assert [fields for _, fields in read_rows(text, separator)] == rows


@given(st.binary(max_size=200), st.sampled_from([",", ";", "\t"]))
def test_any_bytes_are_rows_or_problems(data: bytes, separator: str) -> None:
    for line, fields in read_rows(as_text(io.BytesIO(data)), separator):
        assert line >= 1
        assert fields


@given(st.lists(st.one_of(st.integers(-20, 20).map(str), st.integers(0, 20).map(lambda n: f"{n:03d}"), st.sampled_from(["x", "", "-"]))))
def test_integers_are_distinct_where_no_two_spellings_are_one_number(texts: list[str]) -> None:
    numbers: dict[int, set[str]] = {}
    all_numbers = all(text.lstrip("-").isdigit() for text in texts)
    for text in texts if all_numbers else ():
        numbers.setdefault(int(text), set()).add(text)
    assert distinct_integers(texts) == (all_numbers and all(len(spellings) == 1 for spellings in numbers.values()))


def test_a_header_fits_rows_that_differ_in_unnamed_columns_alone() -> None:
    header = Header("t.csv", ("image", "", "caption", " ", ""))
    assert header.named == ["image", "caption"]
    assert header.fit(["a", "", "c"]) == ["a", "", "c", "", ""]
    assert header.fit(["a", "", "c", "", "", "", ""]) == ["a", "", "c", "", ""]
    assert header.fit(["a", ""]) == "expected 5 fields (image, , caption,  , ), found 2"
    assert header.fit(["a", "", "c", "", "", "x"]) == "expected 5 fields (image, , caption,  , ), found 6"


TEXTS = st.text(
    st.sampled_from(["a", "\u00e9", " ", "\n", "\ufeff", "\u200b", "\0", "\ud800", "\x01", "\u3000", "\U0001f9d1", "\u200d"]), max_size=6
)


def verdict(make: Any, *arguments: object) -> str:
    try:
        make(*arguments)
    except BadSample as error:
        return error.reason
    return "good"


@given(TEXTS)
def test_build_and_validate_give_one_verdict_on_a_caption(text: str) -> None:
    assert verdict(text_member, text, "caption") == verdict(decode_text, text.encode("utf-8", "surrogatepass"))
    if verdict(text_member, text, "caption") == "good":
        written = text_member(text, "caption")
        assert decode_text(written).encode() == written


@pytest.mark.parametrize("text", ["\ufeff", " \ufeff\ufeff ", "\u200b", "\u2060\u200e", "\0\x01"])
def test_a_caption_in_which_nothing_shows_is_empty(text: str, photos: Path) -> None:
    assert verdict(text_member, text, "caption") == verdict(decode_text, text.encode()) == "empty_caption"
    (photos / "t.csv").write_text(f"image,caption\na.jpg,{text}\nb.jpg,two\n")
    records, left_out = collect(Table.open(str(photos / "t.csv"), Columns("image", ("caption",))))
    assert [members["txt"] for members in records.values()] == [b"two"]
    assert [item.reason for item in left_out] == ["empty_caption"]
    assert evaluated(photos / "t.csv", max_bad_fraction=0.5) == [("b.jpg", "two")]


def test_an_empty_caption_among_others_costs_itself(photos: Path) -> None:
    (photos / "t.csv").write_text("image,caption,more\na.jpg,\ufeff,one\n")
    records, _ = collect(Table.open(str(photos / "t.csv"), Columns("image", ("caption", "more"))))
    assert [members["txt"] for members in records.values()] == [b"one"]


def test_a_caption_longer_than_training_reads_is_bad_for_build_too() -> None:
    assert verdict(text_member, "x" * 65_536, "caption") == "good"
    assert verdict(text_member, "\u00e9" * 32_769, "caption") == "too_many_bytes"
