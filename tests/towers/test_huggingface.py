"""Towers of transformers' dual encoders give what the models' own get_text_features and get_image_features give."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from mmpretrain.towers.huggingface import RULES, rule_of
from mmpretrain.towers.specs import build_towers

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
CLIP = {**SIZES, "vocab_size": 100, "max_position_embeddings": 16, "bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 1}
BERT = {**SIZES, "vocab_size": 100, "max_position_embeddings": 16, "pad_token_id": 0}
EFFICIENT_NET = {
    "image_size": 32, "hidden_dim": 24, "width_coefficient": 0.1, "depth_coefficient": 0.1, "in_channels": [16, 16],
    "out_channels": [16, 24], "kernel_sizes": [3, 3], "strides": [1, 2], "num_block_repeats": [1, 1], "expand_ratios": [1, 2],
    "depthwise_padding": [],
}  # fmt: skip
ALT = {**BERT, "pad_token_id": 1, "max_position_embeddings": 20, "project_dim": 28}
GROUPS = {**VISION, "depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 2]}
FUSION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
CODEBOOK = {"num_groups": 1, "hidden_size": 8, "num_blocks_per_group": 1, "vocab_size": 16}
TINY = {  # model type -> its configuration's arguments
    "clip": {"vision_config": VISION, "text_config": CLIP, "projection_dim": 24},
    "siglip": {"vision_config": VISION, "text_config": {**CLIP, "projection_size": 32}},
    "siglip2": {"vision_config": {**VISION, "num_patches": 16}, "text_config": {**CLIP, "projection_size": 32}},
    "altclip": {"vision_config": VISION, "text_config": ALT, "projection_dim": 24},
    "chinese_clip": {"vision_config": VISION, "text_config": BERT, "projection_dim": 24},
    "clipseg": {"vision_config": VISION, "text_config": CLIP, "projection_dim": 24},
    "metaclip_2": {"vision_config": VISION, "text_config": CLIP, "projection_dim": 24},
    "groupvit": {"vision_config": GROUPS, "text_config": CLIP, "projection_dim": 24, "projection_intermediate_dim": 40},
    "owlvit": {"vision_config": VISION, "text_config": CLIP, "projection_dim": 24},
    "owlv2": {"vision_config": VISION, "text_config": CLIP, "projection_dim": 24},
    "align": {"vision_config": EFFICIENT_NET, "text_config": BERT, "projection_dim": 8},
    "blip": {"vision_config": VISION, "text_config": {**BERT, "encoder_hidden_size": 32, "bos_token_id": 98, "sep_token_id": 99}},
    "flava": {
        "image_config": VISION, "text_config": BERT, "multimodal_config": FUSION, "image_codebook_config": CODEBOOK, "projection_dim": 24,
    },
    "vision-text-dual-encoder": {
        "vision_config": {**VISION, "model_type": "vit"}, "text_config": {**BERT, "model_type": "bert"}, "projection_dim": 24,
    },
}  # fmt: skip
PADDING = {name: 0 if arguments["text_config"] in (BERT, TINY["blip"]["text_config"]) else 1 for name, arguments in TINY.items()}
PADDING["vision-text-dual-encoder"] = 0


def dual_encoders() -> list[str]:
    """Every model type of the installed transformers with get_text_features, in tiny form here or not."""
    models = Path(transformers.__file__).parent / "models"
    types = set(TINY)
    for file in models.glob("*/modeling_*.py"):
        if "def get_text_features" in file.read_text(encoding="utf-8"):
            name = file.parent.name
            types.add(next(kind for kind in (name, name.replace("_", "-"), name.replace("_", "")) if kind in CONFIG_MAPPING_NAMES))
    return sorted(types)


def saved(kind: str, folder: Path) -> torch.nn.Module:
    """A tiny model of that type, whose parts all matter to its features."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **TINY[kind])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return model


def own_features(model: torch.nn.Module, kind: str, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None):
    """What transformers says: (image [B,E], text [B,E]); its FLAVA projects every position, of which the first is the class token."""
    if kind == "siglip2":  # patches rather than pixels, as its image processor makes them
        patches = pixels.reshape(-1, 3, 4, 8, 4, 8).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 192)
        seen = torch.ones(patches.shape[:2], dtype=torch.int32)
        image = model.get_image_features(patches, seen, torch.tensor([[4, 4]] * len(patches))).pooler_output
    else:
        image = model.get_image_features(pixels).pooler_output
    text = model.get_text_features(ids, attention_mask=mask).pooler_output
    return (image[:, 0], text[:, 0]) if kind == "flava" else (image, text)


@torch.no_grad()
@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k in ("clip", "siglip", "altclip") else [pytest.mark.slow]) for k in TINY])
def test_features_are_those_of_the_models_own_methods(kind, tmp_path):
    model = saved(kind, tmp_path)
    dual = build_towers(f"hf:{tmp_path}").eval()
    pad = PADDING[kind]
    ids = torch.tensor([[98, 5, 6, 99, *[pad] * 12], [98, 7, 8, 9, 10, 99, *[pad] * 10]])
    # SigLIP's processor gives no attention mask: it was trained with padding that is attended.
    mask = None if kind.startswith("siglip") else (ids != pad).long()
    image, text = own_features(model, kind, pixels := torch.randn(2, 3, 32, 32), ids, mask)
    torch.testing.assert_close(dual.visual(pixels).features, image, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(dual.text(ids).features, text, atol=1e-6, rtol=1e-5)
    assert dual.embed_dim == dual.visual.embed_dim == dual.text.embed_dim == image.shape[1]
    assert dual.preprocess.size == 32
    found = dual.visual(pixels, outputs=frozenset({"pooled", "tokens"}))
    assert found.pooled.shape == (2, dual.visual.width)
    assert found.grid is None or found.grid[0] * found.grid[1] == found.tokens.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(dual_encoders()) - set(TINY)))
def test_a_dual_encoder_of_another_type_is_refused_in_one_line(kind, tmp_path):
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"a model of type {transformers.AutoConfig.for_model(kind).model_type}")) as error:
        rule_of(str(tmp_path))
    assert "\n" not in str(error.value)


def test_every_rule_has_its_test():
    assert set(TINY) == set(RULES)


def test_x_clip_which_reads_videos_is_refused(tmp_path):
    transformers.AutoConfig.for_model("xclip").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"type xclip .* not known to agree"):
        build_towers(f"hf:{tmp_path}")


def test_an_encoder_with_a_decoder_and_a_configuration_without_a_model_are_refused_in_one_line(tmp_path):
    config = transformers.T5Config(vocab_size=100, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    transformers.T5Model(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="encoder with a decoder"):
        build_towers(f"hf:{tmp_path}/t5")
    transformers.SiglipTextConfig(**CLIP).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="siglip_text_model") as error:
        build_towers(f"hf:{tmp_path}/text")
    assert "\n" not in str(error.value)


def test_a_text_tower_that_numbers_positions_behind_paddings_takes_so_many_tokens_fewer(tmp_path):
    config = transformers.XLMRobertaConfig(**{**BERT, "pad_token_id": 1})
    transformers.XLMRobertaModel(config).save_pretrained(tmp_path)
    text = build_towers(f"hf:{tmp_path}").text
    assert text.context_length == 14
    assert text(torch.full((1, 14), 5)).features.shape == (1, 32)
