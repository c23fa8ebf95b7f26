"""The teacher: an EMA copy of the towers, its update, and the schedule of its momentum."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmpretrain.errors import ModelError
from mmpretrain.towers.dual import DualEncoder


class Teacher(nn.Module):
    """Exponential moving average of the towers: w_t <- m w_t + (1 - m) w_s after every update.

    The momentum goes from `momentum` to `final_momentum` over training, by default along a cosine. Buffers are copied.
    The teacher is never trained: no gradients, evaluation mode. Its state dict has the student's names.

    Args:
        student: the towers; copied.
        momentum: at the start.
        final_momentum: at the end; None: constant.
        schedule: between the two.
        heads: (module, its copy) of objectives, which are updated with the same momentum (DINO, BYOL).

    Source: He et al. 2020 (MoCo), equation 2; Grill et al. 2020 (BYOL), section 3.2, for the cosine.
    """

    def __init__(
        self,
        student: DualEncoder,
        momentum: float = 0.996,
        final_momentum: float | None = 1.0,
        schedule: Literal["cosine", "constant"] = "cosine",
        heads: Sequence[tuple[nn.Module, nn.Module]] = (),
    ):
        super().__init__()
        final_momentum = momentum if final_momentum is None else final_momentum
        for name, value in (("momentum", momentum), ("final_momentum", final_momentum)):
            if not 0 <= value <= 1:
                raise ModelError(f"teacher.{name} is {value}: give the share of the old weights that stays, in 0..1")
        if schedule not in ("cosine", "constant"):
            raise ModelError(f"teacher.schedule {schedule!r}: choose cosine or constant")
        self._student = (student,)  # in a tuple: the student is not a submodule of the teacher
        self.initial, self.final, self.schedule = momentum, final_momentum, schedule
        self.module: DualEncoder = copy.deepcopy(student).requires_grad_(False)
        self._heads = tuple(heads)  # not submodules of the teacher: each objective holds its own
        self.train(False)

    def momentum(self, progress: float) -> float:
        """Return the momentum at `progress` in 0..1 of training."""
        if self.schedule == "constant":
            return self.initial
        return self.final - (self.final - self.initial) * (math.cos(math.pi * progress) + 1) / 2

    @torch.no_grad()
    def update(self, progress: float, skip: Tensor | None = None) -> float:
        """Move the weights towards the student's; return the momentum used.

        Args:
            progress: of training, in 0..1.
            skip: bool [] on the device: change nothing where it is true.
        """
        momentum = self.momentum(progress)
        pairs = [(self._student[0], self.module), *self._heads]
        mine: list[Tensor] = [p for _, copied in pairs for p in copied.parameters()]
        theirs = [p.detach() for module, _ in pairs for p in module.parameters()]
        if len(mine) != len(theirs):
            raise ModelError(f"the student has {len(theirs)} parameters, its teacher {len(mine)}: build the teacher last")
        if skip is None:
            torch._foreach_lerp_(mine, theirs, 1 - momentum)
        else:
            weight = (1 - momentum) * (~skip).to(torch.float32)
            for own, other in zip(mine, theirs):
                own.lerp_(other, weight.to(own.dtype))
        for module, copied in pairs:
            for own, other in zip(copied.buffers(), module.buffers()):
                own.copy_(other if skip is None else torch.where(skip, own, other))
        return momentum

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict:
        """Return the state of the copied towers."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load the state of the copied towers."""
        return self.module.load_state_dict(state_dict, strict, assign)
