"""The cost of each objective: what is measured is what is run, and measuring changes nothing."""

from contextlib import nullcontext

import pytest
import torch

from mmpretrain.cost_probe import CostProbe
from mmpretrain.model import running_statistics
from mmpretrain.report.tables import costs
from tests import tiny

OBJECTIVES = {"clip": {}, "simclr": {"source": "photos"}, "masked_text": {}}


def probe(model, every=1, chunks=1):
    return CostProbe(model, every, chunks, nullcontext, torch.device("cpu"))


def test_every_objective_has_its_turn_and_the_passes_are_its_own(monkeypatch):
    model = tiny.model(OBJECTIVES)
    batch = tiny.batch(model)
    passes = []
    original = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, b, names=None: passes.append(list(names)) or original(self, b, names))
    measured = {}
    for step in (1, 2, 3):
        measured |= probe(model).measure(step, batch)
    assert {name.partition("/")[0] for name in measured if "/" in name} == set(OBJECTIVES)
    assert ["clip"] in passes
    assert ["simclr", "masked_text"] in passes
    assert all(measured[f"{name}/cost_alone_s"] > 0 for name in OBJECTIVES)


def test_memory_is_counted_exactly():
    """The activations of two objectives that share nothing are the sum of theirs."""
    model = tiny.model({"clip": {}, "simclr": {"source": "photos"}})
    batch, found = tiny.batch(model), {}
    for step in (1, 2):
        found |= probe(model).measure(step, batch)
    parts = found["clip/cost_memory_mb"] + found["simclr/cost_memory_mb"]
    assert found["cost_memory_mb"] == pytest.approx(parts, rel=0.02)
    half = probe(model, chunks=2).measure(2, batch)
    assert half["clip/cost_memory_mb"] < 0.75 * found["clip/cost_memory_mb"]  # one chunk's activations live at a time


def test_measuring_leaves_no_trace():
    model = tiny.model(OBJECTIVES)
    batch = tiny.batch(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert running_statistics(model)  # simclr's head has some
    probe(model).measure(2, batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_report_shows_medians():
    lines = [
        {"step": step, "clip/cost_alone_s": s, "clip/cost_without_s": 0.75, "clip/cost_alone": 0.9, "clip/cost_memory_mb": 3.0,
         "cost_memory_mb": 4.0, "cost_s": 1.0}
        for step, s in ((1, 0.1), (2, 0.9), (3, 0.2))
    ]  # fmt: skip
    table = costs([{"step": 1, "loss": 3.0}, *lines])
    assert table["rows"][0] == ["clip", "0.2", "20 %", "25 %", "3"]
    assert table["rows"][1][0] == "all together"
    assert costs([{"step": 1, "loss": 3.0}]) is None
