"""The recipe of a run: its options as dataclasses, loading from YAML and `key=value` overrides, checks, and comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmpretrain.config.build import OptionError, Range, build, nearest
from mmpretrain.config.documentation import describe
from mmpretrain.data.source import SourceConfig
from mmpretrain.data.source_config import MAX_IMAGE_SIZE
from mmpretrain.evaluators import EVALUATORS
from mmpretrain.objectives import OBJECTIVES, ObjectiveConfig
from mmpretrain.optim import OptimConfig


@dataclass
class EpochsConfig:
    """Length of a run in epochs of one source."""

    source: str  # the source whose epochs are counted
    count: Annotated[float, Range(above=0)]  # how many times it is seen


@dataclass
class TeacherConfig:
    """The EMA copy of the towers: momentum and BatchNorm statistics.

    Source: Grill et al. 2020 (BYOL), section 3.2: tau = 1 - (1 - tau_base) * (cos(pi * k / K) + 1) / 2 ("cosine").
    """

    momentum: Annotated[float, Range(0, 1)] = 0.996  # of the EMA copy at the start
    final_momentum: Annotated[float, Range(0, 1)] = 1.0  # and at the end
    schedule: Literal["cosine", "constant"] = "cosine"  # between the two
    batch_norm: Literal["running", "batch"] = "running"  # statistics of its BatchNorms; batch: those of the batch (BYOL, DINO)


@dataclass
class NetworkConfig:
    """A frozen tower or pair of towers, which objectives name in their encodes."""

    model: str | dict = "ViT-B-32"  # as the recipe's own `model`
    init_from: str | None = None  # the weights: a run, an open_clip checkpoint, folder or tag; null: those that `model` brings (hf:, timm:)
    image_size: Annotated[int | None, Range(1, MAX_IMAGE_SIZE)] = None  # pixels a side; default: the model's own


@dataclass
class CheckpointConfig:
    """How often checkpoints are saved, and how many are kept."""

    every: Annotated[int, Range(1)] = 1000  # steps between checkpoints; the last step is always saved
    keep: Annotated[int, Range(1)] = 3  # newest checkpoints kept


@dataclass
class Config:
    """A recipe: all options of a training run."""

    run_dir: str = "runs/demo"  # where everything of this run is written
    seed: int = 0  # of weights, order, views and masks
    steps: Annotated[int | None, Range(0)] = None  # updates to make
    epochs: EpochsConfig | None = None  # instead of steps: a number of epochs of one source
    accumulate: Annotated[int, Range(1)] = 1  # chunks a step is split into; the result equals one batch
    model: str | dict = "ViT-B-32"  # an open_clip model name, a JSON file of that format, its fields, or an image tower (timm:resnet50)
    init_from: str | None = None  # a run, an open_clip checkpoint or folder whose weights to start from
    image_size: Annotated[int | None, Range(1, MAX_IMAGE_SIZE)] = None  # pixels a side; default: the model's own
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where it is measured to be faster; kept on resume
    threads: Annotated[int | None, Range(1)] = None  # for computing; default: cores divided by local processes
    loader_threads: Annotated[int | None, Range(1)] = None  # that read, decode and cut; default: 2, beside an accelerator up to 16
    loader_processes: bool | None = None  # each of them in a process of its own; default: on Linux
    prefetch: Annotated[int | None, Range(1)] = None  # batches in flight; default: 4, or as many as keep the loader busy
    compile: bool = False  # torch.compile the towers' blocks
    activation_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more compute
    deterministic: bool = False  # on CUDA: bit-identical results, at some cost in speed
    max_skipped_steps: Annotated[int, Range(0)] = 5  # consecutive updates that may be skipped for a loss or gradient that is not finite
    log_every: Annotated[int, Range(1)] = 10  # steps between lines of metrics.jsonl
    cost_every: Annotated[int, Range(0)] = 200  # steps between measurements of what one objective costs, each two to three passes; 0: never
    images_every: Annotated[int, Range(0)] = 0  # steps between pictures of views and reconstructions; 0: at the start and the end
    resume: Literal["auto", "force", "never"] = "auto"  # force: also from a run whose recipe differs; never: refuse a used run_dir
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # named shards read one way
    objectives: dict[str, Any] = field(default_factory=dict)  # name -> options of that objective
    teacher: TeacherConfig | None = None  # the EMA copy of the towers
    networks: dict[str, NetworkConfig] = field(default_factory=dict)  # frozen towers by name, for distillation
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluators: dict[str, Any] = field(default_factory=dict)  # name -> options of that evaluator, `kind` and `every`


@dataclass
class EvaluationConfig:
    """One evaluator of a recipe."""

    kind: str  # which evaluator
    options: Any  # its own Config
    every: Annotated[int, Range(0)] = 0  # steps between evaluations; 0: at the end only
    weights: Literal["student", "teacher"] = "student"  # teacher: the EMA copy
    reference: dict[str, float] = field(default_factory=dict)  # accuracies known from elsewhere, shown beside the result


# Options that may differ on resume: they change the speed or the reports, not the meaning of the result.
FREE = {
    "run_dir", "accumulate", "threads", "loader_threads", "loader_processes", "prefetch", "compile", "activation_checkpointing",
    "deterministic", "max_skipped_steps", "log_every", "cost_every", "images_every", "resume", "checkpoint", "evaluators",
}  # fmt: skip
FREE_OF_SOURCE = {"max_bad_fraction", "max_consecutive_bad", "cache_dir", "cache_bytes", "verify"}


def load(recipe: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Load a recipe file with `key=value` overrides into a checked Config.

    Args:
        recipe: a YAML file; None: overrides alone.
        overrides: `key=value`, with dotted keys.

    Raises:
        OptionError: with the option, its file and line, and the nearest known name.
    """
    data: dict[str, Any] = {}
    lines: dict[str, int] = {}
    if recipe is not None:
        data, lines = _read(Path(recipe))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key or value.strip() == "???":  # OmegaConf ignores "???", its mark of a missing value
            raise OptionError(f"expected key=value, found {override!r}")
    try:
        # Lists are replaced, not merged: OmegaConf cannot merge a mapping into one.
        merged = OmegaConf.merge(OmegaConf.create(data), OmegaConf.from_dotlist(list(overrides)))
        plain = OmegaConf.to_container(merged, resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise OptionError(f"cannot merge {' '.join(overrides)} into {recipe or 'an empty recipe'}: {error}") from error
    _refuse_interpolation(plain, "")

    typed = {override.partition("=")[0] for override in overrides}

    def place(path: str) -> str:
        if path in typed:
            return ""
        while path and path not in lines:
            path = path.rpartition(".")[0]
        return f" ({recipe}, line {lines[path]})" if path in lines else ""

    return assemble(plain, place)


def assemble(data: Any, place: Callable[[str], str] = lambda path: "") -> Config:
    """Build a Config from plain data; each objective's and evaluator's options are checked by its own dataclass.

    Args:
        data: a recipe.
        place: dotted path -> " (file, line n)", for messages.

    Raises:
        OptionError: an option that is unknown or does not fit.
    """
    config: Config = build(Config, data, "", place)
    if not config.objectives:
        raise OptionError(f"the recipe names no objective (one set to null is left out).{nearest('', OBJECTIVES)}")
    if (config.steps is None) == (config.epochs is None):
        raise OptionError("give either steps: N or epochs: {source: NAME, count: N}")
    for name, options in config.objectives.items():
        path = f"objectives.{name}"
        options = _mapping(options, path, place)
        kind = options.get("kind") or name
        if kind not in OBJECTIVES:
            raise OptionError(f"unknown objective {kind!r}{place(path)}{nearest(str(kind), OBJECTIVES)}")
        objective: ObjectiveConfig = build(OBJECTIVES[kind].Config, options | {"kind": kind}, path, place)
        if objective.source not in config.sources:
            raise OptionError(
                f"{path}.source is {objective.source!r}{place(path)}, not a source here{nearest(objective.source, config.sources)}"
            )
        if objective.start >= objective.stop:
            raise OptionError(f"{path}: start {objective.start:g} is not before stop {objective.stop:g}{place(path)}")
        config.objectives[name] = objective
    for name in config.networks:
        if name in ("student", "teacher"):
            raise OptionError(f"networks.{name}{place(f'networks.{name}')}: the towers and their EMA copy have that name, choose another")
    for name, options in config.evaluators.items():
        path = f"evaluators.{name}"
        options = dict(_mapping(options, path, place))
        if isinstance(options.get("baselines"), dict):  # the earlier spelling of `reference`
            options["reference"] = options.pop("baselines") | options.get("reference", {})
        own = {key: options.pop(key) for key in ("kind", "every", "weights", "reference") if key in options}
        kind = own.setdefault("kind", name)
        if kind not in EVALUATORS:
            raise OptionError(f"unknown evaluator {kind!r}{place(path)}{nearest(str(kind), EVALUATORS)}")
        own["options"] = build(EVALUATORS[kind].Config, options, path, place)
        config.evaluators[name] = build(EvaluationConfig, own, path, place)
        if config.evaluators[name].weights == "teacher" and config.teacher is None:
            raise OptionError(f"{path}.weights is teacher{place(path)}, but the recipe has no teacher: add teacher: {{momentum: 0.996}}")
    used = {objective.source for objective in config.objectives.values()}
    if idle := set(config.sources) - used:
        raise OptionError(f"no objective uses source {', '.join(sorted(idle))}: remove it, or name it in an objective's source")
    return config


def plain(config: Config) -> dict[str, Any]:
    """Return the resolved recipe as plain data, which `assemble` accepts."""
    data = _plain(dataclasses.asdict(config))
    for name, evaluation in data["evaluators"].items():
        options = evaluation.pop("options")
        data["evaluators"][name] = evaluation | options
    return data


def dump(config: Config) -> str:
    """Return the resolved recipe as YAML."""
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return one line for each difference in meaning between two resolved recipes."""

    def walk(a: Any, b: Any, path: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            return [line for key in sorted({*a, *b}) for line in walk(a.get(key), b.get(key), f"{path}.{key}" if path else key)]
        free = path.startswith("sources.") and path.rpartition(".")[2] in FREE_OF_SOURCE
        return [] if a == b or free else [f"{path}: {a!r} in the run, {b!r} in the recipe"]

    return [line for key in sorted({*old, *new} - FREE) for line in walk(old.get(key), new.get(key), key)]


def help_text() -> str:
    """Return the text of `--help`: every option with its default and documentation."""
    sections = [("", Config, "")]
    sections += [(f"objective {kind}", cls.Config, "objectives.NAME.") for kind, cls in OBJECTIVES.known.items()]
    sections += [(f"evaluator {kind}", cls.Config, "evaluators.NAME.") for kind, cls in EVALUATORS.known.items()]
    sections += [("every evaluator", EvaluationConfig, "evaluators.NAME.")]
    out = []
    for title, cls, prefix in sections:
        out.append(f"\n{title}\n" if title else "")
        out += [
            f"  {path} = {default}\n      {text}" if default else f"  {path}\n      {text}" for path, default, text in describe(cls, prefix)
        ]
    return "\n".join(out)


def _mapping(value: Any, path: str, place: Callable[[str], str]) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise OptionError(f"{path}{place(path)} must be a mapping of options, found {value!r}")
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a YAML file; return its data, and the line of every dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None and not isinstance(node, yaml.CollectionNode):
            raise OptionError(f"{path} must hold a mapping of options, found {text.strip()[:60]!r}")
        data = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text.strip() else {}
    except (yaml.YAMLError, OmegaConfBaseException, OSError, RecursionError, TypeError) as error:
        raise OptionError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise OptionError(f"{path} must hold a mapping of options, found {type(data).__name__}")
    lines: dict[str, int] = {}

    def visit(node: Any, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = f"{prefix}.{key.value}" if prefix else str(key.value)
                lines[name] = key.start_mark.line + 1
                visit(value, name)

    visit(node, "")
    return {str(key): value for key, value in data.items()}, lines


def _refuse_interpolation(value: Any, path: str) -> None:
    """Raise OptionError for `${...}`: `${oc.env:...}` could copy secrets of this machine to a run folder."""
    if isinstance(value, str) and "${" in value:
        raise OptionError(f"option {path} contains ${{...}}: recipes are plain data, without interpolation")
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_interpolation(item, f"{path}.{key}" if path else str(key))
    if isinstance(value, list):
        for i, item in enumerate(value):
            _refuse_interpolation(item, f"{path}.{i}")
