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

from mmpretrain.data.text import get_tokenizer
from mmpretrain.errors import ModelError
from mmpretrain.towers.dual import DualEncoder
from mmpretrain.towers.positions import resize_positions
from mmpretrain.towers.specs import build_towers
from mmpretrain.towers.weights import load_weights, savable
from mmpretrain.types import Preprocess

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
    cfg["vision_cfg"]["image_size"] = dual.preprocess.size  # of the sources' views: open_clip takes the tower's for its preprocessing
    return {"model_cfg": cfg, "preprocess_cfg": dual.preprocess.recorded()}


def recorded_transparency(checkpoint: str | Path) -> tuple[int, int] | None:
    """How many images the run has seen with transparent pixels, and of how many; None where its checkpoint does not record it."""
    try:
        recorded = json.loads((Path(checkpoint) / CONFIG).read_text(encoding="utf-8"))["transparency"]
        return int(recorded["images"]), int(recorded["of"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def about_transparency(preprocess: Preprocess, transparent: tuple[int, int] | None) -> str:
    """What a user of the model must know of images with transparent pixels."""
    share = "" if transparent is None else f"{transparent[0]:,} of the {transparent[1]:,} images seen in training had transparent pixels. "
    if preprocess.background == "drop":
        return (
            share + "Training dropped alpha, as convert('RGB') does; open_clip's preprocessing resizes before it drops it: convert first."
        )
    how = "a random colour each" if preprocess.background == "random" else f"RGB {list(preprocess.background)}"
    return (
        share
        + f"Training laid them over {how}; open_clip's preprocessing drops alpha instead: lay them over RGB {_opaque(preprocess)} first."
    )


def _opaque(preprocess: Preprocess) -> list[int]:
    return [int(part) for part in preprocess.opaque()]


def readme(preprocess: Preprocess, transparent: tuple[int, int] | None) -> str:
    """The export's README.md: how to load the model, and how to prepare images with transparent pixels."""
    if preprocess.background == "drop":
        code = 'def opaque(image):\n    return image.convert("RGBA").convert("RGB")'
    else:
        colour = (*_opaque(preprocess), 255)
        code = (
            'from PIL import Image\n\n\ndef opaque(image):\n    image = image.convert("RGBA")\n'
            f'    return Image.alpha_composite(Image.new("RGBA", image.size, {colour}), image).convert("RGB")'
        )
    return (
        "# A model in open_clip's format\n\n```python\nimport open_clip\n\n"
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:THIS_FOLDER")\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:THIS_FOLDER")\n```\n\n## Images with transparent pixels\n\n'
        f"{about_transparency(preprocess, transparent)}\n\n```python\n{code}\n\n\n# preprocess(opaque(image))\n```\n"
    )


def export_open_clip(
    dual: DualEncoder, leftovers: Mapping[str, Tensor], folder: str | Path, transparent: tuple[int, int] | None = None
) -> Path:
    """Write the model, its tokenizer where that has files, and a README.md.

    Args:
        dual: the towers.
        leftovers: logit_scale (its logarithm, with one element; absent: open_clip's initial value) and logit_bias.
        folder: new or empty.
        transparent: as `recorded_transparency` returns it.

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
    state = savable(dual.weights())
    vision = dual.model_cfg["vision_cfg"]
    if dual.preprocess.size != vision.get("image_size", 224):  # the towers resize their positions for the views; open_clip's do not
        target = build_towers(dual.model_cfg, image_size=dual.preprocess.size, text=False)
        resize_positions(state, target.weights(), target)
    state["logit_scale"] = scale.detach().cpu().float().reshape(()).clone()
    if bias is not None:
        state["logit_bias"] = bias.detach().cpu().float().reshape(()).clone()
    config = open_clip_config(dual, None if bias is None else float(bias))
    _check(config["model_cfg"], state)
    if config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
        get_tokenizer(dual.tokenizer)  # before anything is written: its files belong to the folder
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    dual.save_tokenizer(folder)
    (folder / "README.md").write_text(readme(dual.preprocess, transparent), encoding="utf-8")
    return folder


def _check(cfg: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Raise ModelError where open_clip would build a model with other weights from this config."""
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
            "their own image size alone, and none that widen behind their pooling (MobileNetV3): train at that size (leave out "
            "image_size), "
            "or use the checkpoint's model.safetensors directly"
        )


def load_model(checkpoint: str | Path) -> tuple[DualEncoder, dict[str, Tensor]]:
    """Load a checkpoint folder, or any folder in open_clip's format; return its towers, and logit_scale and logit_bias."""
    folder = Path(checkpoint)
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} has no {CONFIG}: give a run, one of its checkpoints, or a folder of open_clip's format")
    dual = build_towers(str(folder))
    return dual, load_weights(dual, folder)
