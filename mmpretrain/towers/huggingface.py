"""Adapters that make towers of transformers models, from a local folder."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmpretrain.errors import ModelError
from mmpretrain.towers.base import Tokens, Tower, unmasked
from mmpretrain.types import Encoded, Preprocess


@dataclass(frozen=True)
class Rule:
    """How a type of dual encoder makes its features: what its `get_text_features` and `get_image_features` do."""

    text: str = "text_model"  # names of its modules
    image: str = "vision_model"
    text_projection: str | None = "text_projection"  # None: the pooled output is the feature
    image_projection: str | None = "visual_projection"
    text_masked: bool = False  # whether padding is hidden from the text tower
    text_first: bool = False  # whether the first position is pooled rather than the module's own pooler
    image_first: bool = False
    patches: bool = False  # whether the image tower reads patches and their number down and across, rather than pixels


_BERT = Rule(text_masked=True, text_first=True)  # a bidirectional text tower, read at its class token
RULES = {  # aimv2 is left out: its text tower is causal or not by whether some row of the batch is padded
    "clip": Rule(),  # its causal attention ends at EOT: padding after it is never seen
    "clipseg": Rule(),
    "metaclip_2": Rule(),
    "groupvit": Rule(),
    "owlvit": Rule(),
    "owlv2": Rule(),
    "siglip": Rule(text_projection=None, image_projection=None),  # trained with padding that is attended
    "siglip2": Rule(text_projection=None, image_projection=None, patches=True),
    "altclip": _BERT,
    "chinese_clip": _BERT,
    "align": Rule(text_masked=True, text_first=True, image_projection=None),
    "blip": Rule(text_masked=True),
    "flava": Rule(image="image_model", image_projection="image_projection", text_masked=True, text_first=True, image_first=True),
    "vision-text-dual-encoder": Rule(text_masked=True),
}
_UNMASKED = {"clip_text_model", "siglip_text_model", "siglip2_text_model"}  # text towers of the above that are saved alone


class HFTower(Tower):
    """A transformers model; `projection` maps to the joint space, or is the identity where the model has none."""

    mergeable = False  # transformers models have any normalisation, and run in one piece

    model: Any  # transformers', whose configuration and attributes depend on the model

    def __init__(
        self,
        model: nn.Module,
        projection: nn.Module,
        embed_dim: int,
        words: bool,
        masked: bool = True,
        first: bool = False,
        patches: bool = False,
    ):
        """`masked`, `first` and `patches` as in Rule."""
        super().__init__()
        self.model, self.projection, self.words = model, projection, words
        self.masked, self.first, self.patches = masked, first, patches
        config = self.model.config
        sizes = getattr(config, "hidden_size", None) or (getattr(config, "hidden_sizes", None) or [embed_dim])[-1]
        self.width = projection.in_features if isinstance(projection, nn.Linear) else sizes
        self.embed_dim = embed_dim
        if words:
            self.context_length = _context_length(model)

    def embed(
        self,
        data: Tensor,
        hidden: Tensor | None = None,
        mode: Literal["replace", "drop"] = "replace",
        bidirectional: bool = False,
    ) -> Tokens:
        return unmasked(self.model, data, hidden, bidirectional and not self.masked)

    def trunk(self, tokens: Tokens, attention: bool = False, pooled_only: bool = False) -> tuple[Tensor, Tensor | None]:
        if attention:
            raise ModelError(f"{type(self.model).__name__} gives no class-token attention: attentive masks need a native ViT")
        return tokens.x, None

    def readout(self, x: Tensor, tokens: Tokens, outputs: frozenset[str], attention: Tensor | None = None) -> Encoded:
        config, valid, grid = self.model.config, None, None
        if self.words:
            pad = getattr(config, "pad_token_id", None)
            valid = (x != pad).long() if self.masked and pad is not None else torch.ones_like(x)
            out = self.model(input_ids=x, attention_mask=valid if self.masked else None)
        elif self.patches:
            p = config.patch_size
            grid = (x.shape[2] // p, x.shape[3] // p)
            patches = x[:, :, : grid[0] * p, : grid[1] * p].unflatten(3, (grid[1], p)).unflatten(2, (grid[0], p))  # [B,3,h,p,w,p]
            patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [B,N,p*p*3]
            seen = torch.ones(patches.shape[:2], dtype=torch.int32, device=x.device)
            out = self.model(patches, seen, torch.tensor([grid] * len(x), device=x.device))
        else:
            native = getattr(config, "image_size", x.shape[-1])
            resized = {} if native == x.shape[-1] else {"interpolate_pos_encoding": True}
            out = self.model(pixel_values=x, **resized)
        hidden = out.last_hidden_state
        pooled = None if self.first else getattr(out, "pooler_output", None)
        if pooled is None and valid is not None and not self.first:
            pooled = (hidden * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        elif pooled is None:
            pooled = hidden[:, 0] if hidden.dim() == 3 else hidden.mean((2, 3))
        pooled = pooled.flatten(1)
        if not self.words:
            if hidden.dim() == 4:
                grid, hidden = tuple(hidden.shape[2:]), hidden.flatten(2).mT
            elif grid is None and isinstance(patch := getattr(config, "patch_size", None), int):
                grid = (x.shape[2] // patch, x.shape[3] // patch)
                prefix = hidden.shape[1] - grid[0] * grid[1]
                grid, hidden = (None, hidden) if prefix < 0 else (grid, hidden[:, prefix:])  # GroupViT merges its patches
        given = {"tokens": hidden, "pooled": pooled, "features": self.projection(pooled)}
        return Encoded(**{key: value for key, value in given.items() if key in outputs}, grid=grid)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.gradient_checkpointing_enable() if enable else self.model.gradient_checkpointing_disable()


def _context_length(model: nn.Module) -> int:
    """How many tokens a transformers text model takes: RoBERTa and its like number positions from behind that of padding."""
    config: Any = model.config
    length = getattr(config, "max_position_embeddings", None) or 77
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return length


def from_transformers(folder: str, image: bool = True, text: bool = True) -> tuple[HFTower | None, HFTower | None, dict, Preprocess]:
    """Load the towers of a transformers folder: both of a CLIP-like model, or the one of an image or text model.

    Args:
        folder: with config.json and weights.
        image: load the image tower.
        text: load the text tower.

    Returns:
        (image tower, text tower, model_cfg, preprocessing).

    Raises:
        ModelError: the folder has no config.json, or its model is of neither kind.
    """
    import transformers

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ModelError(f"hf:{folder}: no config.json there; save the model and its processor with save_pretrained({folder!r}) first")
    rule = rule_of(folder)
    try:
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, ..., by what is wrong in the folder
        if "Unrecognized configuration class" in str(error):
            kind = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).model_type
            raise ModelError(f"hf:{folder}: transformers builds no model of type {kind} by itself") from error
        raise ModelError(f"hf:{folder} cannot be loaded: {str(error).splitlines()[0][:300]}") from error
    config, visual, words = model.config, None, None
    if rule is not None:
        if image:
            visual = _image_tower(model, rule)
        if text:
            words = _text_tower(model, rule)
        size = _image_size(getattr(model, rule.image).config, rule)
    elif model.main_input_name == "pixel_values":
        visual = HFTower(model, nn.Identity(), getattr(config, "hidden_size", None) or config.hidden_sizes[-1], words=False)
        size = getattr(config, "image_size", 224)
    elif model.main_input_name == "input_ids" and not getattr(config, "is_encoder_decoder", False):
        words, size = HFTower(model, nn.Identity(), config.hidden_size, words=True, masked=config.model_type not in _UNMASKED), 224
    else:
        reads = "an encoder with a decoder" if getattr(config, "is_encoder_decoder", False) else f"reads {model.main_input_name}"
        raise ModelError(f"hf:{folder}: {type(model).__name__} is {reads}, expected a model of pixel_values or input_ids alone")
    model.train()
    tower = visual or words
    if tower is None:
        raise ModelError(f"hf:{folder}: no tower left, image={image}, text={text}")
    return visual, words, {"embed_dim": tower.embed_dim, "hf_folder": folder}, _hf_preprocess(path, size)


def rule_of(folder: str) -> Rule | None:
    """The rule of a folder's model; None for one of a single modality. Raises ValueError for a dual encoder of an unknown type."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = config.model_type
    if kind in RULES:
        rule = RULES[kind]
        text = getattr(getattr(config, "text_config", None), "model_type", "")
        return replace(rule, text_masked=False) if kind == "vision-text-dual-encoder" and text in _UNMASKED else rule
    parts = set(getattr(config, "sub_configs", ())) | {name for name in vars(config) if name.endswith("_config")}
    if parts - {"backbone_config", "quantization_config", "rope_config"}:
        raise ModelError(
            f"hf:{folder}: a model of type {kind} has parts ({', '.join(sorted(parts))}) whose features are not known to agree with "
            f"transformers' own: use one of {', '.join(RULES)}, or a plain image or text model"
        )
    return None


