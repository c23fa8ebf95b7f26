"""Checkpoints: atomic saving, verified loading, and restoring a run.

A checkpoint is written under a temporary name, flushed, completed by a manifest of sha256 sums, renamed and read back;
only then are older ones removed. A kill at any moment leaves at least one valid checkpoint, if there was one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmpretrain import distributed
from mmpretrain.atomic import flush
from mmpretrain.errors import MMPretrainError
from mmpretrain.model import PretrainModel
from mmpretrain.objectives.base import source_encodes
from mmpretrain.towers.dual import DualEncoder
from mmpretrain.towers.positions import resize_positions
from mmpretrain.towers.teacher import Teacher
from mmpretrain.towers.weights import load_pickled, savable

MANIFEST = "manifest.json"
REQUIRED = ("model.safetensors", "optimizer.pt", "state.json")
STATE = {"step": int, "positions": dict, "skipped_steps": int}  # what a resumed run needs


class CheckpointError(MMPretrainError, RuntimeError):
    """A checkpoint cannot be written, or is damaged or unsuitable."""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def problem(folder: Path) -> str | None:
    """Return why `folder` is not a valid checkpoint; None if it is. Reads every byte."""
    try:
        files = dict(json.loads((folder / MANIFEST).read_text())["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})"
    unlisted = [name for name in REQUIRED if name not in files]
    if unlisted:
        return f"its {MANIFEST} does not list {', '.join(unlisted)}"
    for name, expected in files.items():
        path = folder / Path(name).name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != expected:
            return f"{name} does not match its sha256: it changed after it was written"
    try:
        state = load_json(folder, "state")
    except CheckpointError as error:
        return str(error)
    wrong = [name for name, kind in STATE.items() if not isinstance(state.get(name), kind)]
    return f"state.json lacks {', '.join(wrong)}" if wrong else None


def save(
    root: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    optimizer: dict[str, Any],
    documents: dict[str, Any],
    keep: int,
    write_files: Callable[[Path], None] | None = None,
) -> Path:
    """Write the checkpoint `root/step-N`; one process calls it. A failure leaves only the older checkpoints.

    Args:
        root: folder of the checkpoints.
        step: its number.
        tensors: file stem -> state dict, written as safetensors.
        optimizer: plain state by parameter name, written as optimizer.pt.
        documents: file stem -> JSON-able.
        keep: number of newest checkpoints to keep.
        write_files: writes further files into the folder it is given.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: it cannot be written, or reads back differently.
    """
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob("*.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    final = root / f"step-{step:08d}"
    partial = root / f"{final.name}.tmp-{os.getpid()}"
    try:
        partial.mkdir()
        for stem, state in tensors.items():
            save_file(savable(state), partial / f"{stem}.safetensors")
        torch.save(optimizer, partial / "optimizer.pt")
        for stem, document in documents.items():
            (partial / f"{stem}.json").write_text(json.dumps(document, indent=1))
        if write_files is not None:
            write_files(partial)
        files = sorted(p for p in partial.iterdir())
        for path in files:
            flush(path)
        (partial / MANIFEST).write_text(json.dumps({"step": step, "files": {p.name: _sha256(p) for p in files}}, indent=1))
        flush(partial / MANIFEST)
        flush(partial)
        if final.exists():  # the same step saved again, after a resume from an older one
            shutil.rmtree(final)
        partial.rename(final)
        flush(root)
    except Exception as error:  # a full disk is an OSError, a SafetensorError or a RuntimeError, depending on the writer
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"cannot write {final}: {error}. The earlier checkpoints are untouched; free space or repair the disk, then start again."
        ) from error
    wrong = problem(final)
    if wrong:
        shutil.rmtree(final, ignore_errors=True)
        raise CheckpointError(f"{final} was written but {wrong}. It was removed; the earlier checkpoints are untouched. Check the disk.")
    for old in checkpoints(root)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def checkpoints(root: Path) -> list[Path]:
    """Return the finished checkpoint folders under `root`, newest first."""
    folders = [p for p in root.glob("step-*") if p.is_dir() and p.name[5:].isdigit()]
    return sorted(folders, key=lambda p: int(p.name[5:]), reverse=True)


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose sums agree, and one line for each newer one that was skipped."""
    skipped = []
    for folder in checkpoints(root):
        wrong = problem(folder)
        if wrong is None:
            return folder, skipped
        skipped.append(f"skipping checkpoint {folder}: {wrong}")
    return None, skipped


