"""Memory of batches: lent again only when nobody can see it any more."""

import gc

import torch

from mmpretrain.data.buffers import SMALL, Buffers, cat

SHAPE = (4, SMALL // 4)  # float32: four times the least size that is kept


def test_memory_comes_back_when_the_last_view_is_gone():
    buffers = Buffers()
    first = buffers.empty(SHAPE)
    place = first.data_ptr()
    view = first.fill_(1.0)[1:].t()
    del first
    gc.collect()
    other = buffers.empty(SHAPE).fill_(2.0)  # the view still holds the first
    assert other.data_ptr() != place
    assert (view == 1).all()
    del view
    gc.collect()
    assert buffers.empty(SHAPE).data_ptr() == place
    assert buffers.empty((3, 3)).shape == (3, 3)


def test_a_graph_holds_its_memory():
    buffers = Buffers()
    x = buffers.empty(SHAPE).fill_(3.0)
    w = torch.ones(SHAPE, requires_grad=True)
    loss = (w * x).sum()
    del x
    gc.collect()
    buffers.empty(SHAPE).fill_(-1.0)
    loss.backward()
    assert (w.grad == 3).all()


def test_cat_is_torchs():
    parts = [torch.randint(0, 255, (n, 3, 200, 200), dtype=torch.uint8) for n in (2, 1, 5)]
    assert torch.equal(cat(parts), torch.cat(parts))
