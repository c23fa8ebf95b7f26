"""The native towers against open_clip's own modules, and against naive versions of what open_clip lacks."""

import copy

import pytest
import torch
from open_clip.model import _build_text_tower, _build_vision_tower
from torch.nn import functional as F

from mmpretrain.towers.base import merge
from mmpretrain.towers.text import TextTransformer
from mmpretrain.towers.vision import VisionTransformer, resize_grid

ALL = frozenset({"features", "pooled", "tokens", "attention"})
FEATURES = frozenset({"features"})
VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32}
TEXT = {"context_length": 20, "vocab_size": 100, "width": 64, "heads": 2, "layers": 3}
EOT = 99

VISION_OPTIONS = {
    "plain": {},
    "layer_scale": {"ls_init_value": 0.1},
    "avg": {"pool_type": "avg"},
    "avg_ln_after": {"pool_type": "avg", "final_ln_after_pool": True},
    "ln_after": {"final_ln_after_pool": True},
    "no_ln_pre": {"no_ln_pre": True},
    "sin_cos": {"pos_embed_type": "sin_cos_2d"},
    "kwargs": {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}, "mlp_ratio": 2.0},
    "quick_gelu": {"quick_gelu": True},
}
TEXT_OPTIONS = {
    "plain": {},
    "layer_scale": {"ls_init_value": 0.1},
    "not_causal": {"no_causal_mask": True},
    "eos": {"pool_type": "eos", "eos_id": EOT},
    "first": {"pool_type": "first"},
    "last": {"pool_type": "last"},
    "proj_bias": {"proj_bias": True},
    "no_proj": {"proj_type": "none"},
    "quick_gelu": {"quick_gelu": True},
}


