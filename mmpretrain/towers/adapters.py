"""Towers made of other libraries' modules: open_clip's own, timm's through open_clip.

They give features, pooled and tokens; token masks, mask embeddings and attention belong to the native towers.
"""

from __future__ import annotations

import difflib
import math
from typing import Any, Literal

from open_clip.hf_model import HFTextEncoder
from open_clip.model import _build_text_tower, _build_vision_tower
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from mmpretrain.errors import ModelError
from mmpretrain.towers.base import Tokens, Tower, unmasked
from mmpretrain.towers.huggingface import HFTower, from_transformers
from mmpretrain.types import Encoded

__all__ = ["Adapter", "HFTower", "from_open_clip", "from_transformers", "timm_config"]


class Adapter(Tower):
    """Another library's module as a Tower. Its state dict has the module's own names, so that checkpoints stay exchangeable."""

    words = False  # whether it reads ids rather than pixels
    module: Any  # another library's, whose attributes no type states

    def __init__(self, module: nn.Module, width: int, embed_dim: int):
        super().__init__()
        self.module = module
        self.width, self.embed_dim = width, embed_dim
        self.mergeable = not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
        self.register_state_dict_post_hook(_strip)
        self.register_load_state_dict_pre_hook(_add)

    def embed(
        self,
        data: Tensor,
        hidden: Tensor | None = None,
        mode: Literal["replace", "drop"] = "replace",
        bidirectional: bool = False,
    ) -> Tokens:
        return unmasked(self.module, data, hidden, bidirectional and not isinstance(self.module, HFTextEncoder))

    def trunk(self, tokens: Tokens, attention: bool = False, pooled_only: bool = False) -> tuple[Tensor, Tensor | None]:
        if attention:
            raise ModelError(f"{type(self.module).__name__} gives no class-token attention: attentive masks need a native ViT")
        return self.run(tokens.x), None

    def run(self, data: Tensor) -> Tensor:
        """Data -> whatever `read` makes its outputs of."""
        raise NotImplementedError

    def read(self, x: Tensor, data: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """-> tokens [B,N,D], pooled [B,D'], features [B,E]."""
        raise NotImplementedError

    def readout(self, x: Tensor, tokens: Tokens, outputs: frozenset[str], attention: Tensor | None = None) -> Encoded:
        words, pooled, features = self.read(x, tokens.x)
        grid = None
        if not self.words and words is not None:
            p = self.patch_size
            side = math.isqrt(words.shape[1])
            grid = (tokens.x.shape[2] // p, tokens.x.shape[3] // p) if p else (side, words.shape[1] // max(side, 1))
            grid = grid if grid[0] * grid[1] == words.shape[1] else None
        given = {"tokens": words, "pooled": pooled, "features": features}
        return Encoded(**{key: value for key, value in given.items() if key in outputs}, grid=grid)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if not hasattr(self.module, "set_grad_checkpointing"):
            return super().set_grad_checkpointing(enable)
        return self.module.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        inner = getattr(self.module, "trunk", self.module)
        names = inner.no_weight_decay() if hasattr(inner, "no_weight_decay") else set()
        return {name for name, _ in self.named_parameters() if any(name.endswith(f".{key}") for key in names)}


def _strip(module: nn.Module, state: dict, prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}module.")]:
        state[prefix + key.removeprefix(f"{prefix}module.")] = state.pop(key)


def _add(module: nn.Module, state: dict, prefix: str, *rest: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}module.{key.removeprefix(prefix)}"] = state.pop(key)


class TimmTower(Adapter):
    """timm's trunk with open_clip's projection head."""

    def __init__(self, module: TimmModel, embed_dim: int):
        trunk: Any = module.trunk  # timm's, whose attributes no type states
        super().__init__(module, trunk.num_features, embed_dim)
        patch = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
        if patch and getattr(trunk, "num_prefix_tokens", None) is not None:
            self.patch_size = patch[0]

    def run(self, data: Tensor) -> Tensor:
        return self.module.trunk.forward_features(data)

    def read(self, x: Tensor, data: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        trunk = self.module.trunk
        if x.dim() == 4:
            tokens = x.flatten(1, 2) if getattr(trunk, "output_fmt", "") == "NHWC" else x.flatten(2).mT
        else:
            tokens = x[:, getattr(trunk, "num_prefix_tokens", 0) :]
        pooled = trunk.forward_head(x)
        return tokens, pooled, self.module.head(pooled)

    def layer_ids(self) -> dict[str, int]:
        from timm.models import group_parameters

        depth: Any = group_parameters(self.module.trunk, self.module.trunk.group_matcher(), reverse=True)
        last = max(depth.values(), default=0) + 1
        return {name: depth.get(name.removeprefix("module.trunk."), last) for name, _ in self.named_parameters()}


class ResNetTower(Adapter):
    """CLIP's ResNet with attention pooling."""

    def run(self, data: Tensor) -> Tensor:
        m = self.module
        return m.layer4(m.layer3(m.layer2(m.layer1(m.stem(data)))))

    def read(self, x: Tensor, data: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        features = self.module.attnpool(x)
        return x.flatten(2).mT, x.mean((2, 3)), features


class OpenClipViT(Adapter):
    """open_clip's own ViT: options that the native one lacks."""

    def run(self, data: Tensor) -> Tensor:
        return self.module.transformer(self.module._embeds(data))

    def read(self, x: Tensor, data: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        pooled, tokens = self.module._pool(x)
        return tokens if tokens.dim() == 3 else None, pooled, pooled if self.module.proj is None else pooled @ self.module.proj


class OpenClipText(Adapter):
    """open_clip's own text Transformer. Attention over padding, hence never trimmed."""

    words = True
    context_length: int

    def run(self, data: Tensor) -> Tensor:
        x, mask = self.module._embeds(data)
        # a mask slice: open_clip's is built for the whole context
        return self.module.transformer(x, attn_mask=mask if mask is None or mask.dim() == 3 else mask[: x.shape[1], : x.shape[1]])

    def read(self, x: Tensor, data: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        m = self.module
        if m.cls_emb is not None:
            tokens, pooled = x[:, :-1], m.ln_final(x[:, -1])
        else:
            tokens = m.ln_final(x)
            pooled = text_global_pool(tokens, data, m.pool_type, eos_token_id=m.eos_id)
        projection: Any = m.text_projection
        if projection is None:
            return tokens, pooled, pooled
        return tokens, pooled, projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection


class OpenClipHFText(Adapter):
    """open_clip's wrapper of a transformers text encoder. The network runs in `read`: its pooler needs more than the tokens."""

    words = True
    context_length: int

    def __init__(self, module: HFTextEncoder, embed_dim: int):
        config: Any = module.config  # each of transformers' has attributes of its own
        super().__init__(module, config.hidden_size, embed_dim)
        self.mergeable = False

    def run(self, data: Tensor) -> Tensor:
        return data

    def read(self, x: Tensor, data: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        valid = (data != self.module.config.pad_token_id).long()
        out = self.module.transformer(input_ids=data, attention_mask=valid)
        pooled = self.module.pooler(out, valid)
        return out.last_hidden_state, pooled, self.module.proj(pooled)


def from_open_clip(part: str, cfg: dict) -> Adapter:
    """The adapter of one part ("vision_cfg" or "text_cfg") of an open_clip config, weights drawn as open_clip draws them."""
    quick_gelu, embed_dim, given = cfg.get("quick_gelu", False), cfg["embed_dim"], cfg[part]
    if part == "text_cfg":
        text: Any = _build_text_tower(embed_dim, given, quick_gelu)
        if isinstance(text, HFTextEncoder):
            words: OpenClipHFText | OpenClipText = OpenClipHFText(text, embed_dim)
        else:
            words = OpenClipText(text, text.width, embed_dim)
        words.context_length = text.context_length
        return words
    module: Any = _build_vision_tower(embed_dim, given, quick_gelu)
    if isinstance(module, TimmModel):
        trunk: Any = module.trunk
        native = trunk.default_cfg.get("input_size", (3, 224, 224))[1:]
        size: Any = module.image_size
        if tuple(native) != tuple(size):
            module.set_input_size(size)
        return TimmTower(module, embed_dim)
    if isinstance(module, ModifiedResNet):
        return ResNetTower(module, given["width"] * 32, embed_dim)
    pools = given.get("attentional_pool")  # whose tokens are in the joint space, and no longer patches
    tower = OpenClipViT(module, embed_dim if pools else given["width"], embed_dim)
    tower.patch_size = None if pools else module.patch_size[0]
    return tower


def timm_config(name: str) -> tuple[dict, dict, str, bool]:
    """`timm:NAME` as an open_clip config of an image tower alone, with timm's own pooling and preprocessing."""
    import timm

    if not name.startswith("hf-hub:") and not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), 3)
        raise ModelError(f"unknown timm model {name!r}" + (f" (did you mean {', '.join(near)}?)" if near else ""))
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    size = known.input_size[1] if known else 224
    vision = {"timm_model_name": name, "image_size": size, "timm_pool": "", "timm_proj": "linear"}
    preprocess = {"mean": list(known.mean), "std": list(known.std), "interpolation": known.interpolation} if known else {}
    return {"embed_dim": 512, "vision_cfg": vision}, preprocess, "clip", False
