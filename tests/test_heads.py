"""The global BatchNorm is torch's BatchNorm where there is one process."""

import pytest
import torch
from torch import nn

from mmpretrain.heads import GlobalBatchNorm, mlp


@pytest.mark.parametrize("affine", [True, False])
def test_global_batch_norm_equals_torch(affine):
    torch.manual_seed(0)
    ours, theirs = GlobalBatchNorm(5, affine).double(), nn.BatchNorm1d(5, affine=affine).double()
    x = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    for _ in range(3):
        a, b = ours(x), theirs(x)
        torch.testing.assert_close(a, b)
    (ga,), (gb,) = (torch.autograd.grad(y.square().mul(torch.arange(5) + 1).tanh().sum(), x) for y in (a, b))
    torch.testing.assert_close(ga, gb)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
@pytest.mark.parametrize("last_norm", [True, False])
def test_mlp_has_the_asked_shape_and_trains(norm, last_norm):
    head = mlp(6, 10, 4, layers=3, norm=norm, last_norm=last_norm)
    assert sum(isinstance(m, nn.Linear) for m in head) == 3
    y = head(torch.randn(8, 6))
    assert y.shape == (8, 4)
    y.square().sum().backward()
    assert all(p.grad is not None for p in head.parameters())
    if norm == "batch" and last_norm:
        torch.testing.assert_close(y.mean(0), torch.zeros(4), atol=1e-5, rtol=0)


def test_unknown_norm_is_refused():
    with pytest.raises(ValueError, match="expected batch, layer or none"):
        mlp(2, 2, 2, norm="group")