def images(n=3, size=32, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def texts(n=4, length=20, longest=9, seed=0):
    """Captions of different lengths: words, EOT, padding 0."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 98, (n, length), generator=g)
    for row in range(n):
        end = longest - row
        ids[row, end], ids[row, end + 1 :] = EOT, 0
    return ids


def vit(seed=0, **options):
    torch.manual_seed(seed)
    return VisionTransformer(48, **{**VISION, **options})


def text(seed=0, **options):
    torch.manual_seed(seed)
    return TextTransformer(48, **{**TEXT, **options})


def pair(kind, options):
    """-> (open_clip's module, ours, data), both drawn from the same seed."""
    options = dict(options)
    quick = {"quick_gelu": options.pop("quick_gelu")} if "quick_gelu" in options else {}
    torch.manual_seed(1)
    if kind == "vision":
        theirs = _build_vision_tower(48, {**VISION, **options}, **quick)
        return theirs, vit(1, **options, **quick), images()
    theirs = _build_text_tower(48, {**TEXT, **options}, **quick)
    return theirs, text(1, **options, **quick), texts()


CASES = [("vision", o) for o in VISION_OPTIONS.values()] + [("text", o) for o in TEXT_OPTIONS.values()]
NAMES = [f"vision-{n}" for n in VISION_OPTIONS] + [f"text-{n}" for n in TEXT_OPTIONS]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=NAMES)
def test_equals_open_clip(kind, options):
    theirs, ours, data = pair(kind, options)
    for (name, a), (other, b) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), f"{name} is drawn otherwise"  # the same seed gives the same model
    with torch.no_grad():  # biases and LayerNorms off their first values, where they could hide a mistake
        for p in theirs.parameters():
            p.add_(0.05 * torch.randn_like(p))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)

    expected = theirs(data)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    for outputs in (FEATURES, ALL):  # features alone take the shorter way through the last block
        ours.zero_grad()
        found = ours(data, outputs=outputs)
        torch.testing.assert_close(found.features, expected, atol=1e-5, rtol=0)
        (found.features * weight).sum().backward()
        for (name, a), (_, b) in zip(theirs.named_parameters(), ours.named_parameters()):
            if a.requires_grad:
                torch.testing.assert_close(b.grad, a.grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_tokens_are_open_clips(kind):
    theirs, ours, data = pair(kind, {})
    theirs.output_tokens = True
    torch.testing.assert_close(ours(data, outputs=ALL).tokens, theirs(data)[1], atol=1e-5, rtol=0)


def test_attention_is_that_of_the_last_block():
    ours, data = vit(), images()
    tokens = ours.embed(data)
    x = tokens.x
    for block in ours.transformer.resblocks[:-1]:
        x = block(x)
    last = ours.transformer.resblocks[-1]
    h = last.ln_1(x)
    _, weights = F.multi_head_attention_forward(
        h.transpose(0, 1), h.transpose(0, 1), h.transpose(0, 1), 64, 2, last.attn.in_proj_weight, last.attn.in_proj_bias,
        None, None, False, 0.0, last.attn.out_proj.weight, last.attn.out_proj.bias, need_weights=True,
    )  # fmt: skip
    for outputs in (frozenset({"attention"}), ALL):
        torch.testing.assert_close(ours(data, outputs=outputs).attention, weights[:, 0, 1:], atol=1e-6, rtol=1e-5)


def test_text_attention_sees_no_later_word():
    found = text()(texts(), outputs=frozenset({"attention"})).attention
    end = texts().argmax(1)
    later = torch.arange(20) > end[:, None]
    assert (found[later] == 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones(4))


def test_merged_trunk_equals_separate_trunks():
    ours = vit()
    a, b = images(seed=1), images(5, seed=2)
    hidden = torch.rand(5, 16).argsort(1) < 6
    ours.add_mask_embedding()
    parts = [ours.embed(a), ours.embed(b, hidden, "replace")]
    assert len({ours.merge_key(p) for p in parts}) == 1
    assert ours.merge_key(ours.embed(b, hidden, "drop")) != ours.merge_key(parts[0])
    x, attention = ours.trunk(merge(parts), attention=True)
    for part, data, mask, y, w in zip(parts, (a, b), (None, hidden), x.split([3, 5]), attention.split([3, 5])):
        found = ours.readout(y, part, ALL, w)
        alone = ours(data, mask, "replace", outputs=ALL)
        for field in ("features", "pooled", "tokens", "attention"):
            torch.testing.assert_close(getattr(found, field), getattr(alone, field), atol=1e-5, rtol=1e-5)


def test_merged_text_equals_separate():
    ours, a, b = text(), texts(seed=1), texts(3, longest=6, seed=2)
    for bidirectional in (False, True):
        parts = [ours.embed(a, bidirectional=bidirectional), ours.embed(b, bidirectional=bidirectional)]
        x, _ = ours.trunk(merge(parts), pooled_only=True)
        for part, data, y in zip(parts, (a, b), x.split([4, 3])):
            expected = ours(data, bidirectional=bidirectional, outputs=ALL).features
            torch.testing.assert_close(ours.readout(y, part, FEATURES).features, expected, atol=1e-5, rtol=1e-5)
    assert ours.merge_key(ours.embed(a)) != ours.merge_key(ours.embed(a, bidirectional=True))


def test_dropping_equals_running_on_the_visible_patches():
    ours, data = vit(), images()
    hidden = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)).argsort(1) < 6
    found = ours(data, hidden, "drop", outputs=ALL)
    patches = ours.conv1(data).flatten(2).mT + ours.positional_embedding[1:]
    first = (ours.class_embedding + ours.positional_embedding[0])[None]
    for row in range(3):
        x = ours.ln_pre(torch.cat([first, patches[row][~hidden[row]]]))[None]
        for block in ours.transformer.resblocks:
            x = block(x)
        x = ours.ln_post(x)[0]
        torch.testing.assert_close(found.tokens[row], x[1:], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.features[row], x[0] @ ours.proj, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.mask, hidden)
    assert found.grid == (4, 4)
    assert found.tokens.shape == (3, 10, 64)


