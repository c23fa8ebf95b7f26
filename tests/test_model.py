"""The step's machinery: one forward per distinct encode, merged passes equal to separate ones, chunks equal to one batch."""

import copy
from dataclasses import replace

import pytest
import torch

from mmpretrain.batch import take
from mmpretrain.heads import GlobalBatchNorm
from mmpretrain.model import PretrainModel, bare, freeze_unused, running_statistics
from tests import tiny

SHARED = {"clip": {"augment": "simclr"}, "simclr": {}, "simmim": {"augment": "simclr"}, "masked_text": {}}
TWO_SOURCES = {
    "clip": {},
    "simclr": {"source": "photos"},
    "simmim": {"source": "photos", "augment": "simclr"},
    "masked_text": {"weight": 0.3},
}
ALL = {
    "clip": {}, "siglip": {}, "simclr": {"norm": "layer"}, "simclr_photos": {"kind": "simclr", "source": "photos", "loss": "info_nce"},
    "simmim": {"mask_patch": 2, "normalise_target": True}, "masked_text": {"mask_ratio": 0.4},
    "flip": {"kind": "clip", "token_drop": 0.5, "view_index": 1},
}  # fmt: skip


@pytest.fixture
def trunk_calls(monkeypatch):
    """Rows of every trunk forward."""
    from mmpretrain.towers.vision import VisionTransformer

    calls = []
    original = VisionTransformer.trunk

    def spy(self, tokens, *args, **kwargs):
        calls.append(len(tokens.x))
        return original(self, tokens, *args, **kwargs)

    monkeypatch.setattr(VisionTransformer, "trunk", spy)
    return calls


def test_objectives_that_share_a_view_share_its_forward(trunk_calls):
    model = tiny.model(SHARED)
    # clip and simclr's first are one view; simclr's second, and the masked copy of the first, are others.
    assert len([e for e in model.plan if e.view.modality == "image"]) == 3
    assert {len(v) for v in model.views().values()} == {4}
    model(tiny.batch(model))
    assert sum(trunk_calls) == 3 * 8
    assert len(trunk_calls) == 2  # pooled outputs in one pass, tokens in another


def test_a_disabled_objective_costs_nothing(trunk_calls):
    model = tiny.model({"clip": {}})
    assert set(model.views()) == {"pairs"}
    model(tiny.batch(model))
    assert trunk_calls == [8]


@pytest.mark.parametrize("objectives", [SHARED, TWO_SOURCES, ALL])
def test_merged_forwards_equal_separate_ones(objectives):
    model = tiny.model(objectives)
    batch = tiny.batch(model)
    merged = model.encode(batch, model.plan)
    for encode in model.plan:
        (alone,) = model.encode(batch, [encode]).values()
        together = merged[next(k for k in merged if k == type(k)(**{**vars(encode), "outputs": frozenset()}))]
        for name in encode.outputs:
            torch.testing.assert_close(getattr(together, name), getattr(alone, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("asking", [0, 1, 2])
def test_attention_that_one_encode_of_a_merged_pass_wants_is_its_own(trunk_calls, asking):
    model = tiny.model({"simclr": {}, "clip": {}})
    batch = tiny.batch(model)
    encodes = [encode for encode in model.plan if encode.view.modality == "image"]
    encodes[asking] = replace(encodes[asking], outputs=encodes[asking].outputs | {"attention"})
    done = model.encode(batch, encodes)
    assert trunk_calls == [3 * 8]
    wanted = done[bare(encodes[asking])].attention
    alone = model.encode(batch, [encodes[asking]])[bare(encodes[asking])].attention
    assert wanted.shape == (8, 16)
    torch.testing.assert_close(wanted, alone)


def test_the_sum_is_weighted_and_logged_per_objective():
    model = tiny.model({"clip": {"weight": 2.0}, "masked_text": {"weight": 0.25}})
    loss, logs = model(tiny.batch(model))
    torch.testing.assert_close(loss.double(), (2 * logs["clip/loss"] + 0.25 * logs["masked_text/loss"]).double(), rtol=1e-6, atol=0)
    assert {"clip/logit_scale", "masked_text/accuracy"} <= set(logs)


@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("objectives", [SHARED, TWO_SOURCES, ALL, {"simmim": {}}, {"clip": {}}])
def test_chunks_equal_one_batch(objectives, chunks):
    """Including masked text, whose rows hold different numbers of hidden words."""
    direct, chunked = tiny.model(objectives), tiny.model(objectives)
    batch = tiny.batch(direct)
    loss, logs = direct(batch)
    loss.backward()
    total, found = chunked.backward_in_chunks(batch, chunks, torch.Tensor.backward)
    torch.testing.assert_close(total, loss.detach(), rtol=1e-6, atol=0)
    assert set(found) == set(logs)
    for name in logs:
        torch.testing.assert_close(found[name].double(), logs[name].double(), rtol=1e-6, atol=1e-12)
    expected, got = tiny.gradients(direct), tiny.gradients(chunked)
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


def test_every_trainable_parameter_gets_a_gradient_after_freezing():
    model = tiny.model({"simclr": {}})
    batch = tiny.batch(model)
    before = {n: b.clone() for n, b in model.named_buffers()}
    unused, reached = freeze_unused(model, take(batch, 0, 2))
    assert reached[0.0] == {name for name, p in model.named_parameters() if p.requires_grad}
    assert "towers.visual.proj" in unused  # simclr reads the pooled output, before the joint projection
    assert any(name.startswith("towers.text.") for name in unused)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    model(batch)[0].backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_masked_encode_uses_the_towers_embedding():
    model = tiny.model({"simmim": {}})
    batch = tiny.batch(model)
    model(batch)[0].backward()
    assert model.towers.visual.mask_embedding.grad.abs().sum() > 0


def test_unknown_output_is_refused():
    model = tiny.model({"clip": {}})
    objective = model.objectives["clip"]
    objective.needs["image"] = type(objective.needs["image"])("pairs", objective.needs["image"].view, outputs=frozenset({"feature"}))
    with pytest.raises(ValueError, match="feature"):
        PretrainModel(model.towers, {"clip": objective}, {"clip": 1.0})


def test_bf16_is_near_fp32():
    model = tiny.model(SHARED, double=False)
    batch = tiny.batch(model, double=False)
    exact, _ = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = model(batch)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0)


def test_the_teacher_stays_in_evaluation_mode():
    student = tiny.model({"clip": {}})
    model = PretrainModel(student.towers, dict(student.objectives.items()), {"clip": 1.0}, copy.deepcopy(student.towers))
    for mode in (True, False, True):
        model.train(mode)
        assert all(module.training is mode for module in model.towers.modules())
        assert not any(module.training for module in model.teacher.modules())


def test_running_statistics_are_those_that_a_forward_pass_changes():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4), GlobalBatchNorm(4))
    before = [buffer.clone() for buffer in running_statistics(module)]
    module(torch.randn(5, 3))
    assert len(before) == 5
    assert not any(torch.equal(a, b) for a, b in zip(before, running_statistics(module)))


def test_a_tower_that_averages_its_tokens_runs_once(trunk_calls):
    """Nothing is gained by a pass of its own where pooling reads every token."""
    model = tiny.model(SHARED, pool_type="avg")
    model(tiny.batch(model))
    assert trunk_calls == [3 * 8]
