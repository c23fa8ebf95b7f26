"""Each objective on random or hand-made encodes: closed forms, and what its parameters learn from."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmpretrain.config.build import build
from mmpretrain.data.text import get_tokenizer
from mmpretrain.objectives import OBJECTIVES
from mmpretrain.objectives.base import PRESETS, Augment
from mmpretrain.types import Encoded, Sample, View
from tests import tiny


def objective(kind, **options):
    torch.manual_seed(0)
    return OBJECTIVES[kind](build(OBJECTIVES[kind].Config, {"source": "pairs", **options}), tiny.context(tiny.towers()))


def test_clip_of_perfect_pairs_is_closed_form():
    clip = objective("clip")
    eye = Encoded(features=torch.eye(12))
    scale = 1 / 0.07
    assert clip(image=eye, text=eye)["loss"].item() == pytest.approx(math.log(math.exp(scale) + 11) - scale, abs=1e-6)
    assert clip(image=eye, text=eye)["logit_scale"].item() == pytest.approx(scale)


def test_clip_clamps_its_scale():
    clip = objective("clip")
    clip.logit_scale.data.fill_(50.0)
    clip.after_step(0.5)
    assert clip.logit_scale.exp().item() == pytest.approx(100.0)


def test_clip_keeps_its_scale_at_one_or_more():
    clip = objective("clip")
    clip.logit_scale.data.fill_(-0.5)
    clip.after_step(0.5)
    assert clip.logit_scale.exp().item() == 1.0
    clip.logit_scale.data.fill_(0.2)
    clip.after_step(0.5)
    assert clip.logit_scale.item() == pytest.approx(0.2)  # within the limits it is free


def test_clip_ignores_the_length_of_features():
    clip = objective("clip")
    a, b = torch.randn(6, 12), torch.randn(6, 12)
    one = clip(image=Encoded(features=a), text=Encoded(features=b))["loss"]
    two = clip(image=Encoded(features=3 * a), text=Encoded(features=b / 7))["loss"]
    torch.testing.assert_close(one, two)


def test_siglip_starts_near_the_papers_value():
    """All pairs judged apart at first: about softplus(10 + ...) for the one match, little for the rest."""
    siglip = objective("siglip")
    zeros = Encoded(features=torch.eye(12)[:4]), Encoded(features=torch.eye(12)[4:8])  # all similarities 0
    expected = math.log1p(math.exp(10)) + 3 * math.log1p(math.exp(-10))
    assert siglip(image=zeros[0], text=zeros[1])["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_simclr_head_sees_both_views_at_once():
    simclr = objective("simclr")
    x, y = torch.randn(6, 16), torch.randn(6, 16)
    seen = []
    simclr.projection_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    out = simclr(first=Encoded(pooled=x), second=Encoded(pooled=y))
    assert seen == [12]
    swapped = simclr(first=Encoded(pooled=y), second=Encoded(pooled=x))
    torch.testing.assert_close(out["loss"], swapped["loss"])


def test_simclr_info_nce_compares_the_first_view_with_the_second_only():
    simclr = objective("simclr", loss="info_nce", norm="none", temperature=0.2)
    x, y = torch.randn(6, 16), torch.randn(6, 16)
    a, b = (F.normalize(simclr.projection_head(view), dim=1) for view in (x, y))
    forward, backward = (F.cross_entropy(p @ q.T / 0.2, torch.arange(6)) for p, q in ((a, b), (b, a)))
    assert (forward - backward).abs() > 1e-3
    torch.testing.assert_close(simclr(first=Encoded(pooled=x), second=Encoded(pooled=y))["loss"], forward)
    torch.testing.assert_close(simclr(first=Encoded(pooled=y), second=Encoded(pooled=x))["loss"], backward)


def test_simclr_views_differ_only_in_index():
    needs = objective("simclr").needs
    assert needs["first"].view != needs["second"].view
    assert repr(needs["first"].view).replace("index=0", "index=1") == repr(needs["second"].view)


def test_simmim_counts_hidden_patches_only():
    simmim = objective("simmim")
    pixels = torch.randn(2, 3, 16, 16)
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, :10] = True
    simmim.decoder.weight.data.zero_()
    simmim.decoder.bias.data.zero_()
    encoded = Encoded(tokens=torch.randn(2, 16, 16), mask=mask, grid=(4, 4), view=View(pixels))
    expected = pixels.reshape(2, 3, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 48)[:, :10].abs().mean()
    torch.testing.assert_close(simmim(image=encoded)["loss"], expected)
    visible = pixels.clone()
    visible[:, :, 12:, :] += 5  # the last row of patches is not hidden
    torch.testing.assert_close(simmim(image=encoded._replace(view=View(visible)))["loss"], expected)


def test_simmim_hides_whole_squares_of_mask_patch():
    model = tiny.model({"simmim": {"mask_patch": 2, "mask_ratio": 0.5}})
    (encode,) = model.plan
    hidden = model.hidden(encode, tiny.batch(model), {})
    of_square = hidden.view(8, 2, 2, 2, 2).sum((2, 4))  # 4 x 4 patches are four squares of 2 x 2
    assert ((of_square == 0) | (of_square == 4)).all()
    assert (hidden.sum(1) == 8).all()


def test_simmim_normalises_flat_patches_to_zero_and_others_by_their_own_deviation():
    simmim = objective("simmim", normalise_target=True)
    torch.nn.init.zeros_(simmim.decoder.weight)
    torch.nn.init.constant_(simmim.decoder.bias, 0.25)
    pixels = torch.full((1, 3, 16, 16), 0.3)
    pixels[:, :, :4, 4:8] = torch.randn(1, 3, 4, 4)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    encoded = Encoded(tokens=torch.randn(1, 16, 16), grid=(4, 4), view=View(pixels))

    mask[:, 0] = True  # a flat patch
    loss = simmim(image=encoded._replace(mask=mask))["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(0.25, abs=1e-3)
    assert simmim.decoder.weight.grad.isfinite().all()

    patch = pixels[0, :, :4, 4:8].flatten()
    expected = ((patch - patch.mean()) / patch.std() - 0.25).abs().mean()
    loss = simmim(image=encoded._replace(mask=mask.roll(1, 1)))["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalise", [True, False])
def test_simmim_picture_of_a_perfect_prediction_is_the_image(normalise):
    simmim = objective("simmim", normalise_target=normalise)
    pixels = torch.randn(2, 3, 16, 16)
    target = simmim._target(pixels)
    simmim.decoder = torch.nn.Identity()
    mask = torch.rand(2, 16) < 0.5
    rows = simmim.pictures(Encoded(tokens=target, mask=mask, grid=(4, 4), view=View(pixels)))["reconstruction"]
    torch.testing.assert_close(rows[2], pixels, atol=1e-4, rtol=1e-4)
    assert (rows[1] == 0).any()


def text_view(**options):
    model = tiny.model({"masked_text": options})
    (spec,) = model.views()["pairs"]
    return spec, tiny.rows("pairs", [spec], 64).views[spec]


def test_masked_text_corrupts_words_and_remembers_them():
    tokenizer = get_tokenizer("clip")
    _, view = text_view(mask_ratio=0.3)
    plain = torch.where(view.target != -100, view.target, view.data)
    words = (plain != tokenizer.sot) & (plain != tokenizer.eot) & (plain != 0)
    chosen = view.target != -100
    assert (chosen & ~words).sum() == 0
    expected = (words.sum(1) * 0.3).round().clamp(min=1)
    assert torch.equal(chosen.sum(1).float(), expected)  # exactly the share asked for, at least one word
    assert (view.data == -1).sum() > 0
    assert (view.data[~chosen] >= 0).all()
    assert (plain == tokenizer.eot).any(1).all()
    assert ((view.data == tokenizer.eot).sum(1) == 1).all()
    assert ((view.data == tokenizer.sot).sum(1) == 1).all()


@pytest.mark.parametrize(("keep", "replace", "masked"), [(0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.1, 0.1, 0.8)])
def test_masked_text_shares(keep, replace, masked):
    _, view = text_view(keep=keep, replace=replace, mask_ratio=0.5)
    chosen = view.target != -100
    share = (view.data[chosen] == -1).float().mean().item()
    assert share == pytest.approx(masked, abs=0.12)
    if keep == 1.0:
        assert torch.equal(view.data[chosen], view.target[chosen])
    if replace == 1.0:
        assert (view.data[chosen] != view.target[chosen]).float().mean() > 0.95


def test_masked_text_keeps_replaces_and_masks_in_the_shares_asked_for():
    model = tiny.model({"masked_text": {"keep": 0.2, "replace": 0.3, "mask_ratio": 0.5}})
    (spec,) = model.views()["pairs"]
    view = tiny.rows("pairs", [spec], 800).views[spec]
    chosen = view.target != -100
    data, target = view.data[chosen], view.target[chosen]
    masked, kept = data == -1, data == target
    replaced = data[~masked & ~kept]
    share = [masked.float().mean().item(), kept.float().mean().item(), len(replaced) / len(data)]
    assert share == pytest.approx([0.5, 0.2, 0.3], abs=0.05)  # over 2000 words: four standard deviations
    size = get_tokenizer("clip").vocab_size
    assert replaced.float().mean().item() / size == pytest.approx(0.5, abs=0.06)  # random words are of the whole vocabulary
    assert replaced.unique().numel() > 0.95 * len(replaced)


@pytest.mark.parametrize("special", ["sot", "eot"])
def test_masked_text_never_replaces_a_word_by_a_start_or_an_end(special):
    model = tiny.model({"masked_text": {"keep": 0.0, "replace": 1.0, "mask_ratio": 0.5}})
    (spec,) = model.views()["pairs"]
    ids = get_tokenizer("clip").encode(tiny.WORDS, spec.context_length)
    params = spec.draw([Sample(str(i), None, [words]) for i, words in enumerate(tiny.WORDS)], torch.arange(len(ids)))
    drawn = params | {"word": torch.full_like(params["word"], getattr(get_tokenizer("clip"), special))}
    view = spec.render(ids, drawn)
    assert (view.target != -100).any(1).all()
    assert torch.equal(view.data, ids[:, : view.data.shape[1]])  # the word stays, and is predicted like a kept one
    other = spec.render(ids, params | {"word": torch.full_like(params["word"], 320)})
    assert (other.data[other.target != -100] == 320).all()


def test_masked_text_loss_is_cross_entropy_of_chosen_words():
    masked = objective("masked_text")
    target = torch.tensor([[-100, 5, -100], [7, -100, 9]])
    tokens = torch.randn(2, 3, 16)
    out = masked(text=Encoded(tokens=tokens, view=View(target, target)))
    logits = masked.decoder(tokens)
    torch.testing.assert_close(out["loss"], F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100))
    assert masked.count(text=Encoded(view=View(target, target))) == 3


def test_masked_text_without_a_chosen_word_is_zero_with_a_gradient():
    masked = objective("masked_text")
    target = torch.full((2, 3), -100)
    loss = masked(text=Encoded(tokens=torch.randn(2, 3, 16), view=View(target, target)))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert masked.decoder.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("kind", list(OBJECTIVES))
def test_every_objective_alone_trains_all_its_parameters(kind):
    model = tiny.model({kind: {}}, double=False)
    loss, _ = model(tiny.batch(model, double=False))
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.objectives.named_parameters():
        if ".teacher." in name:  # moved by the average, never by a gradient
            assert not parameter.requires_grad
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("kind", [k for k in OBJECTIVES if k not in ("clip", "dino")])
def test_every_objective_descends_beside_clip(kind):
    model = tiny.model({"clip": {}, kind: {}}, double=False)
    batch = tiny.batch(model, double=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = None
    for _ in range(15):
        loss, logs = model(batch)
        first = first or {k: v.item() for k, v in logs.items() if k.endswith("/loss")}
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(logs[k].item() < v for k, v in first.items())


def test_presets_name_real_options():
    fields = set(vars(Augment())) - {"preset"}
    assert all(set(options) <= fields for options in PRESETS.values())


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="augment preset 'strong' is unknown; known: weak"):
        objective("clip", augment="strong")


def test_a_strength_that_is_asked_for_takes_effect():
    context = tiny.context(tiny.towers())
    assert context.image_view(Augment(preset="weak", brightness=0.4)).jitter_prob == 1.0
    assert context.image_view(Augment(preset="weak", brightness=0.4, jitter_prob=0.3)).jitter_prob == 0.3
    assert context.image_view(Augment(preset="simclr", hue=0.2)).jitter_prob == 0.8
    assert context.image_view(Augment(preset="weak")).jitter_prob == 0.0


def test_clip_encodes_whole_images_at_the_end():
    model = tiny.model({"clip": {"token_drop": 0.5, "whole_tail": 0.25}})
    clip, batch = model.objectives["clip"], tiny.batch(model)

    def patches():
        return [e.mask for e in model.plan if e.view.modality == "image"]

    clip.before_step(0.74)
    assert patches()[0].ratio == 0.5
    dropped = model(batch)[0]
    clip.before_step(0.75)
    assert patches() == [None]
    whole = tiny.model({"clip": {}})
    assert torch.equal(model(batch)[0], whole(batch)[0])
    assert not torch.equal(dropped, whole(batch)[0])
