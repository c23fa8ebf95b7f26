"""One step: plan -> encode each view once -> objectives -> total loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmpretrain.batch import join, surrogate, take
from mmpretrain.distributed import all_reduce_sum, world_size
from mmpretrain.functional import exact
from mmpretrain.objectives.base import Objective, source_encodes
from mmpretrain.towers.base import Tokens, Tower, merge
from mmpretrain.towers.dual import DualEncoder
from mmpretrain.towers.masking import draw_mask
from mmpretrain.types import OUTPUTS, Batch, Encode, Encoded, ViewSpec


class PretrainModel(nn.Module):
    """Towers and objectives; `forward(batch)` gives the weighted sum of losses and what to log.

    Objectives see only `Encoded` tensors, so encodes that several of them ask for are made once, and encodes of the same
    network and token count go through it together.
    """

    def __init__(
        self, towers: DualEncoder, objectives: dict[str, Objective], weights: dict[str, float], teacher: DualEncoder | None = None
    ):
        super().__init__()
        self.towers = towers
        self.teacher = teacher  # the EMA copy: moved by the trainer, never by a gradient
        self.objectives = nn.ModuleDict(objectives)
        self.weights = weights
        self.mask_owner = mask_owners(objectives)

    @property
    def plan(self) -> list[Encode]:
        """This step's encodes: an objective may change what it needs as training goes on."""
        return make_plan(self.objectives.values())

    def views(self) -> dict[str, set[ViewSpec]]:
        """Source -> the views its rows must carry."""
        wanted: dict[str, set[ViewSpec]] = {}
        for encode in self.plan:
            wanted.setdefault(encode.source, set()).add(encode.view)
        return wanted

    def train(self, mode: bool = True) -> PretrainModel:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()  # no dropout, and running statistics, in its targets
        return self

    # -- encoding ---------------------------------------------------------------------------------------------------

    def _tower(self, encode: Encode) -> Tower:
        network = self.teacher if encode.network == "teacher" else self.towers
        tower = None if network is None else network.visual if encode.view.modality == "image" else network.text
        if tower is None:
            raise ValueError(f"an objective encodes {encode.view.modality} with the {encode.network}, which this recipe does not build")
        return tower

    def hidden(self, encode: Encode, batch: Batch, done: dict[Encode, Encoded]) -> Tensor | None:
        """bool [B,N], the tokens this encode hides; from the rows' seeds alone (and, if attentive, from another encode)."""
        if encode.mask is None:
            return None
        view, patch = batch[encode.source].views[encode.view], self._tower(encode).patch_size
        if patch is None:
            raise ValueError("this image tower has no patches to hide; masked objectives need a vision transformer")
        grid = (view.data.shape[-2] // patch, view.data.shape[-1] // patch)
        attention = done[bare(encode.mask.from_)].attention if encode.mask.from_ is not None else None
        return draw_mask(encode.mask, batch[encode.source].seeds, grid, attention)

    def encode(self, batch: Batch, encodes: Iterable[Encode]) -> dict[Encode, Encoded]:
        """Every encode once, under its `bare` key; those that agree in network and shape share one pass through the blocks."""
        done: dict[Encode, Encoded] = {}
        pending = list(encodes)
        while pending:
            ready = [e for e in pending if e.mask is None or e.mask.from_ is None or bare(e.mask.from_) in done]
            pending = [e for e in pending if e not in ready]
            groups: dict[Any, list[tuple[Encode, Tower, Tokens]]] = {}
            for encode in ready:
                tower = self._tower(encode)
                with torch.set_grad_enabled(torch.is_grad_enabled() and encode.network == "student"):
                    tokens = self._embed(encode, tower, batch, done)
                # Where nobody reads the tokens, the last block computes the pooled position alone: worth a group of its own.
                whole = "tokens" in encode.outputs or not tower.one_position
                key = (encode.network, encode.view.modality, tower.merge_key(tokens), whole)
                groups.setdefault(key, []).append((encode, tower, tokens))
            for group in groups.values():
                with torch.set_grad_enabled(torch.is_grad_enabled() and group[0][0].network == "student"):
                    done.update(self._through(group, batch))
        return done

    def _embed(self, encode: Encode, tower: Tower, batch: Batch, done: dict[Encode, Encoded]) -> Tokens:
        view = batch[encode.source].views[encode.view]
        owner = self.mask_owner.get(bare(encode))
        fill = self.objectives[owner].mask_token if owner is not None else None
        mode = encode.mask.mode if encode.mask is not None else "replace"
        return tower.embed(view.data, self.hidden(encode, batch, done), mode, fill, encode.bidirectional)

    def _through(self, group: list[tuple[Encode, Tower, Tokens]], batch: Batch) -> dict[Encode, Encoded]:
        tower = group[0][1]
        want_attention = any("attention" in encode.outputs for encode, _, _ in group)
        pooled_only = not any("tokens" in encode.outputs for encode, _, _ in group)
        x, attention = tower.trunk(merge([tokens for _, _, tokens in group]), want_attention, pooled_only)
        sizes = [len(tokens.x) for _, _, tokens in group]
        parts = x.split(sizes)
        attentions = attention.split(sizes) if attention is not None else [None] * len(sizes)
        result = {}
        for (encode, _, tokens), part, attended in zip(group, parts, attentions):
            rows = batch[encode.source]
            result[bare(encode)] = tower.readout(part, tokens, encode.outputs, attended)._replace(rows=rows, view=rows.views[encode.view])
        return result

    # -- objectives -------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, names: Iterable[str] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses of all objectives, or of those named, and what to log."""
        names = list(self.objectives if names is None else names)
        encoded = self.encode(batch, make_plan(self.objectives[name] for name in names))
        losses, logs = self.losses(encoded, names)
        return sum_losses(losses, self.weights), logs

    def losses(
        self, encoded: dict[Encode, Encoded], names: Iterable[str], totals: dict[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Each objective's share of the global loss, and its scalars; the mean over ranks (and sum over chunks) is the whole."""
        losses, logs = {}, {}
        for name in names:
            objective = self.objectives[name]
            arguments = self.arguments(objective, encoded)
            found = objective(**arguments)
            loss = found.pop("loss")
            if objective.per_row:
                count = objective.count(**arguments).to(loss.device, loss.dtype)
                total = totals[name].to(loss.dtype) if totals is not None else all_reduce_sum(count)
                share = count * world_size() / total.clamp(min=1)
                loss = loss * share
                found = {k: v * share for k, v in found.items()}
            losses[name] = loss
            logs[f"{name}/loss"] = loss.detach()
            logs.update({f"{name}/{k}": v.detach() for k, v in found.items()})
        return losses, logs

    @staticmethod
    def arguments(objective: Objective, encoded: dict[Encode, Encoded]) -> dict[str, Any]:
        return {k: tuple(encoded[bare(e)] for e in v) if isinstance(v, tuple) else encoded[bare(v)] for k, v in objective.needs.items()}

    # -- exact large batches ----------------------------------------------------------------------------------------

    def backward_in_chunks(self, batch: Batch, chunks: int, backward: Callable[[Tensor], None]) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of the whole batch while only one chunk's activations live. Gao et al. 2021 (GradCache), section 3.2.

        The whole-batch objectives run on cached outputs; their gradients are then sent through each chunk, encoded again.
        Per-row objectives run in that second pass.
        """
        whole = [name for name, o in self.objectives.items() if not o.per_row]
        per_row = [name for name, o in self.objectives.items() if o.per_row]
        cached_encodes = make_plan(self.objectives[name] for name in whole)
        parts = [take(batch, i, chunks) for i in range(chunks)]

        logs: dict[str, Tensor] = {}
        total = torch.zeros((), device=next(self.parameters()).device)
        leaves: dict[Encode, Encoded] = {}
        if whole:
            with torch.no_grad():
                pieces = [self.encode(part, cached_encodes) for part in parts]
            leaves = {bare(e): join([p[bare(e)] for p in pieces], batch[e.source], e) for e in cached_encodes}
            del pieces
            losses, logs = self.losses(leaves, whole)
            loss = sum_losses(losses, self.weights)
            total = total + loss.detach()
            backward(loss)

        totals = {name: all_reduce_sum(self._count(name, batch)) for name in per_row}
        for i, part in enumerate(parts):
            encoded = self.encode(part, self.plan)
            loss = torch.zeros((), device=total.device)
            for encode, leaf in leaves.items():
                if encode.network == "student":
                    loss = loss + surrogate(encoded[encode], leaf, i, chunks)
            losses, found = self.losses(encoded, per_row, totals)
            if losses:
                share = sum_losses(losses, self.weights)
                total, loss = total + share.detach(), loss + share
            for name, value in found.items():
                logs[name] = logs[name] + value if name in logs else value
            if loss.requires_grad:
                backward(loss)
        return total, logs

    def _count(self, name: str, batch: Batch) -> Tensor:
        """A per-row objective's number of terms in the whole local batch, read from rows and views alone."""
        objective = self.objectives[name]
        blank = {bare(e): Encoded(rows=batch[e.source], view=batch[e.source].views[e.view]) for e in source_encodes(objective.needs)}
        count = objective.count(**self.arguments(objective, blank))
        return count.to(next(self.parameters()).device).double()


def bare(encode: Encode) -> Encode:
    """The encode but for what is read from it: requests equal in this are one forward."""
    return replace(encode, outputs=frozenset())


def make_plan(objectives: Iterable[Objective]) -> list[Encode]:
    """The distinct encodes of all objectives, each with all the outputs that somebody asks of it."""
    outputs: dict[Encode, frozenset[str]] = {}
    for objective in objectives:
        for encode in source_encodes(objective.needs):
            unknown = encode.outputs - OUTPUTS
            if unknown:
                raise ValueError(f"an encode asks for {sorted(unknown)}; a tower gives {sorted(OUTPUTS)}")
            if encode.mask is not None and encode.mask.from_ is not None:
                source = bare(encode.mask.from_)
                outputs[source] = outputs.get(source, frozenset()) | encode.mask.from_.outputs | {"attention"}
            outputs[bare(encode)] = outputs.get(bare(encode), frozenset()) | encode.outputs
    return [replace(encode, outputs=wanted) for encode, wanted in outputs.items()]


def mask_owners(objectives: dict[str, Objective]) -> dict[Encode, str]:
    """Encode -> the objective whose mask embedding it uses; an encode shared by two uses the first one's."""
    owners: dict[Encode, str] = {}
    for name, objective in objectives.items():
        if objective.mask_token is not None:
            for encode in source_encodes(objective.needs):
                owners.setdefault(bare(encode), name)
    return owners


def sum_losses(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    return torch.stack([exact(loss) * weights[name] for name, loss in losses.items()]).sum()


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The buffers that a forward pass in training changes: means and variances of every kind of BatchNorm."""
    names = {"running_mean", "running_var", "num_batches_tracked"}
    return [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in names]


def freeze_unused(model: PretrainModel, batch: Batch) -> list[str]:
    """Freeze, and name, parameters that no objective sends a gradient to: DDP and weight decay must not see them."""
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    loss, _ = model(batch)
    loss.backward()
    unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
        parameter.grad = None
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return unused
