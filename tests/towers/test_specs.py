"""Building from configs and names, and loading checkpoints of every layout."""

import json
import logging

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file

from mmpretrain.towers.adapters import OpenClipText, OpenClipViT
from mmpretrain.towers.specs import build_towers
from mmpretrain.towers.text import TextTransformer
from mmpretrain.towers.vision import VisionTransformer
from mmpretrain.towers.weights import load_weights

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
}
PIXELS = torch.randn(2, 3, 32, 32)
IDS = torch.tensor([[98, 5, 6, 99, *[0] * 12], [98, 7, 99, *[0] * 13]])


def clip(**options):
    torch.manual_seed(5)
    return CLIP(**CONFIG, **options)


def assert_equals(dual, model):
    torch.testing.assert_close(dual.visual(PIXELS).features, model.encode_image(PIXELS), atol=1e-5, rtol=0)
    torch.testing.assert_close(dual.text(IDS).features, model.encode_text(IDS), atol=1e-5, rtol=0)


def test_every_open_clip_model_builds_natively_or_says_why(caplog):
    native = set()
    for name in ("ViT-B-32", "ViT-B-16-quickgelu", "ViT-S-16", "ViT-B-16-plus-240"):
        with torch.device("meta"):
            dual = build_towers(name)
        assert isinstance(dual.visual, VisionTransformer)
        assert isinstance(dual.text, TextTransformer)
        native.add(name)
    caplog.set_level(logging.INFO)
    with torch.device("meta"):
        dual = build_towers("ViTamin-S", text=False)
    assert not isinstance(dual.visual, VisionTransformer)
    assert "timm_model_name" in caplog.text


@pytest.mark.parametrize("option", [{"qk_norm": True}, {"scale_fc": True}, {"block_type": "custom"}, {"attentional_pool": True}])
def test_unsupported_options_fall_back_to_open_clip(option, caplog):
    caplog.set_level(logging.INFO)
    dual = build_towers({**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], **option, "attn_pooler_heads": 2}})
    assert isinstance(dual.visual, OpenClipViT)
    assert isinstance(dual.text, TextTransformer)
    assert next(iter(option)) in caplog.text
    assert dual.visual(PIXELS).features.shape == (2, 24)


def test_open_clip_prefix_takes_its_own_modules(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(CONFIG))
    own, ours = build_towers(f"open_clip:{tmp_path}/tiny.json"), build_towers(f"{tmp_path}/tiny.json")
    assert isinstance(own.visual, OpenClipViT)
    assert isinstance(own.text, OpenClipText)
    ours.load_state_dict(own.state_dict(), strict=True)
    assert torch.allclose(own.visual(PIXELS).features, ours.visual(PIXELS).features, atol=1e-5)
    assert torch.allclose(own.text(IDS).features, ours.text(IDS).features, atol=1e-5)
    assert torch.allclose(own.text(IDS[:, :8]).features, ours.text(IDS[:, :8]).features, atol=1e-5)


@pytest.mark.parametrize("layout", ["epoch.pt", "module.pt", "plain.safetensors", "folder", "bin"])
def test_checkpoints_of_every_layout(layout, tmp_path):
    model = clip()
    state = model.state_dict()
    path = tmp_path / "open_clip_pytorch_model.bin"
    if layout == "epoch.pt":
        torch.save({"epoch": 3, "name": "x", "state_dict": state, "optimizer": {}}, path)
    elif layout == "module.pt":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    elif layout == "bin":
        torch.save(state, path)
    else:
        path = tmp_path / ("open_clip_model.safetensors" if layout == "folder" else "weights.safetensors")
        save_file(state, path)
    if layout == "folder":
        path = tmp_path
        (path / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}})
        )
        dual = build_towers(str(path))
        assert dual.preprocess.mean == (0.5, 0.5, 0.5)
        assert dual.preprocess.resize_mode == "squash"
        assert dual.preprocess.size == 32
    else:
        dual = build_towers(CONFIG)
    leftovers = load_weights(dual, path)
    assert leftovers.keys() == {"logit_scale"}
    assert_equals(dual, model)
    assert_equals(build_towers(CONFIG, pretrained=str(path)), model)


