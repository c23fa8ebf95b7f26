"""Position embeddings of every kind of image tower are resized as open_clip and timm resize them, and do not decay."""

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from mmpretrain.optim import OptimConfig, parameter_groups
from mmpretrain.towers.positions import resize_positions
from mmpretrain.towers.specs import build_towers
from mmpretrain.towers.weights import load_weights
from tests.towers.test_huggingface import TINY

TEXT = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
VISION = {  # kind -> fields, larger size, names of what is resized
    "native": (VIT, 48, {"positional_embedding"}),
    "open_clip": (VIT | {"qk_norm": True}, 48, {"positional_embedding"}),
    "resnet": ({"layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "image_size": 64}, 96, {"attnpool.positional_embedding"}),
    "timm": ({"timm_model_name": "test_vit", "image_size": 64}, 96, {"trunk.pos_embed"}),
    "timm registers": ({"timm_model_name": "test_vit4", "image_size": 64}, 96, {"trunk.pos_embed"}),
    "swin": ({"timm_model_name": "swin_tiny_patch4_window7_224", "image_size": 64}, 96, set()),
}


def config(vision: dict) -> dict:
    return {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}


@pytest.mark.parametrize("kind", VISION)
def test_weights_of_another_image_size_load_with_resized_positions(kind, tmp_path):
    vision, size, resized = VISION[kind]
    torch.manual_seed(0)
    small = build_towers(config(vision))
    save_file(small.weights(), tmp_path / "m.safetensors")
    large = build_towers(config(vision), image_size=size)
    load_weights(large, tmp_path / "m.safetensors")
    old, new = small.visual.state_dict(), large.visual.state_dict()
    differing = {key for key in new if new[key].is_floating_point() and new[key].shape != old[key].shape}
    assert resized <= differing
    assert all(torch.equal(new[key], old[key]) for key in new.keys() - differing if new[key].is_floating_point())
    assert torch.isfinite(large.visual.eval()(torch.randn(2, 3, size, size)).features).all()
    for key in resized - {"trunk.pos_embed"}:  # what open_clip does with it
        state = {"visual.positional_embedding": old[key]}
        side = int((len(new[key]) - 1) ** 0.5)
        model = torch.nn.Module()
        model.visual = torch.nn.Module()
        model.visual.grid_size = (side, side)
        open_clip.model.resize_pos_embed(state, model)
        torch.testing.assert_close(new[key], state["visual.positional_embedding"])
    if "trunk.pos_embed" in resized:  # what timm does
        prefix = 0 if small.visual.module.trunk.no_embed_class else small.visual.module.trunk.num_prefix_tokens
        wanted = resample_abs_pos_embed(old["trunk.pos_embed"], [size // 16] * 2, num_prefix_tokens=prefix)
        torch.testing.assert_close(new["trunk.pos_embed"], wanted)


def test_relative_positions_are_resized_as_timm_does(tmp_path):
    small, large = (timm.create_model("beit_base_patch16_224", img_size=size, depth=1, num_classes=0) for size in (32, 64))
    state = {f"visual.{key}": value for key, value in small.state_dict().items()}
    own = {f"visual.{key}": value for key, value in large.state_dict().items()}
    towers = torch.nn.Module()
    towers.visual = large
    messages = resize_positions(state, own, towers)
    [key] = [key for key in own if key.endswith("relative_position_bias_table")]
    wanted = timm.models.beit.checkpoint_filter_fn(small.state_dict(), large)[key.removeprefix("visual.")]
    torch.testing.assert_close(state[key], wanted)
    assert any(key in message for message in messages)
    large.load_state_dict({key.removeprefix("visual."): value for key, value in state.items()})


def test_a_tower_whose_positions_cannot_be_resized_is_refused_with_a_remedy(tmp_path):
    vision = VISION["native"][0]
    save_file(build_towers(config(vision)).weights(), tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"of another shape: .*conv1.*Give the `model` that the checkpoint was trained with, or its"):
        load_weights(build_towers(config(vision | {"patch_size": 4})), tmp_path / "m.safetensors")


def undecayed(dual) -> set[str]:
    groups = parameter_groups(list(dual.named_parameters()), OptimConfig(weight_decay=0.1), {}, dual.no_weight_decay())
    shapes = dict(dual.named_parameters())
    names = {name for group in groups if group["weight_decay"] == 0 for name in group["names"] if shapes[name].dim() > 1}
    return {name.replace(".module.", ".") for name in names}


def test_position_embeddings_registers_and_bias_tables_of_every_library_do_not_decay(tmp_path):
    swin = undecayed(build_towers(config(VISION["swin"][0])))
    assert sum(name.endswith("relative_position_bias_table") for name in swin) == 12
    registers = undecayed(build_towers(config(VISION["timm registers"][0])))
    assert {"visual.trunk.reg_token", "visual.trunk.pos_embed", "text.positional_embedding"} <= registers
    assert undecayed(build_towers(config(VISION["resnet"][0]))) == {"visual.attnpool.positional_embedding", "text.positional_embedding"}
    assert undecayed(build_towers(config(VIT))) == {"visual.positional_embedding", "text.positional_embedding"}
    transformers.AutoModel.from_config(transformers.AutoConfig.for_model("clip", **TINY["clip"])).save_pretrained(tmp_path)
    assert undecayed(build_towers(f"hf:{tmp_path}")) == {
        "visual.model.embeddings.position_embedding.weight",
        "text.model.embeddings.position_embedding.weight",
    }
