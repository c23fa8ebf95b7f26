"""The pretraining model: it plans the encodes of all objectives, computes each once, and sums the objectives' losses."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmpretrain.batch import join, slice_of, surrogate, take
from mmpretrain.config.build import nearest
from mmpretrain.distributed import all_reduce_sum, world_size
from mmpretrain.errors import ModelError
from mmpretrain.functional import exact
from mmpretrain.heads import is_batch_norm
from mmpretrain.mixing import mix_pictures
from mmpretrain.objectives.base import Objective, source_encodes
from mmpretrain.towers.base import Tokens, Tower, merge
from mmpretrain.towers.dual import DualEncoder
from mmpretrain.towers.masking import draw_mask
from mmpretrain.types import OUTPUTS, Batch, Encode, Encoded, Requested, TypedModuleDict, ViewSpec


class PretrainModel(nn.Module):
    """Towers and objectives; `forward(batch)` returns the weighted sum of losses, and scalars to log.

    Objectives see only `Encoded` tensors, so an encode that several of them request is computed once, and encodes of
    the same network and token count share a pass through its blocks.
    """

    def __init__(
        self,
        towers: DualEncoder,
        objectives: dict[str, Objective],
        weights: dict[str, float],
        teacher: DualEncoder | None = None,
        *,
        networks: Mapping[str, DualEncoder] | None = None,
        spans: Mapping[str, tuple[float, float]] | None = None,
        teacher_statistics: Literal["running", "batch"] = "running",
    ):
        """Combine towers and objectives.

        Args:
            towers: the trained towers.
            objectives: by name.
            weights: objective -> factor of its loss.
            teacher: the EMA copy of `towers`.
            networks: frozen towers by name.
            spans: objective -> (start, stop), the fractions of the run between which it is trained; default: all of
                it.
            teacher_statistics: of the teacher's BatchNorms: running ones, or those of the batch.

        Raises:
            ModelError: an objective requests a missing network or output, or its `forward` takes other arguments.
        """
        super().__init__()
        self.towers = towers
        self.teacher = teacher  # updated by the trainer, never by a gradient
        self.networks: TypedModuleDict[DualEncoder] = TypedModuleDict(dict(networks or {})).requires_grad_(False)
        self.objectives: TypedModuleDict[Objective] = TypedModuleDict(objectives)
        self.weights = weights
        self.spans = {name: (spans or {}).get(name, (0.0, 1.0)) for name in objectives}
        self.teacher_statistics = teacher_statistics
        self.active = list(objectives)  # those trained in this step
        self.idle: list[nn.Parameter] = []  # trainable parameters without a gradient from an active objective
        for name, objective in objectives.items():
            self._check(name, objective)

    def _check(self, name: str, objective: Objective) -> None:
        """Raise ModelError for an objective that would fail, or silently train nothing, during a step."""
        networks = {"student": self.towers, "teacher": self.teacher, **self.networks}
        for encode in source_encodes(objective.needs):
            if encode.network not in networks:
                raise ModelError(f"objective {name!r} encodes with network {encode.network!r}{nearest(encode.network, networks)}")
            if networks[encode.network] is None:
                raise ModelError(f"objective {name!r} needs a teacher: add teacher: {{momentum: 0.996}} to the recipe")
            if unknown := encode.outputs - OUTPUTS:
                raise ModelError(f"objective {name!r}: an encode asks for {sorted(unknown)}; a tower gives {sorted(OUTPUTS)}")
        arguments = inspect.signature(objective.forward).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in arguments.values()) and set(arguments) != set(objective.needs):
            raise ModelError(f"objective {name!r}: forward takes {sorted(arguments)}, but its needs are {sorted(objective.needs)}")

    def begin_step(self, progress: float) -> None:
        """Select the objectives of this step and let them prepare; progress in [0, 1]."""
        self.active = self.active_at(progress)
        for name in self.active:
            self.objectives[name].before_step(progress)

    def active_at(self, progress: float) -> list[str]:
        """Return the objectives whose span contains `progress`."""
        return [name for name, (start, stop) in self.spans.items() if start <= progress < stop or (progress >= 1 and stop >= 1)]

    def drop_frozen(self, progress: float) -> None:
        """Drop, before clipping, the gradients of frozen parameters and of those that only idle objectives train."""
        for name in self.active:
            for parameter in self.objectives[name].frozen(progress):
                parameter.grad = None
        for parameter in self.idle:
            parameter.grad = None

    def finish_step(self, progress: float) -> None:
        """Let the active objectives act after an update that was made."""
        for name in self.active:
            self.objectives[name].after_step(progress)

    def changing_buffers(self) -> list[Tensor]:
        """Return the buffers that a forward pass may change: running statistics, and centres or queues of objectives."""
        return [*{id(b): b for b in (*running_statistics(self), *self.objectives.buffers())}.values()]

    @contextlib.contextmanager
    def preserved(self) -> Iterator[None]:
        """Restore the buffers that a forward pass changes: measuring and drawing have no effect."""
        buffers = self.changing_buffers()
        before = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, before):
                    buffer.copy_(value)

    @property
    def plan(self) -> list[Encode]:
        """This step's encodes: an objective may change its needs during training."""
        return make_plan(self.objectives[name] for name in self.active)

    def views(self) -> dict[str, set[ViewSpec]]:
        """Return source -> the views that its rows must carry at any time of the run."""
        wanted: dict[str, set[ViewSpec]] = {}
        for encode in make_plan(self.objectives.values()):
            wanted.setdefault(encode.source, set()).add(encode.view)
        return wanted

    def spans_of_views(self) -> dict[str, dict[ViewSpec, list[tuple[float, float]]]]:
        """Return source -> view -> the (start, stop) of every objective that uses it."""
        spans: dict[str, dict[ViewSpec, list[tuple[float, float]]]] = {}
        for name, objective in self.objectives.items():
            for encode in make_plan([objective]):
                spans.setdefault(encode.source, {}).setdefault(encode.view, []).append(self.spans[name])
        return spans

    def train(self, mode: bool = True) -> PretrainModel:
        """Set the mode of towers and objectives; teacher and frozen networks stay in evaluation mode."""
        super().train(mode)
        self.networks.eval()
        copies = [o.teacher for o in self.objectives.values() if isinstance(getattr(o, "teacher", None), nn.ModuleDict)]
        for module in [self.teacher, *copies]:
            if module is None:
                continue
            module.eval()  # targets without dropout, and with running statistics
            if mode and self.teacher_statistics == "batch":
                for part in module.modules():
                    if is_batch_norm(part):
                        part.train()
        return self

    def _tower(self, encode: Encode) -> Tower:
        network = {"student": self.towers, "teacher": self.teacher}.get(encode.network) or self.networks[encode.network]
        tower = network.visual if encode.view.modality == "image" else network.text
        if tower is None:
            raise ModelError(f"an objective encodes {encode.view.modality} with the {encode.network}, which this recipe does not build")
        return tower

    def hidden(self, encode: Encode, batch: Batch, done: dict[Encode, Encoded]) -> Tensor | None:
        """Draw the tokens that an encode hides, bool [B, N], from the rows' seeds (and, if attentive, another encode)."""
        if encode.mask is None:
            return None
        view, patch = batch[encode.source].views[encode.view], self._tower(encode).patch_size
        if patch is None:
            raise ModelError("this image tower has no patches to hide; masked objectives need a vision transformer")
        grid = (view.data.shape[-2] // patch, view.data.shape[-1] // patch)
        attention = done[bare(encode.mask.from_)].attention if encode.mask.from_ is not None else None
        return draw_mask(encode.mask, batch[encode.source].seeds, grid, attention)

    def encode(self, batch: Batch, encodes: Iterable[Encode], known: dict[Encode, Encoded] | None = None) -> dict[Encode, Encoded]:
        """Compute every encode once. Those that agree in network and shape share a pass through the blocks.

        Args:
            batch: rows of every source.
            encodes: to compute.
            known: results by `bare` key, which are not computed again.

        Returns:
            `bare` key -> result.
        """
        done: dict[Encode, Encoded] = dict(known or {})
        pending = [encode for encode in encodes if bare(encode) not in done]
        while pending:
            ready = [e for e in pending if e.mask is None or e.mask.from_ is None or bare(e.mask.from_) in done]
            pending = [e for e in pending if e not in ready]
            groups: dict[Any, list[tuple[Encode, Tower, Tokens]]] = {}
            for encode in ready:
                tower = self._tower(encode)
                with torch.set_grad_enabled(torch.is_grad_enabled() and encode.network == "student"):
                    tokens = self._embed(encode, tower, batch, done)
                # Where no output needs all tokens, the last block computes the pooled position alone, in a group of its own.
                whole = "tokens" in encode.outputs or not tower.one_position
                key = (encode.network, encode.view.modality, tower.merge_key(tokens), whole)
                groups.setdefault(key, []).append((encode, tower, tokens))
            for group in groups.values():
                with torch.set_grad_enabled(torch.is_grad_enabled() and group[0][0].network == "student"):
                    done.update(self._through(group, batch))
        return done

    def _embed(self, encode: Encode, tower: Tower, batch: Batch, done: dict[Encode, Encoded]) -> Tokens:
        pixels = self._pictures(encode, batch)[0]
        mode = encode.mask.mode if encode.mask is not None else "replace"
        return tower.embed(pixels, self.hidden(encode, batch, done), mode, encode.bidirectional)

    @staticmethod
    def _pictures(encode: Encode, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the tower's input, and each row's share of its own picture where pictures are mixed."""
        rows = batch[encode.source]
        data = rows.views[encode.view].data
        return (data, None) if encode.mix is None else mix_pictures(encode.mix, data, rows.seeds)

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
            weight = None if encode.mix is None else self._pictures(encode, batch)[1]
            outputs = tower.readout(part, tokens, encode.outputs, attended)
            result[bare(encode)] = outputs._replace(rows=rows, view=rows.views[encode.view], mix=weight)
        return result

    def forward(self, batch: Batch, names: Iterable[str] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the weighted sum of the losses of the named objectives (None: all active), and scalars to log."""
        names = list(self.active if names is None else names)
        encoded = self.encode(batch, make_plan(self.objectives[name] for name in names))
        losses, logs = self.losses(encoded, names)
        total = sum_losses(losses, self.weights)
        if self.idle and world_size() > 1:  # DDP waits for a gradient of every trainable parameter
            total = total + 0.0 * torch.stack([p.sum().to(total.dtype) for p in self.idle]).sum()
        return total, logs

    def losses(
        self, encoded: dict[Encode, Encoded], names: Iterable[str], totals: dict[str, Tensor] | None = None, check: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Compute each objective's share of the global loss, and its scalars.

        The mean over ranks, summed over chunks, is the loss over the global batch.

        Args:
            encoded: results of `encode`.
            names: objectives.
            totals: per-row objective -> its number of terms in the global batch; None: of these rows on all ranks.
            check: raise ModelError where an objective's outputs are not a loss and scalars.
        """
        losses, logs = {}, {}
        for name in names:
            objective = self.objectives[name]
            arguments = self.arguments(name, encoded)
            scalars = objective(**arguments)
            if check:
                check_outputs(name, scalars)
            loss = scalars.pop("loss")
            if objective.per_row:
                count = objective.count(**arguments).to(loss.device, loss.dtype)
                total = totals[name].to(loss.dtype) if totals is not None else all_reduce_sum(count)
                share = count * world_size() / total.clamp(min=1)
                loss = loss * share
                scalars = {k: v * share for k, v in scalars.items()}
            losses[name] = loss
            logs[f"{name}/loss"] = loss.detach()
            logs.update({f"{name}/{k}": v.detach() for k, v in scalars.items()})
        return losses, logs

    def arguments(self, name: str, encoded: dict[Encode, Encoded]) -> dict[str, Any]:
        """Return the arguments of an objective's `forward`; reading an output that was not requested raises ModelError."""

        def one(key: str, encode: Encode) -> Requested:
            return asked(name, key, encode.outputs)(*encoded[bare(encode)])

        needs = self.objectives[name].needs
        return {k: tuple(one(k, e) for e in v) if isinstance(v, tuple) else one(k, v) for k, v in needs.items()}

    def backward_in_chunks(self, batch: Batch, chunks: int, backward: Callable[[Tensor], None]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the gradients of the whole batch while the activations of only one chunk are held.

        Objectives over the whole batch run on cached outputs; their gradients are then sent through each chunk, which
        is encoded again. Per-row objectives run in that second pass.

        Args:
            batch: rows of every source.
            chunks: their number.
            backward: called with each part of the loss.

        Returns:
            (loss of the whole batch, scalars to log).

        Source: Gao et al. 2021 (GradCache), section 3.2.
        """
        whole = [name for name in self.active if not self.objectives[name].per_row]
        per_row = [name for name in self.active if self.objectives[name].per_row]
        plan = {bare(e): e for e in self.plan}
        # Encodes without a gradient need one pass only: their results are kept with all requested outputs.
        cached_encodes = [e if e.network == "student" else plan[bare(e)] for e in make_plan(self.objectives[name] for name in whole)]
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
            known = {e: slice_of(leaf, i, chunks, part[e.source], e) for e, leaf in leaves.items() if e.network != "student"}
            encoded = self.encode(part, plan.values(), known)
            loss = torch.zeros((), device=total.device)
            for encode, leaf in leaves.items():
                if encode.network == "student":
                    loss = loss + surrogate(encoded[encode], leaf, i, chunks)
            losses, scalars = self.losses(encoded, per_row, totals)
            if losses:
                share = sum_losses(losses, self.weights)
                total, loss = total + share.detach(), loss + share
            for name, value in scalars.items():
                logs[name] = logs[name] + value if name in logs else value
            if loss.requires_grad:
                backward(loss)
        return total, logs

    def _count(self, name: str, batch: Batch) -> Tensor:
        """Count the terms of a per-row objective in the whole local batch, from rows and views alone."""
        objective = self.objectives[name]
        blank = {bare(e): Encoded(rows=batch[e.source], view=batch[e.source].views[e.view]) for e in source_encodes(objective.needs)}
        count = objective.count(**self.arguments(name, blank))
        return count.to(next(self.parameters()).device).double()


def bare(encode: Encode) -> Encode:
    """Return an encode without its outputs: requests that are equal in this are one forward pass."""
    return replace(encode, outputs=frozenset())


def make_plan(objectives: Iterable[Objective]) -> list[Encode]:
    """Return the distinct encodes of all objectives, each with all outputs that any of them requests."""
    outputs: dict[Encode, frozenset[str]] = {}
    for objective in objectives:
        for encode in source_encodes(objective.needs):
            if encode.mask is not None and encode.mask.from_ is not None:
                source = bare(encode.mask.from_)
                outputs[source] = outputs.get(source, frozenset()) | encode.mask.from_.outputs | {"attention"}
            outputs[bare(encode)] = outputs.get(bare(encode), frozenset()) | encode.outputs
    return [replace(encode, outputs=wanted) for encode, wanted in outputs.items()]


def sum_losses(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Sum the losses by weight, in at least fp32."""
    return torch.stack([exact(loss) * weights[name] for name, loss in losses.items()]).sum()


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return the buffers that a forward pass in training mode changes: means and variances of all BatchNorms."""
    names = {"running_mean", "running_var", "num_batches_tracked"}
    return [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in names]


@functools.cache
def asked(objective: str, argument: str, outputs: frozenset[str]) -> type[Requested]:
    """Make a Requested class whose missing outputs raise ModelError when read; None would fail far from the cause."""

    class Asked(Requested):
        __slots__ = ()

        def __getattribute__(self, field: str) -> Any:
            value = super().__getattribute__(field)
            if value is None and field in OUTPUTS:
                raise ModelError(
                    f"objective {objective!r} reads {argument}.{field}, but its Encode asks for {sorted(outputs)}: "
                    f"add {field!r} to its outputs"
                )
            return value

    return Asked


def with_mask_embeddings(towers: DualEncoder, objectives: Iterable[Objective], seed: int) -> None:
    """Add a mask embedding to each tower that hides tokens, drawn from `seed` alone.

    Raises:
        ModelError: a tower cannot hide tokens.
    """
    for encode in (e for objective in objectives for e in source_encodes(objective.needs)):
        replaces = encode.mask is not None and encode.mask.mode == "replace"
        if encode.network in ("student", "teacher") and (replaces or encode.view.masks_words):
            tower = towers.visual if encode.view.modality == "image" else towers.text
            if tower is not None and tower.mask_embedding is None:
                torch.manual_seed(seed)
                tower.add_mask_embedding()


def check_outputs(name: str, outputs: dict[str, Tensor]) -> None:
    """Raise ModelError where an objective returned no loss, or scalars of another shape."""
    if "loss" not in outputs:
        raise ModelError(f"objective {name!r} returned {sorted(outputs)}, without a loss")
    if wrong := [key for key, value in outputs.items() if not isinstance(value, Tensor) or value.numel() != 1]:
        raise ModelError(f"objective {name!r}: {', '.join(wrong)} must be scalar tensors: a run logs one number each")


def freeze_unused(model: PretrainModel, batch: Batch, progresses: Iterable[float] = (0.0,)) -> tuple[list[str], dict[float, set[str]]]:
    """Freeze the parameters that never get a gradient: DDP and weight decay must not see them.

    Args:
        model: changed in place.
        batch: a few rows, with the views of all objectives that are active at any of `progresses`.
        progresses: one moment of each phase of the run; a phase has the same active objectives throughout.

    Returns:
        The names of the frozen parameters, and for each moment the names of the parameters that get a gradient there.

    Raises:
        ModelError: an objective's outputs are not a loss and scalars.
    """
    reached: dict[float, set[str]] = {}
    active = model.active
    with model.preserved():
        for progress in progresses:
            model.active = model.active_at(progress)
            if model.active:
                losses, _ = model.losses(model.encode(batch, model.plan), model.active, check=True)
                sum_losses(losses, model.weights).backward()
            reached[progress] = {name for name, p in model.named_parameters() if p.grad is not None}
            for parameter in model.parameters():
                parameter.grad = None
    model.active = active
    used = set().union(*reached.values())
    unused = [name for name, p in model.named_parameters() if p.requires_grad and name not in used]
    for name, parameter in model.named_parameters():
        if name not in used:
            parameter.requires_grad_(False)
    return unused, reached
