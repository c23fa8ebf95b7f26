"""The scripts of examples/ do what they say, on tiny data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mmpretrain.config import recipe as recipes
from mmpretrain.config.build import build
from mmpretrain.objectives import OBJECTIVES
from mmpretrain.trainer import train
from mmpretrain.types import Encoded
from tests import runs, tiny

ROOT = Path(__file__).resolve().parents[1]


def run(script: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "examples" / script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    objectives = {"clip": {"source": "pairs"}}
    path = runs.write_recipe(data / "clip.yaml", runs.recipe(data, data / "run", objectives=objectives, steps=2))
    assert train(recipes.load(path, ["sources.photos=null"])) == 0
    return data / "run"


@pytest.fixture
def own_objective(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import own_objective

    return own_objective


@pytest.mark.slow
def test_training_from_python_compares_learning_rates(data: Path, tmp_path: Path) -> None:
    path = runs.write_recipe(tmp_path / "r.yaml", runs.recipe(data, tmp_path / "runs", steps=3))
    done = run("train_from_python.py", path, "optim.lr=0.002")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("lr ")]
    assert [line.split()[1] for line in lines] == ["0.001:", "0.002:", "0.004:"]
    last = {rate: runs.logged(tmp_path / "runs" / f"lr_{rate}")[-1]["loss"] for rate in ("0.001", "0.002", "0.004")}
    assert lines == [f"lr {rate}: loss {loss:.4f}" for rate, loss in last.items()]
    assert len(set(last.values())) == 3


@pytest.mark.slow
def test_a_folder_is_scored_against_texts(trained: Path, tmp_path: Path) -> None:
    """One line an image, the similarities those of the run's towers; what is no image is named and left out."""
    from mmpretrain.checkpoint import find_checkpoint
    from mmpretrain.data.decode import ImageLimits, decode_image
    from mmpretrain.evaluators.features import center_view
    from mmpretrain.evaluators.models import load_model

    (tmp_path / "sub").mkdir()
    for number in range(2):
        (tmp_path / "sub" / f"{number}.png").write_bytes(runs.picture(number))
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "notes.txt").write_text("not read")
    done = run("score_folder.py", trained, tmp_path, *tiny.WORDS[:3])
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path}/broken.png: " in done.stderr
    head, *lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert head == ["image", *tiny.WORDS[:3]]
    assert [line[0] for line in lines] == [f"{tmp_path}/sub/0.png", f"{tmp_path}/sub/1.png"]
    model = load_model(str(trained), find_checkpoint=find_checkpoint)
    view = center_view(model)
    for number, line in enumerate(lines):
        pixels = view.geometry(decode_image(runs.picture(number), ImageLimits()), {})
        features = model.images(view.render(pixels[None], {}).data).features
        expected = F.cosine_similarity(features, model.texts(tiny.WORDS[:3]))
        torch.testing.assert_close(torch.tensor([float(value) for value in line[1:]]), expected, atol=1e-4, rtol=0)


def test_barlow_twins_is_the_papers_algorithm(own_objective) -> None:
    """Algorithm 1 written out, component by component, on what the projector gives before its last norm."""
    torch.manual_seed(0)
    config = build(own_objective.BarlowTwins.Config, {"source": "photos", "redundancy": 0.3, "projection": 5})
    objective = own_objective.BarlowTwins(config, tiny.context(tiny.towers()))
    views = [torch.randn(6, 16) for _ in range(2)]
    loss = objective(first=Encoded(pooled=views[0]), second=Encoded(pooled=views[1]))["loss"]
    a, b = (objective.head[:-1](view) for view in views)
    expected = 0.0
    for i in range(5):
        for j in range(5):
            left, right = ((z[:, k] - z[:, k].mean()) / (z[:, k].var(unbiased=False) + 1e-5).sqrt() for z, k in ((a, i), (b, j)))
            correlation = (left * right).mean()
            expected = expected + ((1 - correlation) ** 2 if i == j else 0.3 * correlation**2)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in objective.parameters())


@pytest.mark.slow
def test_an_objective_outside_the_package_trains(own_objective, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES.known, "twins", own_objective.BarlowTwins)
    recipe = runs.recipe(data, tmp_path / "run", objectives={"twins": {"source": "photos", "projection": 8, "augment": "weak"}}, steps=40)
    recipe["sources"] = {"photos": recipe["sources"]["photos"] | {"batch_size": 30}}
    assert train(recipes.load(runs.write_recipe(tmp_path / "r.yaml", recipe), ["optim.lr=0.003"])) == 0
    losses = [line["twins/loss"] for line in runs.logged(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
