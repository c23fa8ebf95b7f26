"""What we export, open_clip loads, and gives the same features."""

import json
import runpy
from pathlib import Path

import open_clip
import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from mmpretrain.checkpoint import save
from mmpretrain.export import export_open_clip, load_model
from mmpretrain.towers.specs import build_towers

SCRIPT = Path(__file__).parents[1] / "scripts" / "export.py"
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
OPTIONS = {
    "plain": CONFIG,
    "quick_gelu": {**CONFIG, "quick_gelu": True},
    "timm": {**CONFIG, "vision_cfg": {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token"}},
    "resnet": {**CONFIG, "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 32}},
}


def assert_same(folder, dual, scale):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    dual.eval()
    pixels = torch.randn(3, 3, dual.preprocess.size, dual.preprocess.size)
    ids = open_clip.get_tokenizer("ViT-B-32", context_length=16)(["a photo of a cat", "two dogs", "x"])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels), dual.visual(pixels).features, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_text(ids), dual.text(ids).features, atol=1e-5, rtol=0)
    assert model.logit_scale.shape == ()
    assert model.logit_scale.item() == pytest.approx(scale)
    return model, preprocess


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_open_clip_gives_the_same_features(config, tmp_path):
    dual = build_towers(config)
    export_open_clip(dual, {"logit_scale": torch.tensor([3.25]), "logit_bias": torch.tensor([-10.0])}, tmp_path / "out")
    model, preprocess = assert_same(tmp_path / "out", dual, 3.25)
    assert model.logit_bias.item() == -10
    assert str(dual.preprocess.size) in str(preprocess)
    again, leftovers = load_model(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), dual.state_dict().values(), strict=True))
    assert leftovers["logit_scale"].item() == 3.25


def test_logit_scale_has_open_clips_first_value_where_no_objective_has_one(tmp_path):
    dual = build_towers(CONFIG)
    export_open_clip(dual, {}, tmp_path)
    model, _ = assert_same(tmp_path, dual, 2.6592600)
    assert model.logit_bias is None


def checkpoint(folder, dual):
    """A checkpoint as the trainer writes it, but for what export does not read."""
    folder.mkdir(parents=True)
    save_file({**dual.state_dict(), "logit_scale": torch.tensor(4.0)}, folder / "model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": dual.model_cfg, "preprocess_cfg": {"mean": [0.5] * 3}}))
    return folder


def run(*arguments):
    app = typer.Typer()
    app.command()(runpy.run_path(str(SCRIPT))["main"])
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_script(tmp_path):
    dual = build_towers(CONFIG)
    folder = checkpoint(tmp_path / "step-1", dual)
    done = run(folder, "--to", "open_clip", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert_same(tmp_path / "out", dual, 4.0)
    assert json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["preprocess_cfg"]["mean"] == [0.5] * 3
    assert_same(folder, dual, 4.0)  # a checkpoint folder is itself one that open_clip loads
    again = run(folder, "--out", tmp_path / "out")
    assert again.exit_code == 1
    assert "is not empty" in again.stderr
    (tmp_path / "file").touch()
    for out, message in ((tmp_path / "file", "is not a folder"), (tmp_path / "file" / "x", "Not a directory")):
        refused = run(folder, "--out", out)
        assert refused.exit_code == 1
        assert message in refused.stderr


def test_a_model_without_text_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match="needs both towers"):
        export_open_clip(build_towers(CONFIG, text=False), {}, tmp_path / "out")
    folder = checkpoint(tmp_path / "step-1", build_towers(CONFIG, text=False))
    dual, _ = load_model(folder)
    with pytest.raises(ValueError, match="visual"):
        export_open_clip(dual, {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_open_clip_would_build_otherwise_is_refused(tmp_path):
    small = {**CONFIG, "vision_cfg": {**OPTIONS["timm"]["vision_cfg"], "image_size": 32}}
    with pytest.raises(ValueError, match=r"visual\.trunk\.pos_embed differ.*own image size"):
        export_open_clip(build_towers(small), {}, tmp_path / "out")


def test_script_takes_a_run_and_refuses_a_folder_without_checkpoints(tmp_path):
    dual = build_towers(CONFIG)
    documents = {"open_clip_config": {"model_cfg": dual.model_cfg, "preprocess_cfg": {}}}
    documents["state"] = {"step": 1, "positions": {}, "skipped_steps": 0}
    for step in (1, 2):
        weights = {**dual.state_dict(), "logit_scale": torch.tensor(float(step))}
        save(tmp_path / "run" / "checkpoints", step, {"model": weights}, {}, documents, keep=2)
    done = run(tmp_path / "run", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert_same(tmp_path / "out", dual, 2.0)
    refused = run(tmp_path / "nothing", "--out", tmp_path / "other")
    assert refused.exit_code == 1
    assert "no valid checkpoint" in refused.stderr