def test_replaced_patches_do_not_reach_the_output():
    ours, data = vit(), images()
    ours.add_mask_embedding()
    hidden = torch.zeros(3, 16, dtype=torch.bool)
    hidden[:, :4] = True  # the upper row of patches
    changed = data.clone()
    changed[:, :, :8] += 1
    before = ours(data, hidden).features
    assert torch.equal(before, ours(changed, hidden).features)
    ours.mask_embedding.data += 1
    assert not torch.equal(before, ours(data, hidden).features)
    everything = torch.ones(3, 16, dtype=torch.bool)
    rows = ours(data, everything, outputs=ALL)
    torch.testing.assert_close(rows.features[0], rows.features[1])
    assert not torch.allclose(rows.tokens[0, 0], rows.tokens[0, 1])  # positions are added after replacing


def test_masked_words():
    ours, ids = text(), texts()
    masked = ids.clone()
    masked[:, 2] = -1
    with pytest.raises(ValueError, match="mask embedding"):
        ours(masked)
    ours.add_mask_embedding()
    found = ours(masked, outputs=ALL)
    with_hidden = ours(ids, torch.arange(20).eq(2).expand(4, -1), outputs=ALL)
    torch.testing.assert_close(found.features, with_hidden.features)
    naive = copy.deepcopy(ours)
    naive.token_embedding.weight.data[0] = ours.mask_embedding.data  # id 0: padding elsewhere, which a causal tower never sees
    torch.testing.assert_close(naive(masked.clamp(min=0)).features, found.features, atol=1e-6, rtol=1e-5)


