"""Measurement of each objective's cost during training: a batch is passed through all objectives, one alone, and the others.

Objectives share forward passes, so the cost of one has two values: its cost alone, and the cost that it adds to the
others, which leaving it out would save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from mmpretrain.batch import take
from mmpretrain.model import PretrainModel
from mmpretrain.types import Batch


class CostProbe:
    """Measures one objective in turn every `every` steps (0: never), on one chunk of the batch, in two to three passes.

    It changes nothing: gradients are dropped and buffers restored. Call it while no gradient is held.
    """

    def __init__(
        self, model: PretrainModel, every: int, chunks: int, autocast: Callable[[], AbstractContextManager], device: torch.device
    ) -> None:
        self.model, self.every, self.chunks, self.autocast, self.device = model, every, chunks, autocast, device
        self._memory: dict[tuple[str, ...], float] = {}

    def due(self, step: int) -> bool:
        """Return whether to measure at `step`."""
        return self.every > 0 and step % self.every == 0

    def measure(self, step: int, batch: Batch) -> dict[str, float]:
        """Measure the objective whose turn it is at `step`. Every rank calls it at the same step: objectives gather.

        Returns:
            cost_s: seconds of all objectives; NAME/cost_alone_s and NAME/cost_without_s: seconds of one alone, and of
                the others;
            NAME/cost_alone and NAME/cost_added: the same as fractions of cost_s; cost_memory_mb and
            NAME/cost_memory_mb: activations kept by all, and by one alone; cost_probe_s: seconds of measuring.
        """
        started = time.perf_counter()
        names = self.model.active  # of this step: its batch has their views
        name = names[step // self.every % len(names)]
        part = take(batch, 0, self.chunks)
        others = [other for other in names if other != name]
        whole, alone = self._seconds(part, names), self._seconds(part, [name])
        without = self._seconds(part, others) if others else 0.0
        return {
            "cost_s": whole * self.chunks,
            f"{name}/cost_alone_s": alone * self.chunks,
            f"{name}/cost_without_s": without * self.chunks,
            f"{name}/cost_alone": alone / whole,
            f"{name}/cost_added": 1 - without / whole,
            "cost_memory_mb": self._kept_mb(part, names),
            f"{name}/cost_memory_mb": self._kept_mb(part, [name]),
            "cost_probe_s": time.perf_counter() - started,
        }

    def _seconds(self, batch: Batch, names: Iterable[str]) -> float:
        self._wait()
        started = time.perf_counter()
        self._pass(batch, names)
        self._wait()
        return time.perf_counter() - started

    def _kept_mb(self, batch: Batch, names: list[str]) -> float:
        """Measure what autograd keeps between forward and backward, without weights, each storage once.

        The result is cached, since shapes rarely change.
        """
        if (known := self._memory.get(tuple(names))) is not None:
            return known
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self._pass(batch, names)
        return self._memory.setdefault(tuple(names), sum(kept.values()) / 1e6)

    def _pass(self, batch: Batch, names: Iterable[str]) -> None:
        with self.model.preserved():
            with self.autocast():
                loss, _ = self.model(batch, names)
            loss.backward()
        for parameter in self.model.parameters():
            parameter.grad = None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