def find_checkpoint(path: Path) -> Path:
    """Return the verified checkpoint folder of a run.

    Args:
        path: a run folder, its `checkpoints` folder, or a checkpoint folder.

    Raises:
        CheckpointError: there is no valid checkpoint.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        wrong = problem(path)
        if wrong:
            raise CheckpointError(f"checkpoint {path} is damaged: {wrong}")
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest, skipped = newest_valid(root)
    if newest is None:
        raise CheckpointError("\n".join([f"{path} holds no valid checkpoint (looked for step-*/{MANIFEST} in {root})", *skipped]))
    return newest


def resolve_weights(name: str) -> str:
    """Return the weights that a recipe names: the verified checkpoint of a run or checkpoint folder, else `name` (a file, folder or tag).

    Raises:
        CheckpointError: a run without a valid checkpoint.
    """
    path = Path(name)
    return str(find_checkpoint(path)) if (path / "checkpoints").is_dir() or (path / MANIFEST).exists() else name


def load_tensors(folder: Path, stem: str) -> dict[str, Tensor]:
    """Read a safetensors file of a checkpoint. Raises CheckpointError."""
    with _reading(folder / f"{stem}.safetensors") as path:
        return load_file(path)


def load_optimizer(folder: Path) -> dict[str, Any]:
    """Read the optimizer state of a checkpoint: parameter name -> state. Raises CheckpointError."""
    with _reading(folder / "optimizer.pt") as path:
        state = load_pickled(path)
        if not isinstance(state, dict) or not all(isinstance(values, dict) for values in state.values()):
            raise ValueError("expected each parameter's state by its name")
        return state


def load_json(folder: Path, stem: str) -> dict[str, Any]:
    """Read a JSON document of a checkpoint. Raises CheckpointError."""
    with _reading(folder / f"{stem}.json") as path:
        document = json.loads(path.read_text())
        if not isinstance(document, dict):
            raise ValueError(f"expected an object, found {str(document)[:60]!r}")
        return document


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Turn any error of reading a damaged file into a CheckpointError that names the file."""
    try:
        yield path
    except Exception as error:  # OSError, ValueError, RuntimeError, SafetensorError, EOFError, ..., depending on the damage
        raise CheckpointError(f"{path} cannot be read ({error}): remove {path.parent}, and an earlier checkpoint is used") from error


def optimizer_by_name(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """Return the optimizer's state keyed by parameter name: independent of group order and number of ranks."""
    return {name: dict(optimizer.state[p]) for name, p in _named(optimizer) if p in optimizer.state}


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, dict[str, Any]], strict: bool = True) -> list[str]:
    """Load the state of `optimizer_by_name`, on each parameter's device.

    Args:
        optimizer: changed in place.
        state: parameter name -> state.
        strict: raise for state that does not fit; else leave it out.

    Returns:
        The names whose state was left out.

    Raises:
        CheckpointError: with `strict`, state of untrained parameters, of another shape, or of another kind of
            optimizer.
    """
    names = dict(_named(optimizer))
    kinds = {"momentum_buffer"} if isinstance(optimizer, torch.optim.SGD) else {"step", "exp_avg", "exp_avg_sq"}

    def fits(name: str, values: dict[str, Any]) -> bool:
        shapes = {v.shape for v in values.values() if isinstance(v, Tensor) and v.ndim}
        return name in names and set(values) <= kinds and all(shape == names[name].shape for shape in shapes)

    unknown = sorted(name for name, values in state.items() if not fits(name, values))
    if unknown and strict:
        raise CheckpointError(f"the optimizer state names parameters this recipe does not train: {', '.join(unknown[:5])}")
    for name, values in state.items():
        if name in unknown:
            continue
        parameter = names[name]
        optimizer.state[parameter] = {k: v.to(parameter.device) if isinstance(v, Tensor) else v for k, v in values.items()}
    return unknown


