"""Loading of weights: checkpoints of open_clip and of runs in any layout, with errors that name the keys."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from open_clip.model import convert_to_custom_text_state_dict
from safetensors.torch import load_file
from torch import Tensor

from mmpretrain.errors import ModelError
from mmpretrain.towers.dual import DualEncoder
from mmpretrain.towers.positions import resize_positions

log = logging.getLogger(__name__)

_NAMES = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_STALE = ("attn_mask", "text.attn_mask", "text.transformer.embeddings.position_ids")  # buffers that older versions saved


def load_pickled(path: Path) -> Any:
    """Load a torch file of tensors and plain data alone.

    Raises:
        ValueError: it holds other objects; the message omits torch's advice to let the file run code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(Unsupported|Trying to load|Can only)[^\n]*", str(error))
        raise ValueError(
            f"it holds more than tensors and plain data, and is not unpickled ({refused[0] if refused else 'refused'})"
        ) from None


def savable(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as safetensors writes it: on the CPU, contiguous, each tensor with memory of its own (CoaT's blocks share modules)."""
    seen: set[int] = set()
    result = {}
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        start = value.untyped_storage().data_ptr()
        result[key] = value.clone() if start in seen and value.numel() else value
        seen.add(start)
    return result


def recorded_preprocess(path: str | Path) -> dict[str, Any]:
    """The `preprocess_cfg` in a model folder; empty where the path is not one, or records none."""
    file = Path(path) / "open_clip_config.json"
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))["preprocess_cfg"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint, in CustomTextCLIP's layout, without unpickling code.

    Args:
        path: a .safetensors or torch file, or a folder that holds one.

    Raises:
        ModelError: there is no readable checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        file = next((path / name for name in _NAMES if (path / name).is_file()), None)
        if file is None:
            raise ModelError(f"no weights in {path}: looked for {', '.join(_NAMES)}; a run's checkpoints lie in RUN/checkpoints/step-N")
        path = file
    if not path.is_file():
        raise ModelError(f"checkpoint {path} does not exist")
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else load_pickled(path)
    except Exception as error:
        raise ModelError(
            f"{path} is not a readable checkpoint ({error}): expected safetensors, or a torch file of tensors alone"
        ) from error
    state = state.get("state_dict", state)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path}: expected tensors by name, or a dict with `state_dict`; found {list(state)[:5]}")
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    state = {key.removeprefix(prefix): value for key, value in state.items()}
    state = convert_to_custom_text_state_dict(state)
    return {key: value for key, value in state.items() if key not in _STALE}


def load_weights(dual: DualEncoder, path: str | Path, absent: Literal["error", "keep"] = "error") -> dict[str, Tensor]:
    """Load a checkpoint into the towers of a DualEncoder.

    Position embeddings of another image size or context length are resized.

    Args:
        dual: changed in place.
        path: see `read_weights`.
        absent: a tower without any weights in the checkpoint is an error, or keeps its initial weights.

    Returns:
        The tensors of no tower, such as logit_scale and logit_bias.

    Raises:
        ModelError: with the missing, unexpected and mismatching keys.
    """
    state = read_weights(path)
    towers = [name for name in ("visual", "text") if getattr(dual, name) is not None]
    own = dual.weights()
    for message in resize_positions(state, own, dual):
        log.info("%s: %s", path, message)
    for name in [name for name in towers if absent == "keep" and not any(key.startswith(f"{name}.") for key in state)]:
        log.warning("%s holds no %s tower: it keeps its initial weights", path, name)
        towers.remove(name)
        own = {key: value for key, value in own.items() if not key.startswith(f"{name}.")}
    unused = {name for name in ("visual", "text") if name not in towers and any(key.startswith(f"{name}.") for key in state)}
    if unused:
        log.info("%s: left out the weights of the %s tower, which this model lacks", path, " and ".join(sorted(unused)))
    given = {key: value for key, value in state.items() if key.split(".")[0] in towers}
    problems = {
        "missing": sorted(own.keys() - given.keys()),
        "unexpected": sorted(given.keys() - own.keys()),
        "of another shape": [
            f"{key} {list(value.shape)} instead of {list(own[key].shape)}"
            for key, value in given.items()
            if key in own and value.shape != own[key].shape
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{len(keys)} {what}: {', '.join(keys[:8])}{' ...' * (len(keys) > 8)}" for what, keys in problems.items() if keys)
        remedy = "Give the `model` that the checkpoint was trained with"
        if problems["of another shape"] and not problems["missing"] and not problems["unexpected"]:
            remedy += ", or its image_size: what depends on it here cannot be resized"
        raise ModelError(f"{path} does not fit this model: {told}. {remedy}")
    dual.load_state_dict(given, strict=False)  # complete for the towers it has, as checked above
    return {key: value for key, value in state.items() if key.split(".")[0] not in ("visual", "text")}
