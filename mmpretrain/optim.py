"""Optimizers: parameter groups, layer-wise learning-rate decay, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn

from mmpretrain.config.build import Range


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"  # optimizer
    lr: Annotated[float, Range(0)] = 5.0e-4  # peak learning rate
    weight_decay: Annotated[float, Range(0)] = 0.2  # on matrices only: norms, biases, embeddings of position and class, scales have none
    betas: Annotated[tuple[float, float], Range(0, below=1)] = (0.9, 0.98)  # adam's moving averages
    eps: Annotated[float, Range(above=0)] = 1.0e-6  # adam's denominator
    momentum: Annotated[float, Range(0, below=1)] = 0.9  # of sgd
    warmup_steps: Annotated[int, Range(0)] = 0  # linear warm-up from zero
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"  # after warm-up; wsd: stable, then a linear decay to final_lr
    decay_fraction: Annotated[float, Range(above=0)] = 0.2  # wsd: the last part of the run that decays
    final_lr: Annotated[float, Range(0)] = 0.0  # learning rate at the end, as a fraction of lr
    layer_decay: Annotated[float, Range(above=0)] = 1.0  # lr of layer i is lr * layer_decay ** (layers above it)
    head_lr: Annotated[float, Range(0)] = 1.0  # factor on the learning rate of the objectives' own heads
    clip_grad_norm: Annotated[float | None, Range(above=0)] = 1.0  # gradient norm above which gradients are scaled down


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the factor on the peak learning rate for update `step` (0-based) of `steps`.

    Source: Hu et al. 2024 (MiniCPM) for wsd.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    if config.schedule == "cosine":
        return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    left = (1 - progress) / max(config.decay_fraction, 1e-9)
    return config.final_lr + (1 - config.final_lr) * min(1.0, left)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a parameter has weight decay: matrices without the embeddings of class and position."""
    last = name.rsplit(".", 1)[-1]
    return parameter.ndim >= 2 and last not in {"positional_embedding", "class_embedding", "pos_embed", "cls_token", "mask_token"}


def align_tops(towers: Iterable[dict[str, int]]) -> dict[str, int]:
    """Shift the depths of each tower so that the last layers of all towers are equally deep: each is nearest the loss."""
    parts = [part for part in towers if part]
    top = max((max(part.values()) for part in parts), default=0)
    return {name: depth + top - max(part.values()) for part in parts for name, depth in part.items()}


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    layers: dict[str, int],
    undecayed: Collection[str] = (),
) -> list[dict]:
    """Group parameters of equal decay and learning rate.

    Args:
        parameters: trainable (name, parameter).
        config: rates and decay.
        layers: name -> depth, the largest nearest the loss; absent names are heads and count as nearest. See
            `align_tops`.
        undecayed: names without weight decay beside those that `decays` refuses: those of the towers' `no_weight_decay`.
    """
    top = max(layers.values(), default=0)
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in parameters:
        decay = config.weight_decay if decays(name, parameter) and name not in undecayed else 0.0
        scale = config.layer_decay ** (top - layers.get(name, top))
        if name not in layers:
            scale *= config.head_lr
        fresh = {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale, "lr": config.lr * scale}
        group = groups.setdefault((decay, scale), fresh)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(groups: list[dict], config: OptimConfig) -> torch.optim.Optimizer:
    """Build the optimizer of `config` over parameter groups."""
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, steps: int) -> float:
    """Set every group's rate for this update; return the peak group's rate."""
    lr = config.lr * learning_rate(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr
