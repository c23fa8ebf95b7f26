"""One small model of every timm family builds, trains a step of simclr and exports, or is refused in one line."""

import math

import pytest
import timm
import torch

from mmpretrain.assembly import check_image_tower
from mmpretrain.config.build import OptionError, build
from mmpretrain.export import export_open_clip
from mmpretrain.model import PretrainModel
from mmpretrain.objectives import OBJECTIVES
from mmpretrain.optim import OptimConfig, build_optimizer, parameter_groups
from mmpretrain.towers.dual import DualEncoder
from mmpretrain.towers.specs import build_towers
from tests import tiny

FAMILIES = {  # a module of timm -> its smallest model, or nearly, and pixels a side: 64 where the family takes that, else its own
    "beit": ("beit_base_patch16_224", 64), "byoanet": ("eca_botnext26ts_256", 256), "byobnet": ("test_byobnet", 64),
    "cait": ("cait_xxs24_224", 224), "coat": ("coat_tiny", 224), "convit": ("convit_tiny", 224),
    "convmixer": ("convmixer_768_32", 64), "convnext": ("test_convnext", 64), "cpubone": ("cpubone_nano", 64),
    "crossvit": ("crossvit_tiny_240", 240), "csatv2": ("csatv2", 64), "cspnet": ("cs3darknet_focus_s", 64),
    "cspnext": ("cspnext_tiny", 64), "davit": ("davit_tiny", 64), "deepseek_vit": ("deepseek_vit_412m", 56),
    "deit": ("deit_tiny_patch16_224", 64), "densenet": ("densenet121", 64), "dla": ("dla34", 64),
    "dpn": ("dpn48b", 64), "edgenext": ("edgenext_xx_small", 64), "efficientformer": ("efficientformer_l1", 224),
    "efficientformer_v2": ("efficientformerv2_s0", 224), "efficientnet": ("test_efficientnet", 64),
    "efficientvim": ("efficientvim_m1", 224), "efficientvit_mit": ("efficientvit_b0", 64),
    "efficientvit_msra": ("efficientvit_m0", 64), "eva": ("vit_tiny_patch16_dinov3_qkvb", 64),
    "fasternet": ("fasternet_t0", 64), "fastvit": ("fastvit_t12", 64), "focalnet": ("focalnet_tiny_srf", 64),
    "gcvit": ("gcvit_xxtiny", 224), "gemma4_vit": ("gemma4_vit_167m", 64), "ghostnet": ("ghostnet_050", 64),
    "hardcorenas": ("hardcorenas_b", 64), "hgnet": ("hgnetv2_b0", 64), "hiera": ("hiera_tiny_224", 224),
    "hieradet_sam2": ("sam2_hiera_tiny", 64), "hrnet": ("hrnet_w18_small", 64), "iformer": ("iformer_t", 64),
    "inception_next": ("inception_next_atto", 64), "inception_resnet_v2": ("inception_resnet_v2", 96),
    "inception_v3": ("inception_v3", 96), "inception_v4": ("inception_v4", 96), "lcnetv2": ("lcnetv2_small", 64),
    "levit": ("levit_128", 224), "lowformer": ("lowformer_b0", 64), "mambaout": ("test_mambaout", 64),
    "maxxvit": ("test_maxvit", 64), "metaformer": ("poolformerv2_s12", 64), "mlp_mixer": ("mixer_s16_224", 224),
    "mobilenetv3": ("tf_mobilenetv3_small_minimal_100", 64), "mobilenetv5": ("mobilenetv5_base", 64),
    "mobilevit": ("mobilevit_xxs", 64), "mvitv2": ("mvitv2_tiny", 64),
    "naflexvit": ("naflexvit_base_patch16_siglip", 64), "nasnet": ("nasnetalarge", 64), "nest": ("nest_tiny", 224),
    "nextvit": ("nextvit_small", 64), "nfnet": ("test_nfnet", 64), "pit": ("pit_xs_224", 224),
    "pnasnet": ("pnasnet5large", 64), "pvt_v2": ("pvt_v2_b0", 64), "qwen3_vit": ("qwen3_vit_88m", 64),
    "rdnet": ("rdnet_tiny", 64), "regnet": ("regnetx_002", 64), "repghost": ("repghostnet_050", 64),
    "repvit": ("repvit_m1", 64), "res2net": ("res2net50_26w_4s", 64), "resnest": ("resnest14d", 64),
    "resnet": ("test_resnet", 64), "resnetv2": ("resnetv2_18", 64), "rexnet": ("rexnet_100", 64),
    "selecsls": ("selecsls42", 64), "senet": ("legacy_seresnet18", 64), "sequencer": ("sequencer2d_s", 64),
    "shvit": ("shvit_s1", 64), "sknet": ("skresnet18", 64), "starnet": ("starnet_s050", 64),
    "swiftformer": ("swiftformer_xs", 64), "swin_transformer": ("swin_tiny_patch4_window7_224", 64),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 64), "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 64),
    "tiny_vit": ("tiny_vit_5m_224", 64), "tnt": ("tnt_s_legacy_patch16_224", 224), "tresnet": ("tresnet_m", 64),
    "twins": ("twins_svt_small", 64), "vgg": ("vgg11", 64), "visformer": ("visformer_tiny", 224),
    "vision_transformer": ("test_vit", 64), "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 64),
    "vision_transformer_relpos": ("test_vit_relpos", 64), "vision_transformer_sam": ("samvit_base_patch16_224", 64),
    "vitamin": ("vitamin_small_224", 64), "volo": ("volo_d1_224", 224), "vovnet": ("ese_vovnet19b_slim_dw", 64),
    "xception": ("legacy_xception", 64), "xception_aligned": ("xception41p", 64), "xcit": ("xcit_nano_12_p8_224", 64),
}  # fmt: skip
LARGE = {"deepseek_vit", "gemma4_vit", "nasnet", "pnasnet", "vgg"}  # above 80 million parameters: built and run without values
FAST = ("resnet", "vision_transformer", "mobilenetv3", "efficientvim")


