"""Blocks: rows of a source on their way to a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmpretrain.data import buffers
from mmpretrain.types import Params, Rows, View, ViewSpec


class Block(NamedTuple):
    """Some rows of a source before rendering."""

    keys: list[str]
    seeds: Tensor  # int64 [n]
    labels: dict[str, Tensor]
    pixels: dict[ViewSpec, Tensor]  # results of `geometry`, stacked
    params: dict[ViewSpec, Params]
    skipped: list[dict[str, Any]]  # {source, shard, key, reason, detail, slot, replaced_by}
    views: dict[ViewSpec, View]  # those already rendered
    transparent: int = 0  # rows whose image had transparent pixels

    def render(self, modality: str | None = None) -> Block:
        """Render the views of one modality, or all remaining ones."""
        for spec in list(self.pixels):
            if modality is None or spec.modality == modality:
                self.views[spec] = spec.render(self.pixels.pop(spec), self.params.pop(spec))
        return self

    def to_rows(self) -> Rows:
        """Return the rows, rendered."""
        self.render()
        return Rows(self.keys, self.seeds, self.labels, self.views)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Block:
        """Apply `move` to every tensor: pin it, or send it to a device."""
        return Block(
            self.keys,
            move(self.seeds),
            {name: move(label) for name, label in self.labels.items()},
            {spec: move(pixels) for spec, pixels in self.pixels.items()},
            {spec: {name: move(value) for name, value in drawn.items()} for spec, drawn in self.params.items()},
            self.skipped,
            {spec: View(move(view.data), None if view.target is None else move(view.target)) for spec, view in self.views.items()},
            self.transparent,
        )


def join(blocks: list[Block]) -> Block:
    """Concatenate blocks of consecutive slots; views that are not rendered yet are rendered for all rows later."""
    first = blocks[0]
    if len(blocks) == 1:
        return first
    views: dict[ViewSpec, View] = {}
    for spec in first.views:
        parts = [b.views[spec] for b in blocks]
        targets = [p.target for p in parts if p.target is not None]  # a spec has targets for all rows or for none
        target = torch.cat(targets) if len(targets) == len(parts) else None
        views[spec] = View(buffers.cat([p.data for p in parts]), target)
    return Block(
        keys=[key for b in blocks for key in b.keys],
        seeds=torch.cat([b.seeds for b in blocks]),
        labels={name: torch.cat([b.labels[name] for b in blocks]) for name in first.labels},
        pixels={spec: buffers.cat([b.pixels[spec] for b in blocks]) for spec in first.pixels},
        params={spec: {name: torch.cat([b.params[spec][name] for b in blocks]) for name in drawn} for spec, drawn in first.params.items()},
        skipped=[record for b in blocks for record in b.skipped],
        views=views,
        transparent=sum(b.transparent for b in blocks),
    )
