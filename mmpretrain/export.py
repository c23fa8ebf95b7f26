"""Export to open_clip's folder format, which open_clip and CLIP_benchmark load as `local-dir:FOLDER`."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from safetensors.torch import save_file
from torch import Tensor

from mmpretrain.errors import ModelError
from mmpretrain.towers.dual import DualEncoder
from mmpretrain.towers.specs import build_towers
from mmpretrain.towers.weights import load_weights

WEIGHTS, CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
_TOP = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias")


def open_clip_config(dual: DualEncoder, logit_bias: float | None = None) -> dict[str, Any]:
    """Return {model_cfg, preprocess_cfg} for open_clip; the text tower is named `text.*`, hence custom_text."""
    cfg = {key: copy.deepcopy(value) for key, value in dual.model_cfg.items() if key in _TOP}
    for part, kind in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        if part in cfg:
            known = {field.name for field in fields(kind)}
            cfg[part] = {key: value for key, value in cfg[part].items() if key in known}
    cfg["custom_text"] = True
    if logit_bias is not None:  # open_clip creates the parameter only if an initial value is given
        cfg["init_logit_bias"] = logit_bias
    p = dual.preprocess
    preprocess = {"mean": list(p.mean), "std": list(p.std), "interpolation": p.interpolation, "resize_mode": p.resize_mode}
    return {"model_cfg": cfg, "preprocess_cfg": preprocess}


def export_open_clip(dual: DualEncoder, leftovers: Mapping[str, Tensor], folder: str | Path) -> Path:
    """Write `open_clip_model.safetensors` and `open_clip_config.json`.

    Args:
        dual: the towers.
        leftovers: logit_scale (its logarithm, with one element; absent: open_clip's initial value) and logit_bias.
        folder: new or empty.

    Returns:
        The folder.

    Raises:
        ModelError: a tower is missing, or open_clip has no config for it.
    """
    folder = Path(folder)
    if dual.visual is None or dual.text is None or not {"vision_cfg", "text_cfg"} <= dual.model_cfg.keys():
        lacks = "a transformers model" if "hf_folder" in dual.model_cfg else "one that lacks a tower"
        raise ModelError(
            f"open_clip's format needs both towers in its own config format, and this is {lacks}: train with a model of vision_cfg and "
            "text_cfg, or use the checkpoint's model.safetensors directly (`visual.*` are the image tower's weights)"
        )
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ModelError(f"{folder} is {'not empty' if folder.is_dir() else 'not a folder'}: choose a new folder")
    scale = leftovers.get("logit_scale", torch.tensor(math.log(1 / 0.07)))
    bias = leftovers.get("logit_bias")
    state = {key: value.detach().cpu().contiguous() for key, value in dual.weights().items()}
    state["logit_scale"] = scale.detach().cpu().float().reshape(()).clone()
    if bias is not None:
        state["logit_bias"] = bias.detach().cpu().float().reshape(()).clone()
    config = open_clip_config(dual, None if bias is None else float(bias))
    _check(config["model_cfg"], state)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return folder


def _check(cfg: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Raise ValueError where open_clip would build a model with other weights from this config."""
    cfg = copy.deepcopy(cfg)
    cfg.pop("custom_text")
    if "hf_model_name" in cfg["text_cfg"]:
        cfg["text_cfg"]["hf_model_pretrained"] = False
    with torch.device("meta"):
        theirs = CustomTextCLIP(**cfg).state_dict()
    wrong = [key for key in state.keys() | theirs.keys() if key not in state or key not in theirs or state[key].shape != theirs[key].shape]
    if wrong:
        raise ModelError(
            f"open_clip would build another model of this config: {', '.join(sorted(wrong)[:5])} differ. It builds timm towers at "
            "their own image size alone: train at that one (leave out image_size) to export"
        )


def load_model(checkpoint: str | Path) -> tuple[DualEncoder, dict[str, Tensor]]:
    """Load a checkpoint folder, or any folder in open_clip's format; return its towers, and logit_scale and logit_bias."""
    folder = Path(checkpoint)
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} has no {CONFIG}: give a run, one of its checkpoints, or a folder of open_clip's format")
    dual = build_towers(str(folder))
    return dual, load_weights(dual, folder)
