"""Construction of a run from its recipe: towers, objectives, teacher, frozen networks and sources."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from mmpretrain.checkpoint import resolve_weights
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
from mmpretrain.towers.specs import build_towers, with_recorded
from mmpretrain.towers.teacher import Teacher
from mmpretrain.towers.vision import VisionTransformer
from mmpretrain.towers.weights import load_weights, recorded_preprocess
from mmpretrain.types import Preprocess

log = logging.getLogger(__name__)


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
    pretrained = None if resumed or config.init_from is None else resolve_weights(config.init_from)
    with blaming("model"):
        try:
            towers = build_towers(config.model, image_size=config.image_size)
        except RuntimeError as error:  # raised by another library, or no memory for these sizes
            raise ValueError(f"it cannot be built: {error}") from error
    towers.preprocess = preprocessing(config, towers.preprocess)
    with blaming("init_from"):
        leftovers = load_weights(towers, pretrained, absent="keep") if pretrained else {}
    if pretrained:
        warn_of_other_preprocessing(pretrained, towers.preprocess)

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
    check_image_tower(towers)
    if "text" not in modalities:
        towers.text = None
    else:
        with blaming("model"):
            check_vocabulary(towers)
            check_end(towers)
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


def preprocessing(config: Config, own: Preprocess) -> Preprocess:
    """The one preprocessing of the model: what the sources state, and its own where none states anything.

    A checkpoint, its export and evaluators have one mean, one std and one size, which therefore must be those of every source.

    Args:
        own: the model's.

    Raises:
        OptionError: two sources state different values.
    """
    stated: dict[str, dict[str, Any]] = {"mean": {}, "std": {}, "size": {}, "background": {}}  # field -> source -> value
    for name, source in config.sources.items():
        image = source.image or ImageConfig()
        with blaming(f"sources.{name}"):
            mean, std = image.normalisation(own.mean, own.std)
        given = {"mean": (image.mean, mean), "std": (image.std, std), "size": (image.size, image.size)}
        for field, (option, value) in given.items():
            if option is not None:
                stated[field][name] = value
        if source.image is not None:
            stated["background"][name] = image.behind()
    for field, values in stated.items():
        (first, value), *others = [*values.items()] or [("", None)]
        for other, another in others:
            if another != value:
                raise OptionError(
                    f"sources.{first}.image.{field} is {_listed(value)} and sources.{other}.image.{field} is {_listed(another)}: a model "
                    "has one preprocessing, which its checkpoints, exports and evaluators use. Give both the same"
                )
    return replace(own, **{field: next(iter(values.values())) for field, values in stated.items() if values})


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def warn_of_other_preprocessing(pretrained: str, preprocess: Preprocess) -> None:
    """Log where the weights to start from were trained with another normalisation than this run uses."""
    recorded = recorded_preprocess(pretrained)
    for name in ("mean", "std"):
        value, other = getattr(preprocess, name), recorded.get(name)
        if other is not None and tuple(other) != tuple(value):
            log.warning(
                "init_from %s was trained with image.%s %s, and this run uses %s: set sources.NAME.image.%s to go on with its own",
                pretrained, name, list(other), list(value), name,
            )  # fmt: skip


def copy_heads(objective: Objective) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
    """Create the EMA copies of the submodules that an objective averages; return (module, its copy) of each."""
    copies = {name: copy.deepcopy(objective.get_submodule(name)).requires_grad_(False) for name in objective.averaged}
    objective.teacher = torch.nn.ModuleDict(copies)
    return [(objective.get_submodule(name), module) for name, module in copies.items()]


def frozen_network(config: NetworkConfig) -> DualEncoder:
    """Build a frozen network of the recipe and load its weights."""
    towers = build_towers(config.model, image_size=config.image_size)
    if config.init_from is not None:
        weights = resolve_weights(config.init_from)
        load_weights(towers, weights, absent="error")
        size = {} if config.image_size is None else {"size": config.image_size}
        towers.preprocess = with_recorded(towers.preprocess, recorded_preprocess(weights) | size)
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
    text: Any = getattr(towers.text, "module", getattr(towers.text, "model", towers.text))
    size = getattr(text, "vocab_size", None) or getattr(getattr(text, "config", None), "vocab_size", None)
    wanted = get_tokenizer(towers.tokenizer).vocab_size
    if isinstance(size, int) and size < wanted:
        raise OptionError(
            f"model: text_cfg.vocab_size is {size}, but the tokenizer {towers.tokenizer!r} has {wanted} ids: give at least that"
        )


@torch.no_grad()
def check_image_tower(towers: DualEncoder) -> None:
    """Another library's image tower may not take images of this size, or give what no adapter reads: found in the first step otherwise.

    Raises:
        OptionError: two images of the run's size do not go through.
    """
    tower, size = towers.visual, towers.preprocess.size
    if tower is None or isinstance(tower, VisionTransformer):
        return
    training, device = tower.training, next(tower.parameters()).device
    try:
        tower.eval()
        encoded = tower(torch.zeros(2, 3, size, size, device=device), outputs=frozenset({"features", "pooled"}))
        problem = ""
        for name, width in (("features", tower.embed_dim), ("pooled", tower.width)):
            shape = tuple(getattr(encoded, name).shape)
            if shape != (2, width):
                problem = f"it gives {name} of shape {list(shape)} for two images, expected {[2, width]}"
    except Exception as error:  # of whatever kind the other library raises
        problem = f"{type(error).__name__}: {next(iter(str(error).splitlines()), 'no message')}"
    finally:
        tower.train(training)
    if problem:
        raise OptionError(
            f"model: its image tower cannot be trained on images of {size} pixels ({problem[:300]}): leave out image_size and image.size, "
            "or choose another model"
        )


@torch.no_grad()
def check_end(towers: DualEncoder) -> None:
    """A text tower that pools where its tokenizer puts no end does not see all words of a caption, or none: it would train to the end.

    Raises:
        OptionError: the last word of a caption does not change its features.
    """
    text, tokenizer = towers.text, get_tokenizer(towers.tokenizer)
    assert text is not None
    # Rare words have high ids, and the last ones here are frequent: an end looked for by its id is found before them, if at all.
    captions = [f"{words} {last}" for words in ("zebra", "the walrus, a xylophone") for last in ("a", "the")]
    ids = tokenizer.encode(captions, towers.context_length)
    training, device = text.training, next(text.parameters()).device
    text.eval()
    features = text(ids.to(device)).features
    text.train(training)
    for first, second in ((0, 1), (2, 3)):
        if torch.equal(ids[first], ids[second]):  # cut before the last word, or one that the vocabulary lacks
            continue
        scale = features[[first, second]].abs().max()
        if (features[first] - features[second]).abs().max() <= 1e-7 * scale:
            cfg = towers.model_cfg.get("text_cfg", {})
            raise OptionError(
                "model: captions that differ in their last word get equal features: the text tower "
                f"(pool_type {cfg.get('pool_type', 'argmax')!r}, eos_id {cfg.get('eos_id', 2)}) does not pool where the tokenizer "
                f"{towers.tokenizer!r} ends a caption (id {tokenizer.eot}). "
                "Give text_cfg pool_type eos with that eos_id, or last with no_causal_mask, or the tokenizer that the tower was made for"
            )


def context(
    config: Config, source: str, towers: DualEncoder, steps: int | None = None, networks: Mapping[str, Network] | None = None
) -> Context:
    """Return the facts of the run that an objective on `source` is built with."""
    visual, text, preprocess = towers.visual, towers.text, towers.preprocess
    with blaming(f"sources.{source}"):
        classes = load_classes(config.sources[source].classes)
    return Context(
        image_size=preprocess.size,
        mean=preprocess.mean,
        std=preprocess.std,
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
