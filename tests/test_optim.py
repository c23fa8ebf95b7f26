"""Schedules at their corners, and which parameter gets which rate and decay."""

import pytest
import torch
from torch import nn

from mmpretrain import assembly
from mmpretrain.optim import OptimConfig, align_tops, build_optimizer, learning_rate, parameter_groups, set_learning_rate
from mmpretrain.towers.specs import build_towers
from tests import tiny


def test_cosine_with_warmup():
    c = OptimConfig(warmup_steps=10, schedule="cosine", final_lr=0.1)
    assert learning_rate(c, 0, 110) == pytest.approx(0.1)
    assert learning_rate(c, 9, 110) == 1.0
    assert learning_rate(c, 10, 110) == 1.0
    assert learning_rate(c, 60, 110) == pytest.approx(0.55)
    assert learning_rate(c, 110, 110) == pytest.approx(0.1)


def test_wsd_is_flat_then_linear():
    c = OptimConfig(warmup_steps=0, schedule="wsd", decay_fraction=0.2)
    assert [learning_rate(c, s, 100) for s in (0, 50, 80)] == pytest.approx([1.0, 1.0, 1.0])
    assert learning_rate(c, 90, 100) == pytest.approx(0.5)
    assert learning_rate(c, 100, 100) == 0.0


def test_constant():
    assert learning_rate(OptimConfig(warmup_steps=2, schedule="constant"), 77, 100) == 1.0


def test_groups_decay_matrices_only_and_scale_layers():
    model = nn.ModuleDict({"embed": nn.Linear(2, 3), "block": nn.Linear(3, 3), "head": nn.Linear(3, 1)})
    named = list(model.named_parameters())
    layers = {"embed.weight": 0, "embed.bias": 0, "block.weight": 1, "block.bias": 1}
    c = OptimConfig(lr=1.0, weight_decay=0.1, layer_decay=0.5, head_lr=3.0)
    groups = parameter_groups(named, c, layers)
    found = {name: (g["weight_decay"], g["lr_scale"]) for g in groups for name in g["names"]}
    assert found == {
        "embed.weight": (0.1, 0.5), "embed.bias": (0.0, 0.5),
        "block.weight": (0.1, 1.0), "block.bias": (0.0, 1.0),
        "head.weight": (0.1, 3.0), "head.bias": (0.0, 3.0),
    }  # fmt: skip
    optimizer = build_optimizer(groups, c)
    assert set_learning_rate(optimizer, c, 5, 10) == pytest.approx(0.5)
    assert {g["lr_scale"]: g["lr"] for g in optimizer.param_groups} == pytest.approx({0.5: 0.25, 1.0: 0.5, 3.0: 1.5})


def test_position_embeddings_do_not_decay():
    groups = parameter_groups([("visual.positional_embedding", nn.Parameter(torch.zeros(4, 2)))], OptimConfig(), {})
    assert groups[0]["weight_decay"] == 0.0


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_every_optimizer_descends(name):
    w = nn.Parameter(torch.ones(3, 2))
    c = OptimConfig(name=name, lr=0.01, weight_decay=0.0)
    optimizer = build_optimizer(parameter_groups([("w", w)], c, {}), c)
    for _ in range(20):
        optimizer.zero_grad()
        w.square().sum().backward()
        optimizer.step()
    assert w.square().sum() < 5


def test_the_last_layer_of_every_tower_gets_the_full_rate():
    layers = align_tops([{"deep.0": 0, "deep.11": 11, "deep.head": 12}, {"flat.0": 0, "flat.3": 3}, {}])
    named = [(name, nn.Parameter(torch.zeros(2, 2))) for name in layers]
    groups = parameter_groups(named, OptimConfig(lr=1.0, layer_decay=0.5), layers)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale == pytest.approx({"deep.0": 0.5**12, "deep.11": 0.5, "deep.head": 1.0, "flat.0": 0.5**3, "flat.3": 1.0})


def test_layers_names_the_parameters_of_both_towers():
    towers = build_towers(tiny.MODEL | {"text_cfg": tiny.MODEL["text_cfg"] | {"layers": 1}})
    found = assembly.layers(towers)
    assert found["towers.visual.proj"] == found["towers.text.text_projection"] == max(found.values())
    assert set(found) == {f"towers.{name}" for name, _ in towers.named_parameters()}