def test_gradient_reaches_the_mask_embedding():
    for ours, data, hidden in ((vit(), images(), torch.rand(3, 16) < 0.5), (text(), texts(), torch.arange(20).eq(1).expand(4, -1))):
        ours.add_mask_embedding()
        ours(data, hidden).features.sum().backward()
        assert ours.mask_embedding.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"pool_type": "eos", "eos_id": EOT}], ids=["argmax", "eos"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_trimming_changes_nothing(options, bidirectional):
    ours = text(**{**options, "context_length": 77})
    ids = texts(length=77)
    assert ours.trimmable
    whole = ours(ids, bidirectional=bidirectional, outputs=ALL)
    trimmed = ours(ids[:, :16], bidirectional=bidirectional, outputs=ALL)
    torch.testing.assert_close(trimmed.features, whole.features, atol=1e-6, rtol=0)
    torch.testing.assert_close(trimmed.tokens, whole.tokens[:, :16], atol=2e-6, rtol=0)


def test_bidirectional_sees_the_whole_caption_and_no_padding():
    ours, ids = text(), texts()
    before = ours(ids, bidirectional=True, outputs=ALL).tokens
    later, padding = ids.clone(), ids.clone()
    later[:, 4] = 50
    padding[:, 15] = 3
    assert not torch.allclose(ours(later, bidirectional=True, outputs=ALL).tokens[:, 0], before[:, 0])
    torch.testing.assert_close(ours(padding, bidirectional=True, outputs=ALL).tokens[:, :9], before[:, :9])
    causal = ours(ids, outputs=ALL).tokens
    torch.testing.assert_close(ours(later, outputs=ALL).tokens[:, :4], causal[:, :4])


def test_untrimmable_towers_say_so():
    assert not text(no_causal_mask=True).trimmable
    assert not text(pool_type="last").trimmable


def test_other_image_sizes_interpolate_the_positions():
    ours = vit()
    found = ours(images(size=48), outputs=ALL)
    assert found.tokens.shape == (3, 36, 64)
    assert found.grid == (6, 6)
    torch.manual_seed(0)
    larger = VisionTransformer(48, **{**VISION, "image_size": 48})
    state = ours.state_dict()
    state["positional_embedding"] = resize_grid(state["positional_embedding"], (4, 4), (6, 6))
    larger.load_state_dict(state)
    torch.testing.assert_close(found.features, larger(images(size=48)).features)
    torch.testing.assert_close(ours(images(size=35)).features, ours(images(size=35)[:, :, :32, :32]).features)  # as conv1 crops


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_bf16_autocast_is_near_fp32(kind):
    _, ours, data = pair(kind, {})
    expected = ours(data, outputs=ALL)
    expected.features.square().sum().backward()
    gradient = {name: p.grad.clone() for name, p in ours.named_parameters()}
    for outputs in (FEATURES, ALL):
        ours.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            assert ours.trunk(ours.embed(data))[0].dtype == torch.bfloat16  # the residual stream
            found = ours(data, outputs=outputs)
        assert F.cosine_similarity(found.features.float(), expected.features).min() > 0.999
        found.features.float().square().sum().backward()
        for name, p in ours.named_parameters():
            assert p.grad.dtype == torch.float32
            assert F.cosine_similarity(p.grad.flatten(), gradient[name].flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_checkpointing_changes_no_gradient(kind):
    _, ours, data = pair(kind, {})
    found = []
    for enable in (False, True):
        ours.set_grad_checkpointing(enable)
        ours.zero_grad()
        ours(data).features.square().sum().backward()
        found.append([p.grad.clone() for p in ours.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["vision", pytest.param("text", marks=pytest.mark.slow)])
def test_trunk_compiles_to_one_graph(kind):
    _, ours, data = pair(kind, {})
    graphs = []
    compiled = torch.compile(ours.transformer, backend=lambda g, _: graphs.append(g) or g.forward, fullgraph=True, dynamic=False)
    tokens = ours.embed(data)
    found, _ = compiled(tokens, False, True)
    torch.testing.assert_close(found, ours.trunk(tokens, pooled_only=True)[0], atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


@pytest.mark.slow
def test_a_copy_of_a_compiled_tower_uses_its_own_weights():
    ours, data = vit(), images()
    ours.transformer.compile(backend="eager")
    other = copy.deepcopy(ours)
    with torch.no_grad():
        for p in other.transformer.parameters():
            p.zero_()
    assert not torch.allclose(other(data).features, ours(data).features)


def test_patch_dropout_drops_in_training_only_and_repeats_for_the_same_pixels():
    ours, data = vit(patch_dropout=0.5), images()
    first, second = (ours(data, outputs=ALL) for _ in range(2))
    assert first.tokens.shape[1] == 8
    assert torch.equal(first.mask, second.mask)
    assert not torch.equal(first.mask[0], first.mask[1])
    assert torch.equal(ours(data[1:2], outputs=ALL).mask[0], first.mask[1])  # whatever the batch
    assert ours.eval()(data, outputs=ALL).tokens.shape[1] == 16


def test_layer_ids():
    ids = vit().layer_ids()
    assert ids["conv1.weight"] == ids["class_embedding"] == ids["positional_embedding"] == ids["ln_pre.weight"] == 0
    assert ids["transformer.resblocks.1.mlp.c_fc.weight"] == 2
    assert ids["ln_post.weight"] == ids["proj"] == 4
    ids = text().layer_ids()
    assert ids["token_embedding.weight"] == 0
    assert ids["text_projection"] == ids["ln_final.bias"] == 4


def test_errors_name_the_remedy():
    ours, data = vit(), images()
    with pytest.raises(ValueError, match="draw it for the grid"):
        ours(data, torch.zeros(3, 9, dtype=torch.bool), "drop")
    with pytest.raises(ValueError, match="same number in every row"):
        ours(data, torch.arange(16) < torch.tensor([[1], [2], [3]]), "drop")
    with pytest.raises(ValueError, match="mask embedding"):
        ours(data, torch.zeros(3, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="unknown outputs"):
        ours(data, outputs=frozenset({"logits"}))
    with pytest.raises(ValueError, match="context_length 20"):
        text()(texts(length=30))
    with pytest.raises(ValueError, match="cannot be dropped"):
        text()(texts(), torch.zeros(4, 20, dtype=torch.bool), "drop")
