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

from mmpretrain.model import PretrainModel, running_statistics, take
from mmpretrain.types import Batch


class CostProbe:
    """One objective's turn every `every` steps (0: never), on one chunk of the batch: about two passes, so the overhead is 2 / `every`.

    Changes nothing: gradients are dropped and running statistics put back. Call it where no gradient is held.
    """

    def __init__(
        self, model: PretrainModel, every: int, chunks: int, autocast: Callable[[], AbstractContextManager], device: torch.device
    ) -> None:
        self.model, self.every, self.chunks, self.autocast, self.device = model, every, chunks, autocast, device
        self.names = list(model.objectives)
        self._memory: dict[tuple[str, ...], int] = {}

    def due(self, step: int) -> bool:
        return self.every > 0 and step % self.every == 0

    def measure(self, step: int, batch: Batch) -> dict[str, float]:
        """cost_s, the seconds of all objectives; NAME/cost_alone_s and cost_without_s; cost_alone and cost_added, the same as fractions of
        cost_s; NAME/cost_memory_mb, activations kept alone.

        Every rank calls it at the same step: objectives gather.
        """
        name = self.names[step // self.every % len(self.names)]
        part = take(batch, 0, self.chunks)
        whole = self._seconds(part, self.names)
        alone = self._seconds(part, [name])
        others = [other for other in self.names if other != name]
        without = self._seconds(part, others) if others else 0.0
        found = {"cost_alone_s": alone * self.chunks, "cost_without_s": without * self.chunks}
        found |= {"cost_alone": alone / whole, "cost_added": 1 - without / whole}
        for key, names in ((f"{name}/cost_memory_mb", [name]), ("cost_memory_mb", self.names)):
            if tuple(names) not in self._memory:  # shapes hardly change: once is enough
                self._memory[tuple(names)] = self._kept_bytes(part, names)
            found[key] = self._memory[tuple(names)] / 1e6
        return {key if "cost_memory" in key else f"{name}/{key}": value for key, value in found.items()} | {"cost_s": whole * self.chunks}

    def _seconds(self, batch: Batch, names: Iterable[str]) -> float:
        self._wait()
        started = time.perf_counter()
        self._pass(batch, names)
        self._wait()
        return time.perf_counter() - started

    def _kept_bytes(self, batch: Batch, names: Iterable[str]) -> int:
        """Bytes that autograd keeps between forward and backward, weights not counted, each storage once."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self._pass(batch, names)
        return sum(kept.values())

    def _pass(self, batch: Batch, names: Iterable[str]) -> None:
        statistics = running_statistics(self.model)
        before = [buffer.clone() for buffer in statistics]
        with self.autocast():
            loss, _ = self.model(batch, names)
        loss.backward()
        for parameter in self.model.parameters():
            parameter.grad = None
        for buffer, value in zip(statistics, before):
            buffer.copy_(value)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
