"""What a checkpoint of a run holds, and how it is put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpretrain import checkpoint, distributed
from mmpretrain.checkpoint import CheckpointError
from mmpretrain.config.recipe import Config
from mmpretrain.model import PretrainModel
from mmpretrain.towers.teacher import Teacher


def save(config: Config, model: PretrainModel, teacher: Teacher | None, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """One checkpoint, independent of the number of processes; the main one writes it. Raises CheckpointError on every process."""

    def write() -> Path:
        towers = model.towers
        weights = towers.state_dict()
        for objective in model.objectives.values():
            for name in ("logit_scale", "logit_bias"):
                if isinstance(parameter := getattr(objective, name, None), nn.Parameter):
                    weights.setdefault(name, parameter.detach().reshape(()))
        tensors = {"model": weights, "objectives": model.objectives.state_dict()}
        if teacher is not None:
            tensors["teacher"] = teacher.module.state_dict()
        p = towers.preprocess
        preprocess = {"mean": p.mean, "std": p.std, "interpolation": p.interpolation, "resize_mode": p.resize_mode}
        documents = {"state": state, "open_clip_config": {"model_cfg": towers.model_cfg, "preprocess_cfg": preprocess}}
        root = Path(config.run_dir) / "checkpoints"
        return checkpoint.save(root, state["step"], tensors, checkpoint.optimizer_by_name(optimizer), documents, config.checkpoint.keep)

    distributed.on_main(write)


def restore(folder: Path, model: PretrainModel, teacher: Teacher | None, optimizer: torch.optim.Optimizer, force: bool) -> list[str]:
    """Put a verified checkpoint back. Where `force` (resume=force) allows another recipe, what it lacks starts fresh: a line for each part.

    Raises:
        CheckpointError: the checkpoint does not fit this model, and `force` is not given.
    """
    weights = checkpoint.load_tensors(folder, "model")
    lines = _load(model.towers, {k: v for k, v in weights.items() if k not in ("logit_scale", "logit_bias")}, "towers")
    lines += _load(model.objectives, checkpoint.load_tensors(folder, "objectives"), "objectives")
    if teacher is not None and (folder / "teacher.safetensors").exists():
        lines += _load(teacher.module, checkpoint.load_tensors(folder, "teacher"), "teacher")
    elif teacher is not None:
        teacher.module.load_state_dict(model.towers.state_dict())
        lines.append("the checkpoint has no teacher: it starts as a copy of the towers")
    if lines and not force:
        raise CheckpointError(
            f"{folder} does not fit this recipe:\n  " + "\n  ".join(lines) + "\nresume=force goes on so; or choose another run_dir"
        )
    left_out = checkpoint.restore_optimizer(optimizer, checkpoint.load_optimizer(folder), strict=not force)
    if left_out:
        lines.append(f"optimizer state of {len(left_out)} parameters is left out: {', '.join(left_out[:3])} ...")
    return lines


def _load(module: nn.Module, state: dict[str, Tensor], what: str) -> list[str]:
    """Load what fits; a line about what the module has that `state` lacks, and one about what it has too much."""
    own = module.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    module.load_state_dict(fitting, strict=False)
    fresh, unused = [k for k in own if k not in fitting], [k for k in state if k not in own]
    lines = []
    if fresh:
        lines.append(f"{what}: the checkpoint lacks {_some(fresh)}: fresh weights")
    if unused:
        lines.append(f"{what}: the checkpoint's {_some(unused)} are not used")
    return lines


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
