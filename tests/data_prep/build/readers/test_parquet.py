"""Parquet tables and Hugging Face sets, small and local."""

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.build.readers.columns import Columns
from data_prep.build.readers.hf_datasets import Streamed, from_dataset, load
from data_prep.build.readers.parquet import parquet_files, rows
from data_prep.records import InputError
from tests.data_prep.build.readers.support import collect, image, reasons

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")
IMAGES = [image((i * 20, 0, 0), kind) for i, kind in enumerate(["PNG", "JPEG", "WEBP", "PNG", "JPEG", "PNG", "PNG"])]
CAPTION = Columns(captions=("caption",))


def table(path: Path, columns: dict[str, Any], group: int = 2) -> str:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=group)
    return str(path)


@pytest.mark.parametrize("count", [1, 3, 100])
def test_parquet_rows_over_groups_and_files(tmp_path: Path, count: int) -> None:
    files = [
        table(tmp_path / "0.parquet", {"image": IMAGES[:5], "caption": list("abcde"), "x": [[1.0]] * 5}),
        table(tmp_path / "1.parquet", {"image": IMAGES[5:], "caption": ["f", ""], "x": [[1.0]] * 2}, 10),
    ]
    found, skipped = collect(parquet_files(files, CAPTION), count)
    assert list(found) == [f"{i:08d}" for i in range(6)]
    assert [members["txt"].decode() for members in found.values()] == list("abcdef")
    assert [next(data for name, data in members.items() if name != "txt") for members in found.values()] == IMAGES[:6]
    assert reasons(skipped) == {"1.parquet, row 1": "empty_caption"}


def test_parquet_paths_base64_and_objects(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGES[0])
    cells = [{"bytes": IMAGES[1], "path": "x"}, {"bytes": None, "path": "a.png"}, None, {"bytes": b"", "path": None}]
    file = table(tmp_path / "t.parquet", {"image": cells, "caption": [["a", "b"], ["c"], ["d"], ["e"]]})
    found, skipped = collect(parquet_files([file], Columns(captions=("caption",), root=str(tmp_path))))
    assert found["00000000"]["jpg"] == IMAGES[1]
    assert found["00000001"]["png"] == IMAGES[0]
    assert json.loads(found["00000000"]["json"]) == {"captions": ["a", "b"]}
    assert reasons(skipped) == {"t.parquet, row 2": "missing_image", "t.parquet, row 3": "unknown_format"}


def test_parquet_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 or not")
    with pytest.raises(InputError, match="not a readable parquet file"):
        parquet_files([str(tmp_path / "t.parquet")], CAPTION)
    with pytest.raises(InputError, match=r"no column 'image' \(--image-column\); it has photo"):
        parquet_files([table(tmp_path / "u.parquet", {"photo": IMAGES})], CAPTION)


def a_set(n: int = 7) -> Any:
    features = datasets.Features(
        {"image": datasets.Image(), "caption": datasets.Value("string"), "kind": datasets.ClassLabel(names=["pear", "fig"])}
    )
    rows = {
        "image": [{"bytes": data, "path": None} for data in IMAGES[:n]],
        "caption": [*"abcdef", ""][:n],
        "kind": [i % 2 for i in range(n)],
    }
    return datasets.Dataset.from_dict(rows, features)


def test_parquet_names_the_classes_of_its_metadata(tmp_path: Path) -> None:
    a_set().to_parquet(str(tmp_path / "t.parquet"))
    reader = parquet_files([str(tmp_path / "t.parquet")], Columns(label="kind"))
    assert reader.classes == ["pear", "fig"]
    assert [members["cls"] for members in collect(reader)[0].values()] == [b"0", b"1"] * 3 + [b"0"]


def check(reader: Any) -> None:
    found, skipped = collect(reader)
    assert reader.classes == ["pear", "fig"]
    assert [members["txt"].decode() for members in found.values()] == list("abcdef")
    assert [next(data for name, data in members.items() if name not in ("txt", "cls")) for members in found.values()] == IMAGES[:6]
    assert [members["cls"] for members in found.values()] == [b"0", b"1"] * 3
    assert [item.reason for item in skipped] == ["empty_caption"]


LABELLED = Columns(captions=("caption",), label="kind")


def test_saved_set(tmp_path: Path) -> None:
    a_set().save_to_disk(str(tmp_path / "d"))
    check(from_dataset(load(str(tmp_path / "d"), None, None, False, None, None), LABELLED, "d"))


