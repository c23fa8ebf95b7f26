"""`index`, `validate`, `build shards` and evaluators give the same account of a tar whose members are links."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from data_prep.__main__ import app
from data_prep.build.readers.webdataset import shards
from mmpretrain.evaluators.data.datasets import DataConfig, open_dataset
from tests.data.generated import encoded, picture
from tests.data.test_tar_members import FILE, HARD, SOFT, Entry, tar_of
from tests.data_prep.build.readers.support import collect, samples


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "400"})


PHOTOS = [encoded(picture(i)) for i in range(4)]
LINKED: list[Entry] = [
    *((f"{i:03d}.{extension}", FILE, content) for i in range(4) for extension, content in (("jpg", PHOTOS[i]), ("cls", b"0"))),
    ("004.jpg", HARD, "001.jpg"),
    ("004.cls", FILE, b"1"),
    ("005.jpg", SOFT, "./002.jpg"),
    ("005.cls", SOFT, "000.cls"),
]
DANGLING: list[Entry] = [*LINKED, ("006.jpg", SOFT, "../photos/6.jpg"), ("007.jpg", SOFT, "008.jpg"), ("008.jpg", SOFT, "007.jpg")]


@pytest.fixture
def shard(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "in" / "0.tar"
    path.parent.mkdir()
    path.write_bytes(tar_of(request.param))
    return path


@pytest.mark.parametrize("shard", [LINKED], indirect=True)
def test_links_to_members_are_samples_everywhere(shard: Path, tmp_path: Path) -> None:
    indexed = run("index", shard)
    assert indexed.exit_code == 0
    assert "6 samples (6 cls, 6 jpg, 3 of the members are links)" in indexed.output
    validated = run("validate", shard, "--json", "--processes", "1")
    verdict = json.loads(validated.stdout)
    assert (validated.exit_code, verdict["total"], verdict["good"], verdict["verified"]) == (0, 6, 6, 6)
    assert verdict["counts"] == {"linked_member": 3}
    read, left_out = collect(shards([str(shard)]))
    assert not left_out
    assert [members["jpg"] for members in read.values()] == [*PHOTOS, PHOTOS[1], PHOTOS[2]]
    assert [members["cls"] for members in read.values()] == [b"0"] * 4 + [b"1", b"0"]
    evaluated = open_dataset(DataConfig(str(shard)), "classification")
    assert [item.read() for item in evaluated.items] == [members["jpg"] for members in read.values()]


@pytest.mark.parametrize("shard", [LINKED], indirect=True)
def test_repair_writes_the_bytes_that_links_lead_to(shard: Path, tmp_path: Path) -> None:
    run("validate", shard, "--repair", tmp_path / "out", "--processes", "1")
    assert samples(tmp_path / "out")["004"] == {"jpg": PHOTOS[1], "cls": b"1"}
    assert json.loads(run("validate", tmp_path / "out", "--json", "--processes", "1").stdout)["counts"] == {}


@pytest.mark.parametrize("shard", [DANGLING], indirect=True)
def test_links_that_lead_nowhere_are_counted_and_named_everywhere(shard: Path, tmp_path: Path) -> None:
    indexed = run("index", shard)
    assert indexed.exit_code == 1
    assert "6 samples" in indexed.output
    assert all(name in indexed.output for name in ("006.jpg is a symbolic link to '../photos/6.jpg'", "007.jpg", "008.jpg"))
    verdict = json.loads(run("validate", shard, "--json", "--processes", "1").stdout)
    assert (verdict["total"], verdict["good"], verdict["lost"], verdict["lost_is_estimated"]) == (9, 6, 3, False)
    assert verdict["counts"]["dangling_link"] == 3
    assert [finding["key"] for finding in verdict["findings"] if finding["kind"] == "dangling_link"] == ["006", "007", "008"]
    read, left_out = collect(shards([str(shard)]))
    assert len(read) == 6
    assert [item.reason for item in left_out] == ["dangling_link"] * 3
    evaluated = open_dataset(DataConfig(str(shard), max_bad_fraction=0.5), "classification")
    assert len(evaluated) == 6
    assert [entry["key"] for entry in evaluated.skipped] == ["0.tar/006", "0.tar/007", "0.tar/008"]
    built = run("build", "shards", shard, "--out", tmp_path / "out", "--skip-bad", "--processes", "1")
    assert built.exit_code == 0
    assert "3 inputs left out" in built.output
    assert run("build", "shards", shard, "--out", tmp_path / "strict", "--processes", "1").exit_code == 1
