"""Counter-based random numbers: uniform, independent of company, and stable across processes."""

import subprocess
import sys

import pytest
import torch

from mmpretrain import rng


def test_uniform_is_uniform_and_streams_are_independent():
    seeds = rng.combine(0, 1, torch.arange(4))
    u, v = rng.uniform(seeds, "a", 20000), rng.uniform(seeds, "b", 20000)
    assert torch.allclose(u.mean(1), torch.full((4,), 0.5), atol=0.01)
    assert torch.allclose(u.var(1), torch.full((4,), 1 / 12), atol=0.005)
    rows = torch.cat([u, v])
    assert (torch.corrcoef(rows) - torch.eye(8)).abs().max() < 0.03
    assert u.min() >= 0
    assert u.max() < 1


def test_normal_has_unit_variance():
    x = rng.normal(rng.combine(torch.arange(3)), "n", 20000)
    assert x.mean().abs() < 0.02
    assert (x.std() - 1).abs() < 0.02


def test_a_row_does_not_depend_on_its_batch():
    seeds = rng.combine(7, torch.arange(10))
    assert torch.equal(rng.bits(seeds, "x", 3)[4:6], rng.bits(seeds[4:6], "x", 3))
    assert rng.uniform(seeds, "x").shape == (10,)


def test_permutation_is_one():
    order = rng.permutation(3, 1000)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(order, rng.permutation(4, 1000))


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_draws_do_not_depend_on_the_salt_of_hash(hash_seed):
    code = "import torch; from mmpretrain import rng as r; print(r.bits(r.combine(1, torch.arange(2)), ('view', 0.5), 2).tolist())"
    out = subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(rng.bits(rng.combine(1, torch.arange(2)), ("view", 0.5), 2).tolist())


def test_integers_cover_their_range():
    values = rng.integers(rng.combine(torch.arange(1)), "i", 5, 5000)[0]
    assert torch.equal(values.unique(), torch.arange(5))
    assert values.bincount().min() > 900
