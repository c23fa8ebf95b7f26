"""Construction of a run from its recipe: towers, objectives, teacher, frozen networks and sources."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from mmpretrain.checkpoint import MANIFEST, find_checkpoint
from mmpretrain.config.build import OptionError, blaming
from mmpretrain.config.recipe import Config, NetworkConfig
from mmpretrain.data.shards import load_classes
from mmpretrain.data.source import ImageConfig, Source
from mmpretrain.data.text import get_tokenizer
from mmpretrain.distributed import world_size
from mmpretrain.errors import ModelError
from mmpretrain.heads import is_batch_norm, use_global_statistics
from mmpretrain.model import PretrainModel, with_mask_embeddings
from mmpretrain.objectives import OBJECTIVES, Context, Objective
from mmpretrain.objectives.base import Network, source_encodes
from mmpretrain.optim import align_tops
from mmpretrain.towers.dual import DualEncoder
from mmpretrain.towers.specs import build_towers
from mmpretrain.towers.teacher import Teacher
from mmpretrain.towers.weights import load_weights


def build_model(config: Config, resumed: bool = False, steps: int | None = None) -> tuple[PretrainModel, Teacher | None]:
    """Build towers, objectives and teacher, with weights drawn from `config.seed`. Unused towers are left out.

    Args:
        config: the recipe.
        resumed: a checkpoint will be loaded, so `init_from` is not read; its file may no longer exist.
        steps: updates of the whole run, where `config.steps` is not given (epochs).

    Raises:
        OptionError: a model or objective that cannot be built.
        CheckpointError: `init_from` is a run without a valid checkpoint.
    """
    steps = config.steps if steps is None else steps
    torch.manual_seed(config.seed)
    pretrained = None if resumed else config.init_from
    if pretrained is not None and ((Path(pretrained) / "checkpoints").is_dir() or (Path(pretrained) / MANIFEST).exists()):
        pretrained = str(find_checkpoint(Path(pretrained)))
    with blaming("model"):
        try:
            towers = build_towers(config.model, image_size=config.image_size)
        except RuntimeError as error:  # raised by another library, or no memory for these sizes
            raise ValueError(f"it cannot be built: {error}") from error
    with blaming("init_from"):
        leftovers = load_weights(towers, pretrained, absent="keep") if pretrained else {}

    networks, known = {}, {}
    for name, network in config.networks.items():
        with blaming(f"networks.{name}"):
            networks[name] = frozen_network(network)
        known[name] = about(networks[name])
    objectives: dict[str, Objective] = {}
    for name, options in config.objectives.items():
        torch.manual_seed(config.seed)  # an objective's initial weights do not depend on the other objectives
        with blaming(f"objectives.{name}"):
            objectives[name] = OBJECTIVES[options.kind](options, context(config, options.source, towers, steps, known))
    for objective in objectives.values():
        for parameter in objective.exported:
            if parameter in leftovers and isinstance(getattr(objective, parameter, None), torch.nn.Parameter):
                getattr(objective, parameter).data.copy_(leftovers[parameter].reshape(1))
    with blaming("model"):
        with_mask_embeddings(towers, objectives.values(), config.seed)

    encodes = [e for objective in objectives.values() for e in source_encodes(objective.needs)]
    modalities = {e.view.modality for e in encodes if e.network in ("student", "teacher")}
    if "image" not in modalities:
        towers.visual = None
    if "text" not in modalities:
        towers.text = None
    else:
        check_vocabulary(towers)
    with blaming("model"):
        if config.activation_checkpointing:
            towers.set_grad_checkpointing(True)
        if config.compile:
            for tower in (towers.visual, towers.text):
                if tower is not None:
                    tower.compile_trunk()
    if world_size() > 1:  # statistics of one rank's rows would let the ranks differ
        use_global_statistics(towers)
    if config.accumulate > 1:
        check_accumulate(config, towers, objectives)

    teacher = None
    if config.teacher is not None:
        t = config.teacher
        with blaming("teacher", ModelError):
            heads = [pair for objective in objectives.values() for pair in copy_heads(objective)]
            teacher = Teacher(towers, t.momentum, t.final_momentum, t.schedule, heads)
    weights = {name: options.weight for name, options in config.objectives.items()}
    with blaming("objectives", ModelError):
        model = PretrainModel(
            towers,
            objectives,
            weights,
            teacher.module if teacher is not None else None,
            networks=networks,
            spans={name: (options.start, options.stop) for name, options in config.objectives.items()},
            teacher_statistics=config.teacher.batch_norm if config.teacher is not None else "running",
        )
    return model, teacher


def copy_heads(objective: Objective) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """Create the EMA copies of the submodules that an objective averages; return (module, its copy) of each."""
    copies = {name: copy.deepcopy(objective.get_submodule(name)).requires_grad_(False) for name in objective.averaged}
    objective.teacher = torch.nn.ModuleDict(copies)
    return [(objective.get_submodule(name), module) for name, module in copies.items()]


def frozen_network(config: NetworkConfig) -> DualEncoder:
    """Build a frozen network of the recipe and load its weights."""
    towers = build_towers(config.model, image_size=config.image_size)
    if config.init_from is not None:
        path = Path(config.init_from)
        run = (path / "checkpoints").is_dir() or (path / MANIFEST).exists()
        load_weights(towers, str(find_checkpoint(path)) if run else config.init_from, absent="error")
    return towers.eval().requires_grad_(False)


def about(towers: DualEncoder) -> Network:
    """Describe a network to objectives: input, patches and widths."""
    visual, text, p = towers.visual, towers.text, towers.preprocess
    return Network(
        image_size=p.size, mean=p.mean, std=p.std,
        patch_size=visual.patch_size if visual is not None else None,
        image_width=visual.width if visual is not None else 0,
        text_width=text.width if text is not None else 0,
        embed_dim=towers.embed_dim,
    )  # fmt: skip


def check_accumulate(config: Config, towers: DualEncoder, objectives: dict[str, Objective]) -> None:
    """Raise OptionError for towers and objectives whose step in chunks would differ from that of one batch."""
    if any(t is not None and not t.mergeable for t in (towers.visual, towers.text)):
        raise OptionError(
            f"accumulate is {config.accumulate}, but this tower's rows cannot be split (BatchNorm, or a foreign module's dropout): "
            "chunks would not equal one batch. Set accumulate=1"
        )
    for name, objective in objectives.items():
        if objective.per_row and any(is_batch_norm(module) for module in objective.modules()):
            raise OptionError(
                f"accumulate is {config.accumulate}, and objective {name!r} runs chunk by chunk with a BatchNorm, which would see "
                "one chunk: set accumulate=1, or give its head another norm (layer)"
            )


def check_vocabulary(towers: DualEncoder) -> None:
    """Raise OptionError for a text tower with fewer ids than its tokenizer: it would fail during a step."""
    size = getattr(getattr(towers.text, "module", towers.text), "vocab_size", None)
    wanted = get_tokenizer(towers.tokenizer).vocab_size
    if isinstance(size, int) and size < wanted:
        raise OptionError(
            f"model: text_cfg.vocab_size is {size}, but the tokenizer {towers.tokenizer!r} has {wanted} ids: give at least that"
        )


def context(
    config: Config, source: str, towers: DualEncoder, steps: int | None = None, networks: Mapping[str, Network] | None = None
) -> Context:
    """Return the facts of the run that an objective on `source` is built with."""
    image = config.sources[source].image or ImageConfig()
    visual, text, preprocess = towers.visual, towers.text, towers.preprocess
    with blaming(f"sources.{source}"):
        mean, std = image.normalisation(preprocess.mean, preprocess.std)
        classes = load_classes(config.sources[source].classes)
    return Context(
        image_size=image.size or preprocess.size,
        mean=mean,
        std=std,
        patch_size=visual.patch_size if visual is not None else None,
        image_width=visual.width if visual is not None else 0,
        text_width=text.width if text is not None else 0,
        embed_dim=towers.embed_dim,
        tokenizer=towers.tokenizer,
        context_length=towers.context_length,
        vocab_size=get_tokenizer(towers.tokenizer).vocab_size if text is not None else 0,
        trim_text=text is not None and text.trimmable,
        classes=tuple(classes or ()),
        steps=steps or 0,
        networks=networks or {},
    )


def build_sources(config: Config, model: PretrainModel) -> dict[str, Source]:
    """Open and count every source, with the views and labels that its objectives need.

    Raises:
        OptionError: options of a source that do not fit.
        ShardError: shards that cannot be read.
    """
    views = model.views()
    labelled = {config.objectives[name].source for name, objective in model.objectives.items() if objective.wants_label}
    sources = {}
    for name, options in config.sources.items():
        sources[name] = Source(name, options, views[name], name in labelled, config.seed)
    return sources


def layers(towers: DualEncoder) -> dict[str, int]:
    """Return parameter name in the model -> depth, equal for the last layers of both towers."""
    parts = [(name, tower.layer_ids()) for name, tower in (("visual", towers.visual), ("text", towers.text)) if tower is not None]
    return align_tops({f"towers.{name}.{key}": depth for key, depth in part.items()} for name, part in parts)


def check_division(config: Config, processes: int) -> None:
    """Raise OptionError unless processes x accumulate divides every `batch_size`, which is global."""
    parts = processes * config.accumulate
    for name, source in config.sources.items():
        if source.batch_size % parts:
            raise OptionError(
                f"sources.{name}.batch_size is {source.batch_size} rows per update over all processes; it must be a multiple of "
                f"{processes} processes x accumulate {config.accumulate} = {parts}"
            )


def schedule_views(sources: Mapping[str, Source], model: PretrainModel, steps: int, step: int, positions: Mapping[str, int]) -> None:
    """Limit each view of a source to the steps in which an objective that uses it is active.

    Args:
        sources: changed in place.
        model: the objectives and their spans.
        steps: updates of the whole run.
        step: the step at which this process starts; slots count from there.
        positions: source -> its slot at that step.
    """
    for name, spans in model.spans_of_views().items():
        source = sources[name]
        for view, parts in spans.items():
            if any(start <= 0 and stop >= 1 for start, stop in parts):
                continue
            slots = []
            for start, stop in parts:
                first, last = (steps if f >= 1 else math.ceil(f * steps - 1e-9) for f in (start, stop))
                slots.append(tuple(positions[name] + (s - step) * source.batch_size for s in (first, last)))
            source.schedule[view] = slots


def total_steps(config: Config, sources: dict[str, Source]) -> int:
    """Return the updates of the run: `steps`, or the number that `epochs` of its source take."""
    if config.epochs is None:
        assert config.steps is not None
        return config.steps
    if config.epochs.source not in sources:
        raise OptionError(f"epochs.source is {config.epochs.source!r}; the sources are {', '.join(sources)}")
    source = sources[config.epochs.source]
    return max(1, int(config.epochs.count * source.num_samples / config.sources[config.epochs.source].batch_size))