def test_saved_splits(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": a_set(), "test": a_set(2)}).save_to_disk(str(tmp_path / "d"))
    check(from_dataset(load(str(tmp_path / "d"), None, "train", False, None, None), LABELLED, "d"))
    with pytest.raises(InputError, match="--split one of train, test"):
        load(str(tmp_path / "d"), None, None, False, None, None)
    with pytest.raises(InputError, match="has the splits train, test, and not val"):
        load(str(tmp_path / "d"), None, "val", False, None, None)
    with pytest.raises(InputError, match="has no column 'text'"):
        from_dataset(a_set(), Columns(captions=("text",)), "d")


@pytest.mark.parametrize("stream", [False, True])
def test_loaded_set(tmp_path: Path, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    a_set().to_parquet(str(tmp_path / "t.parquet"))
    reader = from_dataset(load("parquet", None, "train", stream, None, [str(tmp_path / "t.parquet")]), LABELLED, "t")
    assert reader.stream == stream
    check(reader)


def test_a_stream_that_is_no_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent"):
        load(str(tmp_path / "absent"), None, None, False, None, None)


def test_streamed_rows_are_told_apart_by_content() -> None:
    one, two = Streamed(0, ({"image": b"a" * 10_000},)), Streamed(0, ({"image": b"b" * 10_000},))
    assert repr(one) != repr(two)
    assert len(repr(one)) < 200


def test_labels_of_a_stream() -> None:
    numbers = datasets.Dataset.from_dict({"image": IMAGES[:2], "kind": [1, 0]}).to_iterable_dataset()
    assert [members["cls"] for members in collect(from_dataset(numbers, Columns(label="kind"), "s"))[0].values()] == [b"1", b"0"]
    names = datasets.Dataset.from_dict({"image": IMAGES[:2], "kind": ["b", "a"]}).to_iterable_dataset()
    with pytest.raises(InputError, match="--classes FILE"):
        from_dataset(names, Columns(label="kind"), "s")
    found, _ = collect(from_dataset(names, Columns(label="kind", classes=("a", "b")), "s"))
    assert [members["cls"] for members in found.values()] == [b"1", b"0"]


def test_a_stream_is_not_sent_to_the_workers_and_stranger_paths_are_not_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from data_prep.build.readers import hf_datasets

    (tmp_path / "in").mkdir()
    for place in ("in/a.png", "outside.png"):
        (tmp_path / place).write_bytes(image())
    rows = [{"image": {"bytes": None, "path": str(tmp_path / place)}} for place in ("in/a.png", "outside.png")]
    columns = Columns(root=".", folders=hf_datasets.folders("set", str(tmp_path / "in"), []))
    stream = hf_datasets.from_dataset(datasets.IterableDataset.from_generator(lambda: iter(rows)), columns, "set")
    assert pickle.loads(pickle.dumps(stream)).dataset is None
    for reader in (stream, hf_datasets.from_dataset(datasets.Dataset.from_list(rows), columns, "set")):
        found, skipped = collect(reader)
        assert list(found.values()) == [{"png": image()}]
        assert [item.reason for item in skipped] == ["outside_root"]
    assert hf_datasets.folders("set", None, [str(tmp_path / "in" / "*.png")])[0] == str(tmp_path / "in")


def test_a_row_group_is_decoded_once_whatever_the_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    original = parquet.ParquetFile.iter_batches

    def counted(self: object, *given: object, **more: object) -> Iterator[Any]:
        for batch in original(self, *given, **more):
            decoded.append(len(batch))
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    for group in (1000, 300, 7):
        parquet.write_table(pyarrow.table({"image": list(range(1000))}), tmp_path / f"{group}.parquet", row_group_size=group)
    names = [str(tmp_path / f"{group}.parquet") for group in (1000, 300, 7)]
    for name in names:
        for step in (1, 2):  # every second task, as one of two workers gets them
            decoded.clear()
            for start in range(0, 1000, 50 * step):
                assert [(i, row["image"]) for i, row in rows(name, start, start + 50, ["image"])] == [
                    (i, i) for i in range(start, start + 50)
                ]
            assert sum(decoded) <= 1000
    for start, stop in ((990, 2000), (5, 6), (300, 600), (0, 0), (1000, 1001), (299, 301)):
        for name in names:
            assert [i for i, _ in rows(name, start, stop, ["image"])] == list(range(start, min(stop, 1000)))


def test_a_file_that_changes_or_cannot_be_decoded(tmp_path: Path) -> None:
    name = tmp_path / "t.parquet"
    for value in (1, 2):
        parquet.write_table(pyarrow.table({"image": [value] * 50}), name)
        os.utime(name, ns=(value, value))
        assert next(rows(str(name), 0, 1, ["image"])) == (0, {"image": value})
    data = bytearray(name.read_bytes())
    data[4:40] = b"\xff" * 36  # the header of the first page
    name.write_bytes(data)
    with pytest.raises(InputError, match=r"rows from 0: not decodable .*Fetch or write the file again"):
        list(rows(str(name), 0, 50, ["image"]))
