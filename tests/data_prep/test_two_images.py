"""Samples with two images: an option says which member is the image, in a source, in evaluators, `build` and `validate`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from data_prep.__main__ import app
from mmpretrain.data.decode import decode_image
from mmpretrain.data.schema import ShardError, several_images
from mmpretrain.data.source import Source, SourceConfig
from mmpretrain.data.views import CenterView
from mmpretrain.evaluators.base import OptionError
from mmpretrain.evaluators.data.datasets import DataConfig, open_dataset
from tests.data.generated import encoded, picture, tar_bytes
from tests.data_prep.build.readers.support import samples

RED, BLUE = encoded(picture(1), "JPEG"), encoded(picture(2, (64, 48)), "PNG")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments] + ["--processes", "1"], env={"COLUMNS": "400"})


@pytest.fixture(params=[("jpg", "png"), ("input.jpg", "target.png")])
def members(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture
def shard(members: tuple[str, str], tmp_path: Path) -> Path:
    content = [(f"{i}.{name}", data) for i in range(4) for name, data in ((members[0], RED), (members[1], BLUE), ("cls", b"0"))]
    path = tmp_path / "in" / "0.tar"
    path.parent.mkdir()
    path.write_bytes(tar_bytes(content))
    return path


VIEW = CenterView(size=16)


def trained(shard: Path, **options: object) -> bytes:
    """The pixels of the first sample's view, as training cuts them."""
    source = Source("s", SourceConfig(str(shard), batch_size=1, **options), [VIEW])  # type: ignore[arg-type]
    return source.rows(range(1)).pixels[VIEW].numpy().tobytes()


def alone(data: bytes, folder: Path) -> bytes:
    """The same of a shard without another image."""
    folder.mkdir(exist_ok=True)
    (folder / "0.tar").write_bytes(tar_bytes([("0.jpg", data)]))
    return trained(folder / "0.tar")


def test_the_option_says_which_member_is_the_image(members: tuple[str, str], shard: Path, tmp_path: Path) -> None:
    for name, data in zip(members, (RED, BLUE)):
        assert trained(shard, image_member=name) == alone(data, tmp_path / name)
        dataset = open_dataset(DataConfig(str(shard), image=name), "classification")
        assert [item.read() for item in dataset.items] == [data] * 4


def test_a_member_that_is_not_there_is_named(shard: Path, members: tuple[str, str]) -> None:
    with pytest.raises(ShardError, match="0 of 4 samples have webp; they have cls, "):
        trained(shard, image_member="webp")
    with pytest.raises(OptionError, match="0 of 4 samples have webp"):
        open_dataset(DataConfig(str(shard), image="webp", max_bad_fraction=1.0), "classification")


def test_two_images_without_the_option_are_warned_of(
    shard: Path, members: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if members == ("jpg", "png"):
        assert trained(shard) == alone(RED, tmp_path / "alone")
        assert "samples have several images (jpg, png), of which jpg is read. `image_member:` says which" in caplog.text
        caplog.clear()
        open_dataset(DataConfig(str(shard)), "classification")
        assert "several images (jpg, png)" in caplog.text
        caplog.clear()
        trained(shard, image_member="png")
        assert "several images" not in caplog.text


def test_images_of_several_formats_are_not_several_images() -> None:
    assert several_images({"jpg": 3, "png": 2, "txt": 5}, 5) is None
    assert several_images({"jpg": 4, "png": 2, "txt": 5}, 5) is not None


def test_build_resizes_the_image_and_no_other(shard: Path, members: tuple[str, str], tmp_path: Path) -> None:
    result = run("build", "shards", shard, "--out", tmp_path / "out", "--image-member", members[1], "--resize", 12)
    assert result.exit_code == 0, result.output
    for sample in samples(tmp_path / "out").values():
        assert sample[members[0]] == RED
        assert decode_image(sample[members[1]]).shape == (3, 12, 16)


def test_an_encoded_image_replaces_no_other_member(shard: Path, members: tuple[str, str], tmp_path: Path) -> None:
    result = run("build", "shards", shard, "--out", tmp_path / "out", "--image-member", members[1], "--reencode", "jpeg", "--skip-bad")
    if members == ("jpg", "png"):
        assert "4 inputs left out (4 bad_member)" in result.output
    else:
        assert all(sample["input.jpg"] == RED and "target.jpg" in sample for sample in samples(tmp_path / "out").values())


def test_validate_judges_the_image_that_is_named(shard: Path, members: tuple[str, str], tmp_path: Path) -> None:
    verdict = json.loads(run("validate", shard, "--json", "--image-member", members[1], "--min-side", 40).stdout)
    assert (verdict["good"], verdict["need"][0]) == (4, "image")
    verdict = json.loads(run("validate", shard, "--json", "--image-member", members[0], "--min-side", 40).stdout)
    assert (verdict["bad"], verdict["counts"]) == (4, {"too_small": 4})
