"""What a recipe amounts to, against numbers worked out by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from data_prep.mix.command import mix_of
from data_prep.mix.report import amount, show
from data_prep.records import Record
from data_prep.shards.serial import write_shards
from mmpretrain.config.recipe import assemble
from mmpretrain.data.schema import ShardError
from tests.runs import picture, recipe, shards
from tests.tiny import MODEL


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 captioned, 30 bare pictures; 4 uncaptioned among 20."""
    folder = shards(tmp_path_factory.mktemp("mix"))
    partly = (Record(f"r{i:02d}", {"png": picture(i)} | ({"txt": b"one two three"} if i >= 4 else {})) for i in range(20))
    write_shards(partly, folder / "partly")
    return folder


def found(root: Path, run_dir: Path, samples_per_s: float | None = None, **changes) -> dict:
    return mix_of(assemble(recipe(root, run_dir, **changes)), samples_per_s)


def test_rows_epochs_and_time_by_hand(root: Path, tmp_path: Path) -> None:
    d = found(root, tmp_path, samples_per_s=6.0)
    assert (d["steps"], d["rows_per_step"], d["rows"]) == (12, 12, 144)
    pairs, photos = d["sources"]["pairs"], d["sources"]["photos"]
    assert (pairs["samples"], pairs["shards"], pairs["rows"]) == (40, 4, 96)
    assert pairs["share"] == pytest.approx(2 / 3)
    assert pairs["epochs"] == pytest.approx(96 / 40)
    assert (pairs["seen_at_least"], pairs["seen_at_most"]) == (2, 3)
    assert photos["epochs"] == pytest.approx(48 / 30)
    assert pairs["objectives"] == ["clip", "masked_text"]
    assert d["time"] == {"samples_per_s": 6.0, "seconds": 24.0, "measured": "given"}


def test_tokens_by_hand(root: Path, tmp_path: Path) -> None:
    side = MODEL["vision_cfg"]["image_size"] // MODEL["vision_cfg"]["patch_size"]
    write_shards([Record(f"c{i}", {"png": picture(i), "txt": b"a red fox" if i % 2 else b"fox"}) for i in range(10)], tmp_path / "s")
    sources = {"pairs": {"shards": str(tmp_path / "s"), "batch_size": 5}}
    objectives = {"clip": {"source": "pairs"}, "simclr": {"source": "pairs"}}
    line = found(root, tmp_path / "run", sources=sources, objectives=objectives, steps=10, teacher=None)["sources"]["pairs"]
    assert line["image_tokens"] == 50 * 3 * side**2  # one view for CLIP, two for SimCLR
    assert line["text_tokens"] == 50 * 4  # 5 and 3 tokens with begin and end
    shared = {"clip": {"source": "pairs", "augment": "simclr"}, "simclr": {"source": "pairs", "augment": "simclr"}}
    line = found(root, tmp_path / "run", sources=sources, objectives=shared, steps=10, teacher=None)["sources"]["pairs"]
    assert line["image_tokens"] == 50 * 2 * side**2  # CLIP's view is SimCLR's first
    dropped = {"clip": {"source": "pairs", "token_drop": 0.5}}
    line = found(root, tmp_path / "run", sources=sources, objectives=dropped, steps=10, teacher=None)["sources"]["pairs"]
    assert line["image_tokens"] == 50 * (side**2 - round(0.5 * side**2))


def test_parts_of_a_blend_have_epochs_of_their_own(root: Path, tmp_path: Path) -> None:
    parts = [{"path": str(root / "photos"), "weight": 3.0}, {"path": str(root / "partly"), "weight": 1.0}]
    d = found(
        root, tmp_path, sources={"photos": {"shards": parts, "batch_size": 8}}, objectives={"simclr": {"source": "photos"}}, steps=100
    )
    line = d["sources"]["photos"]
    assert [(p["samples"], p["share"], p["epochs"]) for p in line["parts"]] == [(30, 0.75, 20.0), (20, 0.25, 10.0)]
    assert (line["samples"], line["seen_at_least"], line["seen_at_most"]) == (50, 10, 20)


def test_epochs_of_a_source_become_steps(root: Path, tmp_path: Path) -> None:
    d = found(root, tmp_path, steps=None, epochs={"source": "pairs", "count": 3})
    assert d["steps"] == 15
    assert d["sources"]["pairs"]["epochs"] == 3.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 2}, "0.40 epochs: 60% of its samples are never seen"),
        ({"steps": 1000}, "overfitting is likely"),
        ({"optim": {"lr": 1e-3, "warmup_steps": 12}}, "the learning rate never gets to its peak"),
    ],
)
def test_warnings(root: Path, tmp_path: Path, changes: dict, said: str) -> None:
    assert any(said in warning for warning in found(root, tmp_path, **changes)["warnings"])


def test_nothing_is_said_of_a_sound_recipe(root: Path, tmp_path: Path) -> None:
    assert found(root, tmp_path)["warnings"] == []


def test_samples_without_captions_and_shared_shards_are_told(root: Path, tmp_path: Path) -> None:
    sources = {name: {"shards": str(root / "partly"), "batch_size": 32} for name in ("pairs", "photos")}
    said = "\n".join(found(root, tmp_path, sources=sources)["warnings"])
    assert "4 of 20 samples have no txt" in said
    assert "the run will stop" not in said  # ten bad samples are always allowed
    assert "pairs and photos read the same 1 shards" in said
    assert "32 rows a step from 20 samples: the same sample comes twice" in said


def test_a_source_that_cannot_be_opened_is_named_and_the_rest_told(root: Path, tmp_path: Path) -> None:
    sources = {"pairs": {"shards": str(root / "photos"), "batch_size": 8}, "photos": {"shards": str(root / "photos"), "batch_size": 4}}
    d = found(root, tmp_path, sources=sources)
    assert any("0 of 30 samples have txt" in warning for warning in d["warnings"])
    assert d["sources"]["photos"]["samples"] == 30
    show(d, Console(file=io.StringIO()))
    with pytest.raises(ShardError, match="no such shard"):
        found(root, tmp_path, sources={name: {"shards": "nowhere/*.tar", "batch_size": 4} for name in ("pairs", "photos")})


def test_speed_is_read_from_the_run(root: Path, tmp_path: Path) -> None:
    rates = [1.0, 2.0, 8.0, 8.0]
    lines = [{"step": i + 1, "samples_seen": 12 * (i + 1), "samples_per_s": rate} for i, rate in enumerate(rates)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    d = found(root, tmp_path)
    assert (d["time"]["samples_per_s"], d["time"]["seconds"]) == (8.0, 18.0)
    assert d["warnings"] == []
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0] | {"samples_seen": 99}) + "\n")
    assert any("measured with 99 rows a step" in warning for warning in found(root, tmp_path)["warnings"])


def test_the_command(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from data_prep.mix.command import mix

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(root, tmp_path / "run")))
    mix(path, ["steps=24"], samples_per_s=12.0)
    told = capsys.readouterr().out
    assert "24 steps, about 0:00:24 at 12 samples/s, as given" in told
    assert "4.80" in told  # epochs over pairs
    mix(path, [], as_json=True)
    assert json.loads(capsys.readouterr().out)["rows"] == 144


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (0, "0"), (9_999, "9,999"), (12_345, "12.3 k"), (2.5e6, "2.5 M"), (3e9, "3 G")])
def test_amounts(value: float | None, text: str) -> None:
    assert amount(value) == text
