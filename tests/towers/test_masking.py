"""Masks: exact counts, a pure function of a row's seed, and the shapes each kind promises."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpretrain.rng import combine
from mmpretrain.towers.masking import draw_mask
from mmpretrain.types import MaskSpec


def seeds(n=16):
    return combine(7, torch.arange(n))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["random", "block", "attentive"]),
    ratio=st.floats(0, 1),
    patch=st.integers(1, 4),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_every_row_hides_exactly_the_ratio(kind, ratio, patch, grid):
    num = grid[0] * grid[1]
    mask = draw_mask(MaskSpec(ratio, kind=kind, patch=patch), seeds(5), grid, torch.rand(5, num))
    assert mask.shape == (5, num)
    assert mask.dtype == torch.bool
    assert (mask.sum(1) == round(ratio * num)).all()


@pytest.mark.parametrize("kind", ["random", "block"])
@pytest.mark.parametrize("patch", [1, 2])
def test_a_row_depends_on_its_seed_alone(kind, patch):
    spec = MaskSpec(0.6, kind=kind, patch=patch)
    whole = draw_mask(spec, seeds(), (8, 8))
    assert torch.equal(draw_mask(spec, seeds(), (8, 8)), whole)
    assert torch.equal(draw_mask(spec, seeds()[5:9].flip(0), (8, 8)), whole[5:9].flip(0))
    assert len({tuple(row.tolist()) for row in whole}) == 16
    assert not torch.equal(draw_mask(MaskSpec(0.6, kind=kind, patch=patch, index=1), seeds(), (8, 8)), whole)


def test_every_patch_is_hidden_as_often():
    often = draw_mask(MaskSpec(0.5), seeds(2000), (4, 4)).float().mean(0)
    assert (often - 0.5).abs().max() < 0.06  # five standard deviations


def test_squares_of_patches():
    mask = draw_mask(MaskSpec(0.5, patch=2), seeds(), (8, 8)).view(16, 4, 2, 4, 2)
    count = mask.sum((2, 4))  # [16,4,4] hidden of each square
    assert ((count == 0) | (count == 4)).all()
    uneven = draw_mask(MaskSpec(0.5, patch=2), seeds(), (5, 5))  # 12 of 25: squares at the border are cut, one is hidden in part
    assert (uneven.sum(1) == 12).all()


def test_blocks_hold_together_more_than_random_patches():
    def neighbours(mask):
        mask = mask.view(-1, 14, 14)
        return (mask[:, 1:] == mask[:, :-1]).float().mean() + (mask[:, :, 1:] == mask[:, :, :-1]).float().mean()

    spec = MaskSpec(0.4)
    assert neighbours(draw_mask(MaskSpec(0.4, kind="block"), seeds(64), (14, 14))) > 1.6
    assert neighbours(draw_mask(spec, seeds(64), (14, 14))) < 1.2


def test_attentive_keeps_the_most_attended():
    attention = torch.rand(16, 36)
    mask = draw_mask(MaskSpec(0.5, mode="drop", kind="attentive"), seeds(), (6, 6), attention)
    for row in range(16):
        assert attention[row][mask[row]].max() <= attention[row][~mask[row]].min()
    squares = attention.view(16, 3, 2, 3, 2).mean((2, 4)).flatten(1)
    mask = draw_mask(MaskSpec(4 / 9, kind="attentive", patch=2), seeds(), (6, 6), attention)
    hidden = mask.view(16, 3, 2, 3, 2).all(4).all(2).flatten(1)
    for row in range(16):
        assert hidden[row].sum() == 4
        assert squares[row][hidden[row]].max() <= squares[row][~hidden[row]].min()


@pytest.mark.parametrize(
    ("squares", "attended", "hidden"),
    [
        ([[0, 0, 1], [0, 0, 1], [2, 2, 3]], [0.10, 0.20, 0.15, 0.25], (0, 2)),  # sums: 0.4, 0.4, 0.3, 0.25
        ([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3]], [0.10, 0.15, 0.16, 0.17], (0,)),  # sums: 0.4, 0.6, 0.32, 0.34
    ],
)
def test_attentive_squares_at_a_ragged_border_count_by_their_mean(squares, attended, hidden):
    """A square that the border cuts is not less attended for being small."""
    square = torch.tensor(squares)
    attention, expected = torch.tensor(attended)[square], torch.isin(square, torch.tensor(hidden))
    spec = MaskSpec(expected.sum().item() / square.numel(), kind="attentive", patch=2)
    for a, wanted in ((attention, expected), (attention.T, expected.T)):
        assert torch.equal(draw_mask(spec, seeds(1), tuple(a.shape), a.reshape(1, -1)).view(a.shape), wanted)


def test_masks_are_the_same_in_another_process():
    code = (
        "import torch; from mmpretrain.rng import combine; from mmpretrain.types import *\n"
        "from mmpretrain.towers.masking import draw_mask\n"
        "e = Encode('pairs', None, outputs=frozenset({'features', 'tokens', 'attention', 'pooled'}))\n"
        "print(draw_mask(MaskSpec(0.5, from_=e), combine(7, torch.arange(3)), (4, 4)).int().tolist())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout  # its own hash salt
    assert found.strip() == str(draw_mask(MaskSpec(0.5), seeds(3), (4, 4)).int().tolist())


def test_errors():
    with pytest.raises(ValueError, match=r"ratio 1\.5"):
        draw_mask(MaskSpec(1.5), seeds(), (4, 4))
    with pytest.raises(ValueError, match="leaves some"):
        draw_mask(MaskSpec(1.0, mode="drop"), seeds(), (4, 4))
    with pytest.raises(ValueError, match="needs the class-token attention"):
        draw_mask(MaskSpec(0.5, kind="attentive"), seeds(), (4, 4))
    with pytest.raises(ValueError, match="same patch grid"):
        draw_mask(MaskSpec(0.5, kind="attentive"), seeds(), (4, 4), torch.rand(16, 9))