def _projection(model: Any, name: str | None) -> tuple[nn.Module, int | None]:
    """The module that leads to the joint space, and the width that it gives."""
    module = nn.Identity() if name is None else getattr(model, name)
    last = [part for part in module.modules() if isinstance(part, nn.Linear)]
    return module, last[-1].out_features if last else None


def _image_tower(model: Any, rule: Rule) -> HFTower:
    projection, width = _projection(model, rule.image_projection)
    inner = getattr(model, rule.image)
    width = width or getattr(inner.config, "hidden_size", None) or model.config.projection_dim
    return HFTower(inner, projection, width, words=False, first=rule.image_first, patches=rule.patches)


def _text_tower(model: Any, rule: Rule) -> HFTower:
    projection, width = _projection(model, rule.text_projection)
    inner = getattr(model, rule.text)
    width = width or getattr(inner.config, "projection_size", None) or inner.config.hidden_size
    return HFTower(inner, projection, width, words=True, masked=rule.text_masked, first=rule.text_first)


def _image_size(config: Any, rule: Rule) -> int:
    """Pixels a side of an image tower's images."""
    if rule.patches:
        return math.isqrt(config.num_patches) * config.patch_size
    return getattr(config, "image_size", 224)


def _hf_preprocess(folder: Path, size: int) -> Preprocess:
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return Preprocess(size)
    options = json.loads(file.read_text())
    extent = options.get("crop_size") or options.get("size") or size
    squash = isinstance(options.get("size"), dict) and "height" in options["size"] and not options.get("do_center_crop")
    if isinstance(extent, dict):
        extent = extent.get("height") or extent.get("shortest_edge") or size
    return Preprocess(
        extent,
        tuple(options.get("image_mean", Preprocess.mean)),
        tuple(options.get("image_std", Preprocess.std)),
        {2: "bilinear"}.get(options.get("resample"), "bicubic"),
        "squash" if squash else "shortest",
    )
