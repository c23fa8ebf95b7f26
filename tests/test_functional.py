"""Every loss against its naive form, in value and gradient, across tile borders."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmpretrain import functional
from mmpretrain.functional import info_nce, nt_xent, patchify, sigmoid_loss, unpatchify


@pytest.fixture(params=[3, 2048])
def tile(request, monkeypatch):
    monkeypatch.setattr(functional, "TILE", request.param)


def unit(n, d, seed):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def gradients(loss_of, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = loss_of(*leaves)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def same(ours, naive, *inputs):
    (a, ga), (b, gb) = gradients(ours, *inputs), gradients(naive, *inputs)
    torch.testing.assert_close(a, b)
    for x, y in zip(ga, gb):
        torch.testing.assert_close(x, y)


def naive_info_nce(a, b, scale):
    logits = scale * a @ b.T
    target = torch.arange(len(a))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@pytest.mark.usefixtures("tile")
def test_info_nce_is_two_cross_entropies():
    same(info_nce, naive_info_nce, unit(8, 5, 0), unit(8, 5, 1), torch.tensor(7.0, dtype=torch.float64))


@pytest.mark.usefixtures("tile")
def test_info_nce_one_direction_is_document_001():
    scale = torch.tensor(10.0, dtype=torch.float64)
    same(
        lambda a, b: info_nce(a, b, scale, symmetric=False),
        lambda a, b: F.cross_entropy(a @ b.T / 0.1, torch.arange(len(a))),
        unit(7, 4, 0),
        unit(7, 4, 1),
    )


def test_info_nce_of_equal_and_orthogonal_rows_is_closed_form():
    n, scale = 4, torch.tensor(1.0)
    eye = torch.eye(n)
    assert math.isclose(info_nce(eye, eye, scale).item(), math.log(math.e + n - 1) - 1, rel_tol=1e-6)
    same_row = eye[:1].repeat(n, 1)
    assert math.isclose(info_nce(same_row, same_row, scale).item(), math.log(n), rel_tol=1e-6)


def test_info_nce_survives_the_largest_scale():
    a = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    loss, (grad,) = gradients(lambda x: info_nce(x, -a, torch.tensor(100.0)), a)
    assert math.isclose(loss.item(), 200.0, rel_tol=1e-5)
    assert grad.isfinite().all()


def naive_nt_xent(a, b, temperature):
    """Equation 1 of Chen et al. 2020, pair by pair."""
    z = torch.cat([a, b])
    n = len(a)
    terms = []
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        others = torch.stack([z[i] @ z[k] / temperature for k in range(2 * n) if k != i])
        terms.append(torch.logsumexp(others, 0) - z[i] @ z[j] / temperature)
    return torch.stack(terms).mean()


@pytest.mark.usefixtures("tile")
def test_nt_xent_is_equation_one():
    same(lambda a, b: nt_xent(a, b, 0.3), lambda a, b: naive_nt_xent(a, b, 0.3), unit(5, 4, 2), unit(5, 4, 3))


def naive_sigmoid(a, b, scale, bias):
    n = len(a)
    total = 0
    for i in range(n):
        for j in range(n):
            z = 1 if i == j else -1
            total = total - F.logsigmoid(z * (scale * a[i] @ b[j] + bias))
    return total / n


@pytest.mark.usefixtures("tile")
def test_sigmoid_loss_is_equation_one():
    double = torch.float64
    same(sigmoid_loss, naive_sigmoid, unit(5, 4, 4), unit(5, 4, 5), torch.tensor(10.0, dtype=double), torch.tensor(-9.0, dtype=double))


@pytest.fixture(params=[0, 1, 2])
def one_of_three_ranks(request, monkeypatch):
    """Five rows a rank in tiles of three: the diagonal of matches enters the tiles of ranks 1 and 2 away from their corners."""
    monkeypatch.setattr(functional, "TILE", 3)
    monkeypatch.setattr(functional, "rank", lambda: request.param)

    def gather(x):
        others = [unit(len(x), x.shape[1], 50 + other) for other in range(3)]
        return torch.cat([*others[: request.param], x, *others[request.param + 1 :]])

    monkeypatch.setattr(functional, "all_gather_with_grad", gather)
    return request.param, gather


def test_sigmoid_loss_finds_its_matches_at_an_offset_that_is_not_a_multiple_of_the_tile(one_of_three_ranks):
    rank, gather = one_of_three_ranks

    def naive(a, b, scale, bias):
        z = torch.full((5, 15), -1.0, dtype=torch.float64)
        z[torch.arange(5), rank * 5 + torch.arange(5)] = 1.0
        return -F.logsigmoid(z * (scale * a @ gather(b).T + bias)).sum() / 5

    scalars = torch.tensor(10.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    same(sigmoid_loss, naive, unit(5, 4, 4), unit(5, 4, 5), *scalars)


def test_nt_xent_hides_each_view_from_itself_at_an_offset_that_is_not_a_multiple_of_the_tile(one_of_three_ranks):
    rank, gather = one_of_three_ranks

    def naive(a, b):
        local = torch.cat([a, b])
        logits = local @ gather(local).T / 0.3  # [10, 30]
        own = torch.arange(10)
        hidden = torch.zeros_like(logits, dtype=torch.bool)
        hidden[own, rank * 10 + own] = True
        return F.cross_entropy(logits.masked_fill(hidden, -math.inf), rank * 10 + (own + 5) % 10)

    same(lambda a, b: nt_xent(a, b, 0.3), naive, unit(5, 4, 2), unit(5, 4, 3))


def test_bf16_features_are_compared_in_fp32():
    a, b = unit(16, 8, 6).float(), unit(16, 8, 7).float()
    scale = torch.tensor(100.0)
    exact = info_nce(a.bfloat16().float(), b.bfloat16().float(), scale)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(info_nce(a.bfloat16(), b.bfloat16(), scale), exact)


def test_memory_of_the_backward_pass_holds_no_matrix(monkeypatch):
    """The largest tensor saved for the backward pass is linear in the number of rows."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        a = unit(300, 4, 8).requires_grad_()
        info_nce(a, a, torch.tensor(5.0, dtype=torch.float64)).backward()
    assert max(sizes) <= 300 * 4


def test_patchify_is_raster_order_and_invertible():
    x = torch.arange(2 * 3 * 4 * 6).float().reshape(2, 3, 4, 6)
    patches = patchify(x, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[0, 1], x[0, :, 0:2, 2:4].reshape(-1))
    assert torch.equal(unpatchify(patches, 2, (2, 3)), x)