def test_pickled_code_is_refused(tmp_path):
    torch.save({"state_dict": {"x": print}}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_weights(build_towers(CONFIG), tmp_path / "evil.pt")


def test_positions_are_resized_as_open_clip_resizes_them(tmp_path):
    torch.save({"state_dict": clip().state_dict()}, tmp_path / "m.pt")
    larger = {"vision_cfg": {**CONFIG["vision_cfg"], "image_size": 48}, "text_cfg": {**CONFIG["text_cfg"], "context_length": 12}}
    theirs = CLIP(24, **larger)
    open_clip.load_checkpoint(theirs, str(tmp_path / "m.pt"))
    dual = build_towers({**CONFIG, "text_cfg": larger["text_cfg"]}, str(tmp_path / "m.pt"), image_size=48)
    assert dual.preprocess.size == 48
    torch.testing.assert_close(dual.visual.positional_embedding, theirs.visual.positional_embedding)
    torch.testing.assert_close(dual.text.positional_embedding, theirs.positional_embedding)


def test_one_tower_alone(tmp_path):
    torch.save({"state_dict": clip().state_dict()}, tmp_path / "m.pt")
    image = build_towers(CONFIG, str(tmp_path / "m.pt"), text=False)
    assert image.text is None
    assert "text_cfg" not in image.model_cfg
    assert image.embed_dim == 24
    assert build_towers(image.model_cfg).text is None  # so the checkpoint of an image-only run builds an image-only model
    assert build_towers(CONFIG, image=False).visual is None
    save_file(image.state_dict(), tmp_path / "image.safetensors")
    both = build_towers(CONFIG)
    before = both.text.text_projection.clone()
    with pytest.raises(ValueError, match=r"missing: text\."):
        load_weights(both, tmp_path / "image.safetensors")
    assert load_weights(both, tmp_path / "image.safetensors", absent="keep") == {}
    assert torch.equal(both.text.text_projection, before)
    assert torch.equal(both.visual.proj, image.visual.proj)


def test_mismatches_name_the_keys(tmp_path):
    state = clip().state_dict()
    del state["visual.proj"]
    state["visual.extra"] = torch.zeros(1)
    state["ln_final.weight"] = torch.zeros(7)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="does not fit") as error:
        load_weights(build_towers(CONFIG), tmp_path / "m.safetensors")
    for part in ("1 missing: visual.proj", "1 unexpected: visual.extra", "text.ln_final.weight [7] instead of [32]"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("ViT-B-33",), "did you mean ViT-B-32"),
        (("timm:resnet18x",), "did you mean resnet18"),
        (("hf:/nowhere",), "no config.json"),
        (({**CONFIG, "vision_cfg": {"widht": 3}},), "vision_cfg.widht .did you mean width"),
        (({**CONFIG, "embed_dims": 3},), "embed_dims .did you mean embed_dim"),
        (({"vision_cfg": {}},), "expected embed_dim"),
        (("coca_ViT-B-32",), "caption decoder"),
        (("ViT-B-32", "laion3b"), "its tags are"),
        ((CONFIG, "/nowhere.pt"), "neither a file"),
        (("nowhere/model.json",), "does not exist"),
        (({**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "image_size": [32, 64]}},), "not square"),
    ],
)
def test_errors_name_the_remedy(arguments, told):
    with pytest.raises(ValueError, match=told):
        build_towers(*arguments)


def test_tokenizer_follows_the_config():
    assert build_towers(CONFIG).tokenizer == "clip"
    with torch.device("meta"):
        assert build_towers("ViT-B-16-SigLIP", image=False).tokenizer == "ViT-B-16-SigLIP"
