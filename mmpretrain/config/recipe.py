"""A recipe: dataclasses hold defaults, types and documentation; YAML is merged over them, `key=value` over both."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mmpretrain.config.build import OptionError, build, describe, nearest
from mmpretrain.data.source import SourceConfig
from mmpretrain.data.source_config import MAX_IMAGE_SIZE
from mmpretrain.evaluators import EVALUATORS
from mmpretrain.objectives import OBJECTIVES, ObjectiveConfig
from mmpretrain.optim import OptimConfig


@dataclass
class EpochsConfig:
    source: str  # the source whose epochs are counted
    count: float  # how many times it is seen


@dataclass
class TeacherConfig:
    momentum: float = 0.996  # of the EMA copy at the start
    final_momentum: float = 1.0  # and at the end
    schedule: Literal["cosine", "constant"] = "cosine"  # between the two


@dataclass
class CheckpointConfig:
    every: int = 1000  # steps between checkpoints; the last step is always saved
    keep: int = 3  # newest checkpoints kept


@dataclass
class Config:
    run_dir: str = "runs/demo"  # where everything of this run is written
    seed: int = 0  # of weights, order, views and masks
    steps: int | None = None  # updates to make
    epochs: EpochsConfig | None = None  # instead of steps: so many epochs of one source
    accumulate: int = 1  # chunks a step is split into; the result equals one batch
    model: str | dict = "ViT-B-32"  # an open_clip model name, a JSON file of that format, its fields, or an image tower (timm:resnet50)
    init_from: str | None = None  # a run, an open_clip checkpoint or folder whose weights to start from
    image_size: int | None = None  # pixels a side; default: the model's own
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where it is measured to be faster; kept on resume
    threads: int | None = None  # for computing; default: cores divided by local processes
    loader_threads: int | None = None  # how many read, decode and cut at once; default: 2, beside an accelerator up to 16
    loader_processes: bool | None = None  # each of them in a process of its own; default: on Linux
    prefetch: int | None = None  # batches in flight; default: 4, or as many as keep the loader busy
    compile: bool = False  # torch.compile the towers' blocks
    activation_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more compute
    deterministic: bool = False  # on CUDA: bit-identical results, at some cost in speed
    max_skipped_steps: int = 5  # consecutive updates that may be skipped for a loss or gradient that is not finite
    log_every: int = 10  # steps between lines of metrics.jsonl
    cost_every: int = 200  # steps between measurements of what one objective costs, each two to three passes; 0: never
    images_every: int = 0  # steps between pictures of views and reconstructions; 0: at the start and the end
    resume: Literal["auto", "force", "never"] = "auto"  # force: also from a run whose recipe differs; never: refuse a used run_dir
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # named shards read one way
    objectives: dict[str, Any] = field(default_factory=dict)  # name -> options of that objective
    teacher: TeacherConfig | None = None  # the EMA copy of the towers
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluators: dict[str, Any] = field(default_factory=dict)  # name -> options of that evaluator, `kind` and `every`


@dataclass
class EvaluationConfig:
    """One evaluator in a recipe."""

    kind: str  # which evaluator
    options: Any  # its own Config
    every: int = 0  # steps between evaluations; 0: at the end only
    weights: Literal["student", "teacher"] = "student"  # teacher: the EMA copy
    baselines: dict[str, float] = field(default_factory=dict)  # accuracies known from elsewhere, shown beside the result


# What may differ between a run and its continuation: it changes how fast the result comes, not the result's meaning.
FREE = {
    "run_dir", "accumulate", "threads", "loader_threads", "loader_processes", "prefetch", "compile", "activation_checkpointing",
    "deterministic", "max_skipped_steps", "log_every", "cost_every", "images_every", "resume", "checkpoint", "evaluators",
}  # fmt: skip
FREE_OF_SOURCE = {"max_bad_fraction", "max_consecutive_bad", "cache_dir", "cache_bytes", "verify"}

# Numbers that cannot be meant, refused at the start rather than met in the middle of a run. `*` stands for any name.
LIMITS: dict[str, tuple[str, float]] = {
    "steps": (">=", 0), "epochs.count": (">", 0), "accumulate": (">=", 1), "image_size": (">=", 1), "threads": (">=", 1),
    "loader_threads": (">=", 1), "prefetch": (">=", 1), "max_skipped_steps": (">=", 0), "log_every": (">=", 1), "cost_every": (">=", 0),
    "images_every": (">=", 0),
    "checkpoint.every": (">=", 1), "checkpoint.keep": (">=", 1), "objectives.*.weight": (">=", 0), "evaluators.*.every": (">=", 0),
    "optim.lr": (">=", 0), "optim.weight_decay": (">=", 0), "optim.warmup_steps": (">=", 0), "optim.final_lr": (">=", 0),
    "optim.decay_fraction": (">", 0), "optim.layer_decay": (">", 0), "optim.head_lr": (">=", 0), "optim.clip_grad_norm": (">", 0),
    "sources.*.batch_size": (">=", 1), "sources.*.shuffle_window": (">=", 1), "sources.*.max_bad_fraction": (">=", 0),
    "sources.*.max_consecutive_bad": (">=", 1), "sources.*.cache_bytes": (">=", 0), "sources.*.image.size": (">=", 1),
    "sources.*.image.background.*": (">=", 0), "sources.*.max_pixels": (">=", 1), "sources.*.min_side": (">=", 1),
    "sources.*.max_aspect": (">=", 1), "sources.*.max_member_bytes": (">=", 1),
    "objectives.*.temperature": (">", 0), "objectives.*.init_temperature": (">", 0), "objectives.*.max_logit_scale": (">=", 1),
    "objectives.*.init_scale": (">", 0), "objectives.*.mask_ratio": (">", 0), "objectives.*.mask_patch": (">=", 1),
    "objectives.*.keep": (">=", 0), "objectives.*.replace": (">=", 0), "objectives.*.view_index": (">=", 0),
    "objectives.*.hidden": (">=", 0), "objectives.*.projection": (">=", 1), "objectives.*.layers": (">=", 1),
    "optim.betas.*": (">=", 0), "optim.eps": (">", 0), "optim.momentum": (">=", 0), "teacher.momentum": (">=", 0),
    "teacher.final_momentum": (">=", 0),
}  # fmt: skip
UPPER: dict[str, tuple[str, float]] = {
    "image_size": ("<=", MAX_IMAGE_SIZE), "sources.*.image.size": ("<=", MAX_IMAGE_SIZE), "sources.*.image.background.*": ("<=", 255),
    "objectives.*.mask_ratio": ("<", 1), "objectives.*.keep": ("<=", 1), "objectives.*.replace": ("<=", 1),
    "optim.betas.*": ("<", 1), "optim.momentum": ("<", 1), "teacher.momentum": ("<=", 1), "teacher.final_momentum": ("<=", 1),
}  # fmt: skip
_SIGNS = {
    ">=": (operator.ge, "at least"), ">": (operator.gt, "more than"), "<=": (operator.le, "at most"), "<": (operator.lt, "less than"),
}  # fmt: skip


def load(recipe: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """A recipe file and `key=value` overrides -> a checked Config.

    Raises:
        OptionError: naming the option, its file and line, and the nearest known name.
    """
    data: dict[str, Any] = {}
    lines: dict[str, int] = {}
    if recipe is not None:
        data, lines = _read(Path(recipe))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key or value.strip() == "???":  # OmegaConf's word for a missing value, which it would pass over
            raise OptionError(f"expected key=value, found {override!r}")
    try:
        # In place of a list a mapping cannot be merged: an override replaces what it names.
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
    """Plain data -> Config, with each objective's and evaluator's own options checked by its own dataclass."""
    config: Config = build(Config, data, "", place)
    if not config.objectives:
        raise OptionError(f"the recipe names no objective (one set to null is left out).{nearest('', OBJECTIVES)}")
    if (config.steps is None) == (config.epochs is None):
        raise OptionError("say either steps: N or epochs: {source: NAME, count: N}")
    for name, options in config.objectives.items():
        path = f"objectives.{name}"
        options = _mapping(options, path, place)
        kind = options.get("kind") or name
        if not isinstance(kind, str) or kind not in OBJECTIVES:
            raise OptionError(f"unknown objective {kind!r}{place(path)}{nearest(str(kind), OBJECTIVES)}")
        objective: ObjectiveConfig = build(OBJECTIVES[kind].Config, options | {"kind": kind}, path, place)
        if objective.source not in config.sources:
            raise OptionError(
                f"{path}.source is {objective.source!r}{place(path)}, no source of this recipe{nearest(objective.source, config.sources)}"
            )
        config.objectives[name] = objective
    for name, options in config.evaluators.items():
        path = f"evaluators.{name}"
        options = dict(_mapping(options, path, place))
        own = {key: options.pop(key) for key in ("kind", "every", "weights", "baselines") if key in options}
        kind = own.setdefault("kind", name)
        if not isinstance(kind, str) or kind not in EVALUATORS:
            raise OptionError(f"unknown evaluator {kind!r}{place(path)}{nearest(str(kind), EVALUATORS)}")
        own["options"] = build(EVALUATORS[kind].Config, options, path, place)
        config.evaluators[name] = build(EvaluationConfig, own, path, place)
        if config.evaluators[name].weights == "teacher" and config.teacher is None:
            raise OptionError(f"{path}.weights is teacher{place(path)}, but the recipe has no teacher: add teacher: {{momentum: 0.996}}")
    for path, limit in [*LIMITS.items(), *UPPER.items()]:
        _check(config, path.split("."), "", *limit, place)
    used = {objective.source for objective in config.objectives.values()}
    if idle := set(config.sources) - used:
        raise OptionError(f"no objective uses source {', '.join(sorted(idle))}: remove it, or name it in an objective's source")
    return config


def plain(config: Config) -> dict[str, Any]:
    """The resolved recipe as plain data, which `assemble` reads back."""
    data = _plain(dataclasses.asdict(config))
    for name, evaluation in data["evaluators"].items():
        options = evaluation.pop("options")
        data["evaluators"][name] = evaluation | options
    return data


def dump(config: Config) -> str:
    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Where two resolved recipes differ in meaning, one line each."""

    def walk(a: Any, b: Any, path: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            return [line for key in sorted({*a, *b}) for line in walk(a.get(key), b.get(key), f"{path}.{key}" if path else key)]
        free = path.startswith("sources.") and path.rpartition(".")[2] in FREE_OF_SOURCE
        return [] if a == b or free else [f"{path}: {a!r} in the run, {b!r} in the recipe"]

    return [line for key in sorted({*old, *new} - FREE) for line in walk(old.get(key), new.get(key), key)]


def help_text() -> str:
    """Every field with its documentation and default."""
    sections = [("", Config, "")]
    sections += [(f"objective {kind}", cls.Config, "objectives.NAME.") for kind, cls in OBJECTIVES.items()]
    sections += [(f"evaluator {kind}", cls.Config, "evaluators.NAME.") for kind, cls in EVALUATORS.items()]
    sections += [("every evaluator", EvaluationConfig, "evaluators.NAME.")]
    out = []
    for title, cls, prefix in sections:
        out.append(f"\n{title}\n" if title else "")
        out += [
            f"  {path} = {default}\n      {text}" if default else f"  {path}\n      {text}" for path, default, text in describe(cls, prefix)
        ]
    return "\n".join(out)


def _check(value: Any, path: list[str], done: str, sign: str, limit: float, place: Callable[[str], str]) -> None:
    """Hold the number at `path` below `value` against a limit; null, and what has no such option, passes."""
    if value is None:
        return
    if path:
        mapping = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list | tuple) else vars(value)
        for name in mapping if path[0] == "*" else path[:1]:
            _check(mapping.get(name), path[1:], f"{done}.{name}" if done else name, sign, limit, place)
    elif not _SIGNS[sign][0](value, limit):
        raise OptionError(f"option {done}={value!r}{place(done)}: expected {_SIGNS[sign][1]} {limit:g}")


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
    """A YAML file -> its data, and the line of every dotted key."""
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
    """A recipe is data: `${oc.env:...}` could read this machine's secrets into a run folder."""
    if isinstance(value, str) and "${" in value:
        raise OptionError(f"option {path} contains ${{...}}: recipes are plain data, without interpolation")
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_interpolation(item, f"{path}.{key}" if path else str(key))
    if isinstance(value, list):
        for i, item in enumerate(value):
            _refuse_interpolation(item, f"{path}.{i}")
