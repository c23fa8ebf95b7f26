"""The EMA teacher: closed-form averages, schedules, independence of the student."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmpretrain.towers.teacher import Teacher


def student():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_update_is_the_moving_average():
    module = student()
    teacher = Teacher(module, 0.9, 0.9, "constant")
    before = [p.clone() for p in module.parameters()]
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    for step in range(1, 4):
        assert teacher.update(0.5) == 0.9
        for old, mine in zip(before, teacher.module.parameters()):
            torch.testing.assert_close(mine, old + 1 - 0.9**step)  # the student stands still at old + 1
    module(torch.randn(8, 3))  # moves the running statistics
    teacher.update(0.5)
    assert torch.equal(teacher.module[1].running_mean, module[1].running_mean)
    assert teacher.module[1].num_batches_tracked == 1


def test_schedules():
    cosine = Teacher(student(), 0.99, 1.0)
    assert [round(cosine.momentum(p), 6) for p in (0, 0.5, 1)] == [0.99, 0.995, 1.0]
    assert cosine.momentum(0.25) == pytest.approx(1 - 0.01 * (0.5**0.5 + 1) / 2)
    assert Teacher(student(), 0.9, 1.0, "constant").momentum(0.7) == 0.9


def test_teacher_never_trains():
    module = student()
    teacher = Teacher(module)
    assert not any(p.requires_grad for p in teacher.parameters())
    holder = nn.ModuleList([teacher]).train()
    assert not any(m.training for m in holder[0].modules())
    assert module.training
    assert len(list(teacher.parameters())) == len(list(module.parameters()))  # the student is no part of it
    assert not teacher(torch.randn(4, 3)).requires_grad


def test_state_goes_through_safetensors_under_the_students_names(tmp_path):
    module = student()
    teacher = Teacher(module)
    assert teacher.state_dict().keys() == module.state_dict().keys()
    with torch.no_grad():
        module[0].weight.add_(1)
    teacher.update(0.0)
    save_file(teacher.state_dict(), tmp_path / "teacher.safetensors")
    other = Teacher(student())
    other.load_state_dict(load_file(tmp_path / "teacher.safetensors"))
    for a, b in zip(teacher.module.parameters(), other.module.parameters()):
        assert torch.equal(a, b)


def test_errors():
    with pytest.raises(ValueError, match=r"momentum is 1\.5"):
        Teacher(student(), 1.5)
    with pytest.raises(ValueError, match="choose cosine"):
        Teacher(student(), schedule="step")
