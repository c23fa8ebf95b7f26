"""What each objective costs in this run: now and then a live batch goes through all objectives, through one alone, and through the others.

Objectives share forwards, so one's cost has two ends: what it takes alone, and what it adds to the others. The second is what leaving it
out would save.
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
    """One objective's turn every `every` steps (0: never), on one chunk of the batch: two to three passes, which is what measuring costs.

    Changes nothing: gradients are dropped and buffers put back. Call it where no gradient is held.
    """

    def __init__(
        self, model: PretrainModel, every: int, chunks: int, autocast: Callable[[], AbstractContextManager], device: torch.device
    ) -> None:
        self.model, self.every, self.chunks, self.autocast, self.device = model, every, chunks, autocast, device
        self._memory: dict[tuple[str, ...], float] = {}

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def measure(self, step: int, batch: Batch) -> dict[str, float]:
        """cost_s, the seconds of all objectives; NAME/cost_alone_s and cost_without_s; cost_alone and cost_added, the same as fractions of
        cost_s; NAME/cost_memory_mb, activations kept alone; cost_probe_s, the seconds that measuring took.

        Every rank calls it at the same step: objectives gather.
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
        """What autograd keeps between forward and backward, weights not counted, each storage once. Taken once: shapes hardly change."""
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