def towers(name: str, size: int) -> DualEncoder:
    vision = {"timm_model_name": name, "image_size": size, "timm_pool": "", "timm_proj": "linear"}
    text = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    dual = build_towers({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text})
    assert dual.preprocess.size == size
    return dual


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in FAST else [pytest.mark.slow]) for f in sorted(set(FAMILIES) - LARGE)])
def test_a_small_model_of_the_family_trains_a_step_of_simclr_and_exports(family, tmp_path):
    name, size = FAMILIES[family]
    dual = towers(name, size)
    visual = dual.visual
    check_image_tower(dual)
    with torch.no_grad():
        found = visual.eval()(torch.randn(2, 3, size, size), outputs=frozenset({"features", "pooled", "tokens"}))
    assert found.pooled.shape == (2, visual.width)
    if found.tokens is not None:  # of the picture's places alone: no class or register token among them
        assert math.isqrt(found.tokens.shape[1]) ** 2 == found.tokens.shape[1]
        assert visual.patch_size is None or found.tokens.shape[1] == (size // visual.patch_size) ** 2

    kind = OBJECTIVES["simclr"]
    context = tiny.context(dual, image_size=size, image_width=visual.width, patch_size=visual.patch_size)
    objective = kind(build(kind.Config, {"source": "pairs", "projection": 8, "hidden": 16}), context)
    model = PretrainModel(dual, {"simclr": objective}, {"simclr": 1.0}).train()
    loss, _ = model(tiny.batch(model, 2, double=False))
    loss.backward()
    named = [(key, p) for key, p in model.named_parameters() if p.grad is not None]
    before = {key: p.detach().clone() for key, p in named if key.startswith("towers.visual.")}
    undecayed = {f"towers.{key}" for key in dual.no_weight_decay()}
    build_optimizer(parameter_groups(named, OptimConfig(), {}, undecayed), OptimConfig()).step()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p).all() for _, p in named)
    after = dict(named)
    # a branch whose last norm begins at zero stands still in the first step
    assert sum(not torch.equal(value, after[key]) for key, value in before.items()) > len(before) // 4

    refused = ""
    try:
        export_open_clip(dual, {}, tmp_path / "out")
    except ValueError as error:
        refused = str(error)
    exported = (tmp_path / "out" / "open_clip_model.safetensors").is_file()
    assert exported == (not refused)
    assert "\n" not in refused
    assert not refused or "open_clip would build another model" in refused


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(LARGE))
def test_a_large_family_builds_and_sends_gradients_through(family):
    name, size = FAMILIES[family]
    with torch.device("meta"):
        visual = towers(name, size).visual
        found = visual(torch.zeros(2, 3, size, size), outputs=frozenset({"features", "pooled"}))
    assert found.pooled.shape == (2, visual.width)
    found.features.sum().backward()
    assert sum(p.grad is not None for p in visual.parameters()) > 10


@pytest.mark.slow
def test_every_family_has_its_model():
    families = {module for module in timm.list_modules() if timm.list_models(module=module)}
    assert families == set(FAMILIES), "a family of the installed timm has no model here, or one here is gone"


@pytest.mark.parametrize(("name", "size"), [("efficientformer_l1", 64), ("pit_xs_224", 64)])
def test_a_tower_that_does_not_take_the_runs_size_is_refused_in_one_line_at_the_start(name, size):
    with pytest.raises(OptionError, match=rf"cannot be trained on images of {size} pixels .*leave out image_size") as error:
        check_image_tower(towers(name, size))
    assert "\n" not in str(error.value)


def test_a_tower_that_widens_behind_its_pooling_is_projected_from_there_and_open_clip_is_not_given_it(tmp_path):
    dual = towers("mobilenetv3_small_050", 64)
    assert dual.visual.width == dual.visual.module.trunk.head_hidden_size == 1024
    assert dual.visual.eval()(torch.randn(2, 3, 64, 64)).features.shape == (2, 16)
    with pytest.raises(ValueError, match=r"visual\.head\.proj\.weight differ.*MobileNetV3"):
        export_open_clip(dual, {}, tmp_path / "out")
