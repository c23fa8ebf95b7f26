"""One bad cell costs one row, in every reader of tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.build.readers.columns import Columns
from data_prep.build.readers.csv_table import Table
from data_prep.build.readers.hf_datasets import from_dataset, load
from data_prep.build.readers.json_lines import json_lines, tab_separated
from data_prep.build.readers.parquet import parquet_files
from mmpretrain.data.schema import BadSample
from tests.data_prep.build.readers.support import collect, image

PHOTOS = [image((i * 20, 0, 0)) for i in range(5)]
FAR = pa.array([1, 2, 9_000_000_000_000_000, 4, 5], pa.timestamp("ms"))
NOT_UTF8 = pa.Array.from_buffers(pa.string(), 5, [None, pa.py_buffer(np.arange(6, dtype="<i4")), pa.py_buffer(b"ab\xffde")])
COLUMNS = {
    "a far date": FAR,
    "a far day": pa.array([1, 2, 2**31 - 1, 4, 5], pa.date32()),
    "an endless duration": pa.array([1, 2, 10**18, 4, 5], pa.duration("s")),
    "text that is not UTF-8": NOT_UTF8,
    "a far date in a list": pa.ListArray.from_arrays(pa.array(range(6), pa.int32()), FAR),
    "a far date in an object": pa.StructArray.from_arrays([FAR], ["when"]),
}


@pytest.fixture(params=COLUMNS)
def table(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A parquet file whose third row has a bad cell."""
    columns = {"image": pa.array(PHOTOS, pa.binary()), "text": list("abcde"), "odd": COLUMNS[request.param]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    return str(tmp_path / "t.parquet")


WANTED = Columns("image", ("text",), extra=("odd",))


def check(reader: Any) -> None:
    records, left_out = collect(reader)
    assert [members["png"] for members in records.values()] == [*PHOTOS[:2], *PHOTOS[3:]]
    assert [members["txt"] for members in records.values()] == [b"a", b"b", b"d", b"e"]
    assert [(item.where.rpartition(", ")[2], item.reason) for item in left_out] == [("row 2", "bad_cell")]
    assert left_out[0].detail.startswith("column odd cannot be read: ")


def test_parquet(table: str) -> None:
    check(parquet_files([table], WANTED))


def test_a_loaded_set(table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    dataset = load("parquet", None, "train", False, None, [table])
    check(from_dataset(dataset, WANTED, "t"))


def test_a_stream(table: str) -> None:
    check(from_dataset(load("parquet", None, "train", True, None, [table]), WANTED, "t"))


def test_a_column_that_is_not_wanted_costs_nothing(table: str) -> None:
    records, left_out = collect(parquet_files([table], Columns("image", ("text",))))
    assert len(records) == 5
    assert not left_out


def test_labels_are_read_around_a_bad_cell(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array(PHOTOS, pa.binary()), "label": NOT_UTF8}), tmp_path / "t.parquet")
    reader = parquet_files([str(tmp_path / "t.parquet")], Columns("image", label="label"))
    assert reader.classes == ["a", "b", "d", "e"]
    records, left_out = collect(reader)
    assert [members["cls"] for members in records.values()] == [b"0", b"1", b"2", b"3"]
    assert [item.reason for item in left_out] == ["bad_cell"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_text_that_is_not_utf8_costs_its_row(kind: str, tmp_path: Path) -> None:
    for i, data in enumerate(PHOTOS):
        (tmp_path / f"{i}.png").write_bytes(data)
    texts = [b"a", b"b", b"\xff", b"d", b"e"]
    file = tmp_path / f"t.{kind}"
    mark = b"," if kind == "csv" else b"\t"
    if kind == "jsonl":
        file.write_bytes(b"".join(b'{"image": "%d.png", "text": "%s", "label": "%s"}\n' % (i, t, t) for i, t in enumerate(texts)))
    else:
        file.write_bytes(
            mark.join([b"image", b"text", b"label\n"]) + b"".join(mark.join([b"%d.png" % i, t, t + b"\n"]) for i, t in enumerate(texts))
        )
    columns = Columns("image", ("text",), label="label", root=str(tmp_path))
    reader = {"csv": lambda: Table.open(str(file), columns)}.get(
        kind, lambda: (json_lines if kind == "jsonl" else tab_separated)([str(file)], columns)
    )()
    assert reader.classes == ["a", "b", "d", "e"]
    records, left_out = collect(reader)
    assert [members["txt"] for members in records.values()] == [b"a", b"b", b"d", b"e"]
    assert [item.reason for item in left_out] == ["not_utf8"]


ODD_TEXTS = ["\ud800", "../\ud800", "/etc", "..\\x", "9" * 30, "\0", "a/../../b", "data:image/png;base64,@", "\udcff.png", "C:\\x"]
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.binary(max_size=5),
    st.text(st.characters(), max_size=8),
    st.sampled_from(ODD_TEXTS),
)
NAMES = st.sampled_from(["bytes", "path", "x"])
VALUES = st.recursive(LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner)))
OPTIONS = st.fixed_dictionaries(
    {
        "captions": st.sampled_from([(), ("t",), ("{t}: {x}",), ("t.x", "t")]),
        "key": st.sampled_from([None, "t"]),
        "label": st.sampled_from([None, "l"]),
        "classes": st.sampled_from([None, ("a", "b")]),
        "extra": st.sampled_from([(), ("t", "l")]),
        "base64": st.booleans(),
        "join": st.sampled_from([(), (("t", "|"),)]),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(["image", "t", "x", "l"]), VALUES), OPTIONS)
def test_any_row_is_a_record_or_a_bad_sample(row: dict[str, Any], options: dict[str, Any]) -> None:
    columns = Columns(**options, root="/nowhere", table="/nowhere/t")
    columns.source(row)
    for given_image in (row.get("image"), PHOTOS[0]):
        try:
            record = columns.record(3, row | {"image": given_image})
        except BadSample as error:
            json.dumps(error.detail)
            continue
        record.check()
