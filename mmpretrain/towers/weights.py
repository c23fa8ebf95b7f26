"""Read checkpoints of open_clip and of our runs, whatever their layout, and load them with errors that name the keys."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from typing import Any, Literal

import torch
from open_clip.model import convert_to_custom_text_state_dict
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.errors import ModelError
from mmpretrain.towers.dual import DualEncoder
from mmpretrain.towers.vision import resize_grid

log = logging.getLogger(__name__)

_NAMES = ("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_STALE = ("attn_mask", "text.attn_mask", "text.transformer.embeddings.position_ids")  # buffers that older versions saved


def load_pickled(path: Path) -> Any:
    """A torch file, of tensors and plain data alone. Raises ValueError, without torch's advice to let the file run code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(Unsupported|Trying to load|Can only)[^\n]*", str(error))
        raise ValueError(
            f"it holds more than tensors and plain data, and is not unpickled ({refused[0] if refused else 'refused'})"
        ) from None


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """State dict of a .safetensors or torch file (never unpickling code), or of a folder holding one, in CustomTextCLIP's layout."""
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in _NAMES if (path / name).is_file()), None)
        if found is None:
            raise ModelError(f"no weights in {path}: looked for {', '.join(_NAMES)}; a run's checkpoints lie in RUN/checkpoints/step-N")
        path = found
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
    """Load a checkpoint into the towers of a DualEncoder; -> what is not theirs, such as logit_scale and logit_bias.

    Position embeddings of another image size or context length are resized. A tower of which the checkpoint holds nothing is an
    error, or with `absent="keep"` keeps its first weights. Raises ModelError naming the missing, unexpected and mismatching keys.
    """
    state = read_weights(path)
    towers = [name for name in ("visual", "text") if getattr(dual, name) is not None]
    own = dual.weights()
    _resize(dual, state, own)
    for name in [name for name in towers if absent == "keep" and not any(key.startswith(f"{name}.") for key in state)]:
        log.warning("%s holds no %s tower: it keeps its first weights", path, name)
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
        raise ModelError(f"{path} does not fit this model: {told}. Give the `model` that the checkpoint was trained with")
    dual.load_state_dict(given, strict=False)  # complete for the towers it has, as checked above
    return {key: value for key, value in state.items() if key.split(".")[0] not in ("visual", "text")}


def _resize(dual: DualEncoder, state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    key = "visual.positional_embedding"
    grid = getattr(dual.visual, "grid", None)
    if key in state and key in own and grid and len(state[key]) != len(own[key]):
        side = round((len(state[key]) - 1) ** 0.5)
        if side * side + 1 == len(state[key]):
            log.info("position embedding resized from %s to %s patches", (side, side), grid)
            state[key] = resize_grid(state[key], (side, side), grid)
    key = "text.positional_embedding"
    if key in state and key in own and len(state[key]) != len(own[key]):
        log.info("text position embedding resized from %d to %d", len(state[key]), len(own[key]))
        state[key] = F.interpolate(state[key].float().mT[None], size=len(own[key]), mode="linear")[0].mT.to(state[key].dtype)