def _named(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"])


def save_run(
    run_dir: str | Path, keep: int, model: PretrainModel, teacher: Teacher | None, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Save one checkpoint of a run, independent of the number of processes; the main one writes it.

    Args:
        run_dir: its `checkpoints` folder receives the checkpoint.
        keep: number of newest checkpoints to keep.
        model: towers and objectives.
        teacher: the EMA copy.
        optimizer: its state is saved by parameter name.
        state: "step" and what else a resumed run needs, as JSON-able data.

    Raises:
        CheckpointError: on every process.
    """

    def write() -> Path:
        towers = model.towers
        weights = towers.weights()
        for objective in model.objectives.values():
            for name in objective.exported:
                if isinstance(parameter := getattr(objective, name, None), nn.Parameter):
                    weights.setdefault(name, parameter.detach().reshape(()))
        tensors = {"model": weights, "objectives": model.objectives.state_dict() | mask_embeddings(towers)}
        if teacher is not None:
            tensors["teacher"] = teacher.module.state_dict()
        config = {"model_cfg": towers.model_cfg, "preprocess_cfg": towers.preprocess.recorded()}
        config["transparency"] = {"images": sum(state.get("transparent", {}).values()), "of": sum(state["positions"].values())}
        documents = {"state": state, "open_clip_config": config}
        root = Path(run_dir) / "checkpoints"
        return save(root, state["step"], tensors, optimizer_by_name(optimizer), documents, keep, towers.save_tokenizer)

    distributed.on_main(write)


def restore_run(folder: Path, model: PretrainModel, teacher: Teacher | None, optimizer: torch.optim.Optimizer, force: bool) -> list[str]:
    """Load a verified checkpoint into the run.

    Args:
        folder: the checkpoint.
        model: changed in place, as are `teacher` and `optimizer`.
        teacher: the EMA copy.
        optimizer: receives the saved moments.
        force: accept another recipe (resume=force); parts that the checkpoint lacks keep their initial weights.

    Returns:
        One line for each part that does not match.

    Raises:
        CheckpointError: the checkpoint does not fit this model, and `force` is false.
    """
    weights, extra = load_tensors(folder, "model"), load_tensors(folder, "objectives")
    exported = {name for objective in model.objectives.values() for name in objective.exported}
    embeddings = {key: value for key, value in extra.items() if key.startswith("towers.")} or older_mask_embeddings(model, extra)
    own = {key.removeprefix("towers."): value for key, value in embeddings.items()}
    weights = {k: v for k, v in weights.items() if k not in exported | {"logit_scale", "logit_bias"}}
    lines = [f"towers: {line}" for line in resize_positions(weights, model.towers.state_dict(), model.towers)]
    lines += _load(model.towers, weights | own, "towers")
    lines += _load(model.objectives, {k: v for k, v in extra.items() if k not in embeddings and not is_older(k, model)}, "objectives")
    if teacher is not None and (folder / "teacher.safetensors").exists():
        averaged = load_tensors(folder, "teacher")
        lines += [f"teacher: {line}" for line in resize_positions(averaged, teacher.module.state_dict(), teacher.module)]
        lines += _load(teacher.module, own | averaged, "teacher")
    elif teacher is not None:
        teacher.module.load_state_dict(model.towers.state_dict())
        lines.append("the checkpoint has no teacher: it starts as a copy of the towers")
    if lines and not force:
        raise CheckpointError(
            f"{folder} does not fit this recipe:\n  "
            + "\n  ".join(lines)
            + "\nresume=force continues all the same; or choose another run_dir"
        )
    moments = {older_name(name, model): state for name, state in load_optimizer(folder).items()}
    left_out = restore_optimizer(optimizer, moments, strict=not force)
    if left_out:
        lines.append(f"optimizer state of {len(left_out)} parameters is left out: {', '.join(left_out[:3])} ...")
    return lines


def _load(module: nn.Module, state: dict[str, Tensor], what: str) -> list[str]:
    """Load the matching tensors. Return one message each for missing and for unexpected keys."""
    own = module.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    module.load_state_dict(fitting, strict=False)
    fresh, unused = [k for k in own if k not in fitting], [k for k in state if k not in own]
    messages = []
    if fresh:
        messages.append(f"{what}: the checkpoint lacks {_some(fresh)}: fresh weights")
    if unused:
        messages.append(f"{what}: the checkpoint's {_some(unused)} are not used")
    return messages


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def mask_embeddings(towers: DualEncoder) -> dict[str, Tensor]:
    """Return the towers' mask embeddings as `towers.visual.mask_embedding`.

    They are saved beside the objectives, so that model.safetensors has the tensors of open_clip alone.
    """
    return {f"towers.{key}": value for key, value in towers.state_dict().items() if key.endswith("mask_embedding")}


def is_older(key: str, model: PretrainModel) -> bool:
    """Return whether a tensor is an objective's mask embedding, as in checkpoints of version 0.1.0."""
    name, _, rest = key.partition(".")
    return rest == "mask_token" and name in model.objectives and "mask_token" not in dict(model.objectives[name].named_parameters())


def older_name(name: str, model: PretrainModel) -> str:
    """Return the current name of a parameter from a checkpoint of version 0.1.0."""
    if not name.startswith("objectives.") or not is_older(name.removeprefix("objectives."), model):
        return name
    modality = next(e.view.modality for e in source_encodes(model.objectives[name.split(".")[1]].needs))
    return f"towers.{'visual' if modality == 'image' else 'text'}.mask_embedding"


def older_mask_embeddings(model: PretrainModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the mask embeddings of a checkpoint of version 0.1.0 under their current names."""
    return {older_name(f"objectives.{key}", model): value for key, value in state.items() if is_older(key, model)}
