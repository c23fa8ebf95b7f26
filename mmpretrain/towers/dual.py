"""The pair of an image tower and a text tower that share a joint space."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from mmpretrain.data.text import get_tokenizer
from mmpretrain.towers.base import Tower
from mmpretrain.types import Preprocess


class DualEncoder(nn.Module):
    """An image tower and a text tower with one joint space; either may be absent."""

    def __init__(self, visual: Tower | None, text: Tower | None, model_cfg: dict, preprocess: Preprocess, tokenizer: str = "clip"):
        super().__init__()
        self.visual, self.text = visual, text
        self._model_cfg = model_cfg
        self.preprocess = preprocess
        self.tokenizer = tokenizer  # for mmpretrain.data.text.get_tokenizer

    @property
    def model_cfg(self) -> dict:
        """The config in open_clip's format: embed_dim, vision_cfg, text_cfg, quick_gelu; without the parts of absent towers."""
        absent = {part for part, tower in (("vision_cfg", self.visual), ("text_cfg", self.text)) if tower is None}
        return {"custom_text": True} | {key: value for key, value in self._model_cfg.items() if key not in absent}

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict under open_clip's names, without the mask embeddings, which only pretraining uses."""
        return {key: value for key, value in self.state_dict().items() if not key.endswith("mask_embedding")}

    def save_tokenizer(self, folder: Path) -> None:
        """Write a transformers tokenizer's files, which open_clip looks for in the model's folder."""
        if self.text is not None and self._model_cfg.get("text_cfg", {}).get("hf_tokenizer_name"):
            get_tokenizer(self.tokenizer).save(folder)

    @property
    def embed_dim(self) -> int:
        """E, the width of the joint space."""
        return (self.visual or self.text).embed_dim  # type: ignore[union-attr]

    @property
    def context_length(self) -> int:
        """Tokens per caption; 77 without a text tower."""
        return getattr(self.text, "context_length", 77)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of both towers in the backward pass; see `Tower.set_grad_checkpointing`."""
        for tower in (self.visual, self.text):
            if tower is not None:
                tower.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters of both towers that should not decay; see `Tower.no_weight_decay`."""
        return {f"{name}.{key}" for name, tower in self.named_children() if isinstance(tower, Tower) for key in tower.no_weight_decay()}

    def layer_ids(self) -> dict[str, int]:
        """Return parameter name -> depth within its tower."""
        towers = [(name, tower) for name, tower in self.named_children() if isinstance(tower, Tower)]
        return {f"{name}.{key}": depth for name, tower in towers for key, depth in tower.layer_ids().items()}
