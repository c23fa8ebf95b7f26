"""DINO against a loop over the paper's algorithm 1, and what the protocol promises: freezing, the teacher's copy, the centre."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from mmpretrain import checkpoint, trainer
from mmpretrain.config import recipe as recipes
from mmpretrain.cost_probe import CostProbe
from mmpretrain.model import PretrainModel, freeze_unused
from mmpretrain.trainer import train
from tests import runs, tiny

RECIPE = {
    "objectives": {
        "clip": {"source": "pairs"},
        "dino": {"source": "photos", **tiny.OPTIONS["dino"], "freeze_last_layer": 0.5},
    }
}


def test_loss_gradients_and_centre_are_those_of_a_loop_over_algorithm_1():
    model = tiny.model({"dino": {"local_crops": 3}})
    dino, batch = model.objectives["dino"], tiny.batch(model)
    dino.centre.copy_(torch.linspace(-0.1, 0.1, 24))
    dino.before_step(0.15)  # halfway through the warm-up of 0.3
    centre, encoded = dino.centre.clone(), model.encode(batch, model.plan)
    arguments = model.arguments("dino", encoded)
    loss = dino(**arguments)["loss"]

    assert dino.teacher_temperature == pytest.approx(0.055)
    student = [dino.head(view.pooled) for view in arguments["student"]]
    teacher = [dino.teacher["head"](view.pooled) for view in arguments["teacher_views"]]
    assert [view.view.data.shape[-1] for view in arguments["student"]] == [16, 16, 8, 8, 8]
    terms = []
    for t in range(2):
        for s in range(5):
            if s == t:
                continue
            for row in range(8):
                p = F.softmax((teacher[t][row] - centre) / 0.055, dim=0)
                terms.append(-sum(p[k] * F.log_softmax(student[s][row] / 0.1, dim=0)[k] for k in range(24)))
    naive = torch.stack(terms).mean()
    assert loss.item() == pytest.approx(naive.item(), rel=1e-12)
    parameters = [p for p in [*model.towers.visual.parameters(), *dino.head.parameters()] if p.requires_grad]
    mine, theirs = (torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in (loss, naive))
    for a, b in zip(mine, theirs):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(dino.centre, 0.9 * centre + 0.1 * torch.cat(teacher).mean(0), rtol=1e-12, atol=1e-14)


def test_a_teacher_that_equals_its_student_sees_uniform_outputs_at_high_temperature():
    model = tiny.model({"dino": {"temperature": 1e4, "warmup_teacher_temperature": 1e4}})
    outputs = model.objectives["dino"](**model.arguments("dino", model.encode(tiny.batch(model), model.plan)))
    assert outputs["loss"].item() == pytest.approx(math.log(24), rel=1e-6)
    assert outputs["teacher_entropy"].item() == pytest.approx(math.log(24), rel=1e-6)


def test_the_student_comes_nearer_to_a_fixed_teacher():
    model = tiny.model({"dino": {}}, double=False)
    batch, dino = tiny.batch(model, double=False), model.objectives["dino"]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    distances = []
    for _ in range(20):
        loss, logs = model(batch)
        dino.centre.zero_()
        distances.append(loss.item() - logs["dino/teacher_entropy"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert distances[-1] < 0.7 * distances[0]


def test_chunks_equal_one_batch_and_encode_the_teacher_once(monkeypatch):
    whole, parts = (tiny.model({"clip": {"source": "pairs"}, "dino": {"source": "photos"}}) for _ in range(2))
    batch = tiny.batch(whole)
    loss, _ = whole(batch)
    loss.backward()
    calls = []
    trunk = parts.teacher.visual.trunk
    monkeypatch.setattr(parts.teacher.visual, "trunk", lambda *a, **k: (calls.append(1), trunk(*a, **k))[1])
    total, _ = parts.backward_in_chunks(batch, 4, torch.Tensor.backward)
    assert total.item() == pytest.approx(loss.item(), rel=1e-12)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters()):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-13, msg=name)
    torch.testing.assert_close(parts.objectives["dino"].centre, whole.objectives["dino"].centre, rtol=1e-12, atol=1e-15)
    assert len(calls) == 4  # once a chunk, where the student goes twice


def test_the_last_layer_takes_no_step_while_frozen_and_the_rest_does(tmp_path):
    data = runs.shards(tmp_path / "data")
    steps = {}
    for stop in (6, 7):
        recipe = runs.recipe(data, tmp_path / f"run{stop}", **RECIPE)
        config = recipes.assemble(recipe | {"checkpoint": {"every": 1, "keep": 20}})
        if stop == 6:
            train(config)
            for step in (1, 6, 7, 12):
                steps[step] = checkpoint.load_tensors(tmp_path / "run6" / "checkpoints" / f"step-{step:08d}", "objectives")
    last, inner = "dino.head.last.weight", "dino.head.mlp.0.weight"
    assert torch.equal(steps[1][last], steps[6][last])  # the first half of 12 steps
    assert not torch.equal(steps[6][last], steps[7][last])
    assert not torch.equal(steps[1][inner], steps[6][inner])
    copied = "dino.teacher.head.mlp.0.weight"
    assert not torch.equal(steps[12][copied], steps[12][inner])
    assert not torch.equal(steps[12][copied], steps[1][copied])


@pytest.mark.parametrize("stop", [4, 6, 9])
def test_a_resume_through_the_freeze_is_bit_identical(tmp_path, stop):
    data = runs.shards(tmp_path / "data")
    train(recipes.assemble(runs.recipe(data, tmp_path / "whole", **RECIPE)))
    with runs.broken_off(stop):
        train(recipes.assemble(runs.recipe(data, tmp_path / "broken", **RECIPE)))
    train(recipes.assemble(runs.recipe(data, tmp_path / "broken", **RECIPE)))
    runs.assert_same_run(tmp_path / "broken", tmp_path / "whole")


def test_measured_costs_dry_runs_and_skipped_steps_leave_the_centre(tmp_path, monkeypatch):
    model = tiny.model({"clip": {"source": "pairs"}, "dino": {"source": "photos"}}, double=False)
    batch, dino = tiny.batch(model, double=False), model.objectives["dino"]
    before = dino.centre.clone()
    probe = CostProbe(model, 1, 1, nullcontext, torch.device("cpu"))
    probe.measure(1, batch)
    freeze_unused(model, batch)
    assert torch.equal(dino.centre, before)
    model(batch)
    assert not torch.equal(dino.centre, before)

    data = runs.shards(tmp_path / "data")
    seen, forward = [], PretrainModel.forward

    def poisoned(self, *arguments):
        if self.training and trainer_steps:
            seen.append(self.objectives["dino"].centre.clone())
        loss, logs = forward(self, *arguments)
        return (loss * float("nan") if trainer_steps == [3] else loss), logs

    trainer_steps: list[int] = []
    real = trainer.set_learning_rate
    monkeypatch.setattr(
        trainer, "set_learning_rate", lambda o, c, step, n: (trainer_steps.__setitem__(slice(None), [step]), real(o, c, step, n))[1]
    )
    monkeypatch.setattr(PretrainModel, "forward", poisoned)
    train(recipes.assemble(runs.recipe(data, tmp_path / "run", cost_every=0, **RECIPE)))
    assert torch.equal(seen[3], seen[4])  # the centre before the bad step, and before the one after it
    assert not torch.equal(seen[4], seen[5])


def test_without_a_teacher_the_recipe_is_refused(tmp_path):
    from mmpretrain.config.build import OptionError

    data = runs.shards(tmp_path / "data")
    with pytest.raises(OptionError, match="'dino' needs a teacher: add teacher"):
        train(recipes.assemble(runs.recipe(data, tmp_path / "run", **RECIPE) | {"teacher": None}))


def test_the_copy_of_the_head_is_an_average():
    model = tiny.model({"dino": {}})
    dino = model.objectives["dino"]
    before = copy.deepcopy(dino.teacher["head"])
    from mmpretrain.towers.teacher import Teacher

    teacher = Teacher(model.towers, 0.8, 0.8, "constant", [(dino.head, dino.teacher["head"])])
    with torch.no_grad():
        for parameter in dino.head.parameters():
            parameter.add_(1.0)
    teacher.update(0.3)
    for old, now in zip(before.parameters(), dino.teacher["head"].parameters()):
        torch.testing.assert_close(now, old + 0.2)
