"""Towers made of transformers models, from a local folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmpretrain.errors import ModelError
from mmpretrain.towers.base import Tokens, Tower, unmasked
from mmpretrain.types import Encoded, Preprocess


class HFTower(Tower):
    """A transformers model; `projection` leads to the joint space, the identity where the model has none."""

    mergeable = False  # transformers models come with any normalisation, and are run whole

    model: Any  # transformers', whose configuration and attributes no type states

    def __init__(self, model: nn.Module, projection: nn.Module, embed_dim: int, words: bool):
        super().__init__()
        self.model, self.projection, self.words = model, projection, words
        config = self.model.config
        self.width = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
        self.embed_dim = embed_dim
        if words:
            self.context_length = getattr(config, "max_position_embeddings", 77)

    def embed(
        self,
        data: Tensor,
        hidden: Tensor | None = None,
        mode: Literal["replace", "drop"] = "replace",
        bidirectional: bool = False,
    ) -> Tokens:
        return unmasked(self.model, data, hidden, bidirectional and hasattr(self.model.config, "projection_dim"))

    def trunk(self, tokens: Tokens, attention: bool = False, pooled_only: bool = False) -> tuple[Tensor, Tensor | None]:
        if attention:
            raise ModelError(f"{type(self.model).__name__} gives no class-token attention: attentive masks need a native ViT")
        return tokens.x, None

    def readout(self, x: Tensor, tokens: Tokens, outputs: frozenset[str], attention: Tensor | None = None) -> Encoded:
        config, valid, grid = self.model.config, None, None
        if self.words:
            pad = getattr(config, "pad_token_id", None)
            # CLIP's padding may equal EOT, which has to be seen; its causal mask needs no padding mask
            valid = (x != pad).long() if pad is not None and not hasattr(config, "projection_dim") else torch.ones_like(x)
            out = self.model(input_ids=x, attention_mask=valid)
        else:
            native = getattr(config, "image_size", x.shape[-1])
            resized = {} if native == x.shape[-1] else {"interpolate_pos_encoding": True}
            out = self.model(pixel_values=x, **resized)
        hidden = out.last_hidden_state
        pooled = getattr(out, "pooler_output", None)
        if pooled is None and valid is not None:
            pooled = (hidden * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        elif pooled is None:
            pooled = hidden[:, 0] if hidden.dim() == 3 else hidden.mean((2, 3))
        pooled = pooled.flatten(1)
        if not self.words:
            if hidden.dim() == 4:
                grid, hidden = tuple(hidden.shape[2:]), hidden.flatten(2).mT
            elif patch := getattr(config, "patch_size", None):
                grid = (x.shape[2] // patch, x.shape[3] // patch)
                hidden = hidden[:, hidden.shape[1] - grid[0] * grid[1] :]
        given = {"tokens": hidden, "pooled": pooled, "features": self.projection(pooled)}
        return Encoded(**{key: value for key, value in given.items() if key in outputs}, grid=grid)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.gradient_checkpointing_enable() if enable else self.model.gradient_checkpointing_disable()


def from_transformers(folder: str, image: bool = True, text: bool = True) -> tuple[HFTower | None, HFTower | None, dict, Preprocess]:
    """The towers of a transformers folder: both of a CLIP-like model, or the one of a plain image or text model.

    Raises ModelError where the folder holds no config.json, or its model cannot be loaded or is of neither kind.
    """
    import transformers

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ModelError(f"hf:{folder}: no config.json there; save the model and its processor with save_pretrained({folder!r}) first")
    try:
        model = transformers.AutoModel.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError, ..., by what is wrong in the folder
        raise ModelError(f"hf:{folder} cannot be loaded: {error}") from error
    config, visual, words = model.config, None, None
    if hasattr(model, "vision_model") and hasattr(model, "text_model"):
        E = getattr(config, "projection_dim", None) or config.text_config.hidden_size
        if image:
            visual = HFTower(model.vision_model, getattr(model, "visual_projection", nn.Identity()), E, words=False)
        if text:
            words = HFTower(model.text_model, getattr(model, "text_projection", nn.Identity()), E, words=True)
        size = config.vision_config.image_size
    elif model.main_input_name == "pixel_values":
        visual = HFTower(model, nn.Identity(), getattr(config, "hidden_size", None) or config.hidden_sizes[-1], words=False)
        size = getattr(config, "image_size", 224)
    elif model.main_input_name == "input_ids":
        words, size = HFTower(model, nn.Identity(), config.hidden_size, words=True), 224
    else:
        raise ModelError(f"hf:{folder}: {type(model).__name__} reads {model.main_input_name}, expected pixel_values or input_ids")
    model.train()
    tower = visual or words
    if tower is None:
        raise ModelError(f"hf:{folder}: no tower left, image={image}, text={text}")
    return visual, words, {"embed_dim": tower.embed_dim, "hf_folder": folder}, _hf_preprocess(path, size)


def _hf_preprocess(folder: Path, size: int) -> Preprocess:
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return Preprocess(size)
    found = json.loads(file.read_text())
    extent = found.get("crop_size") or found.get("size") or size
    squash = isinstance(found.get("size"), dict) and "height" in found["size"] and not found.get("do_center_crop")
    if isinstance(extent, dict):
        extent = extent.get("height") or extent.get("shortest_edge") or size
    return Preprocess(
        extent,
        tuple(found.get("image_mean", Preprocess.mean)),
        tuple(found.get("image_std", Preprocess.std)),
        {2: "bilinear"}.get(found.get("resample"), "bicubic"),
        "squash" if squash else "shortest",
    )
