"""Run by torchrun: gradients of two ranks, each with half the rows, against one process with all of them."""

import sys

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mmpretrain import distributed
from mmpretrain.batch import take
from mmpretrain.functional import info_nce, nt_xent, sigmoid_loss, unit
from mmpretrain.heads import GlobalBatchNorm, use_global_statistics
from tests import tiny

EVERYTHING = {
    "clip": {"augment": "simclr"}, "siglip": {}, "simclr": {"source": "photos"}, "simmim": {"source": "photos", "augment": "simclr"},
    "masked_text": {"weight": 0.3, "mask_ratio": 0.4}, "dino": {"source": "photos"}, "mae": {"source": "photos"},
}  # fmt: skip


def expected(objectives, double):
    """One process, all rows: computed before the process group exists, so that nothing is gathered."""
    model = tiny.model(objectives, double=double)
    loss, logs = model(tiny.batch(model, double=double))
    loss.backward()
    return loss.detach(), logs, tiny.gradients(model)


def batch_norm_tower() -> tuple[torch.nn.Module, torch.Tensor]:
    """A convolutional tower with BatchNorms, in float64, and its pictures."""
    torch.manual_seed(0)
    tower = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3), torch.nn.BatchNorm2d(4)
    )
    return tower.double(), torch.randn(8, 3, 9, 9, dtype=torch.float64)


def compare(got, want, rtol, what):
    assert set(got) == set(want), what
    for name, value in want.items():
        torch.testing.assert_close(
            got[name], value, rtol=rtol, atol=rtol * float(value.abs().max()) + 1e-15, msg=lambda m, n=name: f"{what} {n}: {m}"
        )


def losses_alone():
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale, bias = torch.tensor([3.0], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)
    batch_norm = GlobalBatchNorm(6).double()
    functions = {
        "info_nce": lambda v: info_nce(unit(v), unit(v.roll(1, 1)), scale),
        "one direction": lambda v: info_nce(unit(v), unit(v.roll(1, 1)), scale, symmetric=False),
        "nt_xent": lambda v: nt_xent(unit(v), unit(v.roll(1, 1)), 0.2),
        "sigmoid": lambda v: sigmoid_loss(unit(v), unit(v.roll(1, 1)), scale, bias),
        "batch norm": lambda v: (batch_norm(v).tanh() * torch.arange(6)).sum(1).mean(),
    }
    return x, functions


class UnsendableError(ValueError):
    """Takes two arguments, so that it cannot be unpickled."""

    def __init__(self, message: str, other: object = None) -> None:
        super().__init__(message)
        self.other = other or (lambda: None)


def raises(error: Exception) -> None:
    raise error


def main() -> None:
    x, functions = losses_alone()
    alone = {}
    for name, function in functions.items():
        leaf = x.clone().requires_grad_()
        loss = function(leaf)
        alone[name] = (loss.detach(), torch.autograd.grad(loss, leaf)[0])
    cases = [(EVERYTHING, True, 1e-9), (EVERYTHING, False, 1e-4)]
    single = [expected(objectives, double) for objectives, double, _ in cases]

    tower_alone, pictures = batch_norm_tower()
    tower_alone(pictures).tanh().square().mean().backward()

    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    here = slice(rank * 8 // world, (rank + 1) * 8 // world)
    for name, function in functions.items():
        leaf = x[here].clone().requires_grad_()
        loss = function(leaf)
        grad = torch.autograd.grad(loss, leaf)[0] / world  # DDP's mean over ranks
        mean = distributed.average({"loss": loss})["loss"]
        assert abs(mean - alone[name][0].item()) < 1e-12, (name, mean, alone[name][0])
        torch.testing.assert_close(grad, alone[name][1][here], rtol=1e-9, atol=1e-14)

    for (objectives, double, rtol), (loss_1, logs_1, grads_1) in zip(cases, single):
        for chunks in (1, 2):
            model = tiny.model(objectives, double=double)
            batch = take(tiny.batch(model, double=double), rank, world)
            wrapped = DistributedDataParallel(model, broadcast_buffers=False)
            if chunks == 1:
                loss, logs = wrapped(batch)
                loss.backward()
            else:
                with wrapped.no_sync():
                    loss, logs = model.backward_in_chunks(batch, chunks, torch.Tensor.backward)
                distributed.average_gradients(list(model.parameters()))
            compare(tiny.gradients(model), grads_1, rtol, f"double={double} chunks={chunks}")
            means = distributed.average({"loss": loss} | logs)
            for name, value in {"loss": loss_1, **logs_1}.items():
                assert abs(means[name] - value.item()) <= max(rtol, 1e-6) * max(1, abs(value.item())), (name, means[name], value)
    tower = batch_norm_tower()[0]
    use_global_statistics(tower)
    tower(pictures[here]).tanh().square().mean().backward()
    distributed.average_gradients(list(tower.parameters()))
    for mine, theirs in zip([p.grad for p in tower.parameters()], [p.grad for p in tower_alone.parameters()]):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-15)
    for mine, theirs in zip(tower.buffers(), tower_alone.buffers()):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-15)
    assert distributed.any_rank_later(torch.tensor([rank == 1, False])).tolist() == [True, False]
    assert distributed.any_rank([rank == 1, False, True]) == [True, False, True]
    assert distributed.gather_lists([rank]) == list(range(world))
    assert distributed.on_main(lambda: "done") == ("done" if rank == 0 else None)
    for error in (ValueError("no"), UnsendableError("no")):
        with pytest.raises((ValueError, RuntimeError), match="no"):
            distributed.on_main(lambda error=error: raises(error))
    print(f"rank {rank} agrees", flush=True)
    dist.barrier()  # no rank closes the store that another still reads
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
