"""A build that failed before it wrote a shard does not block its corrected command; one that wrote is not mixed with another."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from data_prep.__main__ import app
from mmpretrain.system import hold
from tests.data_prep.build.readers.support import image, samples


def build(folder: Path, *options: object, table: str = "t.csv") -> Result:
    command = ["build", "csv", folder / table, "--out", folder / "out", "--processes", 1, *options]
    return CliRunner().invoke(app, [str(a) for a in command], env={"COLUMNS": "300", "TERM": "dumb"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(image((i, 0, 0)))
    (tmp_path / "t.csv").write_text("image,caption,other\n" + "".join(f"{i}.png,words {i},x\n" for i in range(3)))
    (tmp_path / "wrong.csv").write_text("image,caption\ngone.png,x\n")
    return tmp_path


def test_other_inputs_replace_a_build_that_wrote_nothing(folder: Path) -> None:
    failed = build(folder, "--caption", "caption", table="wrong.csv")
    assert failed.exit_code == 1
    assert "missing_image" in failed.output
    corrected = build(folder, "--caption", "caption", "--max-count", 2)
    assert corrected.exit_code == 0, corrected.output
    assert len(samples(folder / "out")) == 3
    assert not (folder / "out" / "unfinished").exists()


@pytest.mark.parametrize("options", [(), ("--holdout", 0.5)])
@pytest.mark.parametrize("before", [(), ("--holdout", 0.5)])
def test_a_finished_build_without_samples_is_replaced(options: tuple[object, ...], before: tuple[object, ...], folder: Path) -> None:
    failed = build(folder, "--skip-bad", *before, table="wrong.csv")
    assert failed.exit_code == 1
    assert "no sample was written" in failed.output
    corrected = build(folder, *options)
    assert corrected.exit_code == 0, corrected.output
    found = [samples(folder / "out" / part) for part in (("train", "holdout") if options else ("",))]
    assert sum(map(len, found)) == 3
    assert not list((folder / "out").rglob("skipped.jsonl"))


def test_a_corrected_input_is_read_again_where_its_task_wrote_nothing(folder: Path) -> None:
    """The first task is done, without a shard, when the second fails; then the file that the first lacked is there."""
    (folder / "t.csv").write_text("image,caption\nlate.png,x\n0.png,\n")
    first = build(folder, "--caption", "caption", "--max-count", 1)
    assert first.exit_code == 1
    (folder / "late.png").write_bytes(image((9, 9, 9)))
    second = build(folder, "--caption", "caption", "--max-count", 1, "--skip-bad")
    assert second.exit_code == 0, second.output
    assert len(samples(folder / "out")) == 1


def test_a_build_that_wrote_a_shard_is_not_replaced(folder: Path) -> None:
    (folder / "t.csv").write_text("image,caption\n0.png,good\ngone.png,bad\n")
    assert build(folder, "--max-count", 1).exit_code == 1
    assert list((folder / "out").glob("*.tar"))
    refused = build(folder, "--max-count", 2)
    assert refused.exit_code == 1
    assert "unfinished build of other inputs or options" in refused.output


def test_a_build_that_is_running_is_not_replaced(folder: Path) -> None:
    assert build(folder, table="wrong.csv").exit_code == 1
    lock = hold(folder / "out" / "unfinished" / "lock", wait=False)
    try:
        refused = build(folder)
    finally:
        lock.close()
    assert refused.exit_code == 1
    assert "another process is building" in refused.output
