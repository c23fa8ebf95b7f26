"""One test file over every tower we can build: native, open_clip's own, timm's, transformers'."""

import copy

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mmpretrain.towers.base import merge
from mmpretrain.towers.specs import build_towers

ALL = frozenset({"features", "pooled", "tokens"})
VISION = {"image_size": 64, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2}
BERT = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CLIP_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
CLIP_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100}
CLIP_TEXT |= {"max_position_embeddings": 16, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 1}


def config(vision=(), text=(), **top):
    return {"embed_dim": 24, "vision_cfg": {**VISION, **dict(vision)}, "text_cfg": {**TEXT, **dict(text)}, **top}


def timm(name, **fields):
    return {"embed_dim": 24, "vision_cfg": {"timm_model_name": name, "image_size": 64, **fields}}


MODELS = {
    "native": config(),
    "open_clip qk_norm": config({"qk_norm": True}, {"qk_norm": True}),
    "open_clip attentional pool": config({"attentional_pool": True, "attn_pooler_heads": 2}, {"embed_cls": True}),
    "open_clip resnet": config({"layers": [1, 1, 1, 1], "width": 8, "head_width": 16}),
    "timm resnet": timm("test_resnet"),
    "timm vit": timm("test_vit", timm_pool="token"),
    "timm channels last": timm("swin_tiny_patch4_window7_224"),
    "timm alone": "timm:test_efficientnet",
    "hf clip": "hf clip",
    "hf siglip": "hf siglip",
    "hf vit": "hf vit",
    "hf resnet": "hf resnet",
    "hf bert": "hf bert",
    "open_clip bert": "open_clip bert",
}


def transformers_config(name):
    if name == "hf clip":
        return transformers.CLIPConfig(vision_config=CLIP_VISION, text_config=CLIP_TEXT, projection_dim=24)
    if name == "hf siglip":
        return transformers.SiglipConfig(vision_config=CLIP_VISION, text_config={**CLIP_TEXT, "projection_size": 32})
    if name == "hf vit":
        return transformers.ViTConfig(**CLIP_VISION)
    if name == "hf resnet":
        return transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    return transformers.BertConfig(**BERT, pad_token_id=0)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name == "timm channels last")) for name in MODELS])
def dual(request, tmp_path_factory):
    torch.manual_seed(0)
    name = request.param
    if not isinstance(MODELS[name], str) or MODELS[name].startswith("timm:"):
        return build_towers(MODELS[name])
    folder = tmp_path_factory.mktemp("model")
    model = transformers.AutoModel.from_config(transformers_config(name))
    model.save_pretrained(folder)
    if name == "open_clip bert":
        return build_towers(config((), {"hf_model_name": str(folder), "hf_model_pretrained": False, "hf_proj_type": "linear"}))
    return build_towers(f"hf:{folder}")


def towers(dual):
    """(tower, data) of each tower."""
    size = dual.preprocess.size
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 98, (4, 16), generator=g)
    ids[:, 9], ids[:, 10:] = 99, 0
    found = [(dual.visual, torch.randn(4, 3, size, size, generator=g))] if dual.visual is not None else []
    return found + ([(dual.text, ids)] if dual.text is not None else [])


def test_outputs_have_the_promised_shapes(dual):
    for tower, data in towers(dual.eval()):
        found = tower(data, outputs=ALL)
        assert found.features.shape == (4, tower.embed_dim)
        assert tower.embed_dim == dual.embed_dim
        assert found.pooled.shape == (4, tower.width)
        assert found.tokens.shape[0] == 4
        assert found.tokens.shape[2] == tower.width
        if found.grid is not None:
            assert found.grid[0] * found.grid[1] == found.tokens.shape[1]
        only = tower(data)
        assert only.pooled is None
        assert only.tokens is None
        torch.testing.assert_close(only.features, found.features, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found.features[0], found.features[1])


def test_rows_do_not_touch_each_other(dual):
    for tower, data in towers(dual.eval()):
        torch.testing.assert_close(tower(data).features[1:3], tower(data[1:3]).features, atol=1e-5, rtol=1e-4)


def test_merged_equals_separate(dual):
    for tower, data in towers(dual.eval()):
        parts = [tower.embed(data[:3]), tower.embed(data[1:])]
        assert (tower.merge_key(parts[0]) == tower.merge_key(parts[1])) == tower.mergeable
        if tower.mergeable:
            x, _ = tower.trunk(merge(parts))
            for part, y, rows in zip(parts, x.split([3, 3]), (data[:3], data[1:])):
                found = tower.readout(y, part, frozenset({"features"})).features
                torch.testing.assert_close(found, tower(rows).features, atol=1e-5, rtol=1e-4)


def test_batch_norm_is_never_merged(dual):
    for tower in (dual.visual, dual.text):
        if tower is not None and any("BatchNorm" in type(m).__name__ for m in tower.modules()):
            assert not tower.mergeable


def test_every_parameter_that_leads_to_the_features_gets_a_gradient(dual):
    for tower, data in towers(dual.train()):
        tower.zero_grad()
        tower(data).features.square().sum().backward()
        without = [name for name, p in tower.named_parameters() if p.requires_grad and p.grad is None]
        assert not without, without


def test_layer_ids_name_every_parameter(dual):
    ids = dual.layer_ids()
    assert ids.keys() == {name for name, _ in dual.named_parameters()}
    assert len(set(ids.values())) >= 3
    assert dual.no_weight_decay() <= ids.keys()


def test_state_round_trip(dual, tmp_path):
    save_file({k: v.contiguous() for k, v in dual.state_dict().items()}, tmp_path / "m.safetensors")
    other = copy.deepcopy(dual)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(load_file(tmp_path / "m.safetensors"), strict=True)
    for (a, data), (b, _) in zip(towers(dual.eval()), towers(other.eval())):
        assert torch.equal(a(data).features, b(data).features)


def test_config_builds_the_same_model_again(dual):
    if "hf_folder" in dual.model_cfg:
        pytest.skip("the folder is the config")
    again = build_towers(dual.model_cfg)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in dual.state_dict().items()}


def test_what_a_tower_cannot_do_is_an_error(dual):
    for tower, data in towers(dual):
        if hasattr(tower, "transformer"):
            continue
        hidden = torch.zeros(data.shape[:2], dtype=torch.bool)
        with pytest.raises(ValueError, match="native tower"):
            tower(data, hidden)
        with pytest.raises(ValueError, match="native ViT"):
            tower(data, outputs=frozenset({"attention"}))
