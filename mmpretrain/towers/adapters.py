"""Adapters that make towers of other libraries' modules: open_clip's own, and timm's through open_clip.

They compute features, pooled and tokens; token masks, mask embeddings and attention need the native towers.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIPTextCfg, _build_text_tower, _build_vision_tower
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from mmpretrain.config.build import hint
from mmpretrain.errors import ModelError
from mmpretrain.towers.base import Tokens, Tower, unmasked
from mmpretrain.towers.huggingface import HFTower, from_transformers
from mmpretrain.types import Encoded

__all__ = ["Adapter", "HFTower", "from_open_clip", "from_transformers", "timm_config"]


class Adapter(Tower):
    """Another library's module as a Tower. Its state dict has the module's own names, so that checkpoints are exchangeable."""

    words = False  # the input is ids rather than pixels
    module: Any  # another library's, without types

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
        """Compute the input of `read` from pixels or ids."""
        raise NotImplementedError

    def read(self, x: Tensor, data: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return tokens [B, N, D], pooled [B, D'] and features [B, E]."""
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
        listed = {name for name, _ in self.named_parameters() if any(name.endswith(f".{key}") or key in name for key in names)}
        return listed | super().no_weight_decay()


def _strip(module: nn.Module, state: dict, prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}module.")]:
        state[prefix + key.removeprefix(f"{prefix}module.")] = state.pop(key)


def _add(module: nn.Module, state: dict, prefix: str, *rest: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        state[f"{prefix}module.{key.removeprefix(prefix)}"] = state.pop(key)


class TimmTower(Adapter):
    """timm's trunk with open_clip's projection head."""

    branches = False  # whether the trunk gives several feature maps, of which `run` then keeps what its head pools of them

    def __init__(self, module: TimmModel, embed_dim: int):
        trunk: Any = module.trunk  # timm's, whose attributes no type states
        width = getattr(trunk, "head_hidden_size", None) or trunk.num_features  # MobileNetV3 and its like widen behind their pooling
        if width != trunk.num_features:
            _widen_projection(module.head, trunk.num_features, width)
        super().__init__(module, width, embed_dim)
        embed = getattr(trunk, "patch_embed", None)
        patch = getattr(embed, "patch_size", None)
        hybrid = hasattr(embed, "backbone")  # whose patches are of feature maps
        if patch and getattr(trunk, "num_prefix_tokens", None) is not None and not hybrid:
            self.patch_size = patch if isinstance(patch, int) else patch[0]

    def run(self, data: Tensor) -> Tensor:
        x = self.module.trunk.forward_features(data)
        self.branches = not isinstance(x, Tensor)  # CrossViT, CoaT, EfficientViM: several feature maps, which have no common tokens
        return self.module.trunk.forward_head(x) if self.branches else x

    def read(self, x: Tensor, data: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        trunk = self.module.trunk
        if self.branches:
            return None, x, self.module.head(x)
        if x.dim() == 4:
            tokens = x.flatten(1, 2) if getattr(trunk, "output_fmt", "") == "NHWC" else x.flatten(2).mT
        else:
            prefix = getattr(trunk, "num_prefix_tokens", None)
            if prefix is None and hasattr(trunk, "cls_token"):  # VOLO and XCiT do not say whether the class token is in it
                prefix = int(math.isqrt(x.shape[1]) ** 2 != x.shape[1])
            tokens = x[:, prefix or 0 :]
        pooled = trunk.forward_head(x)
        features = self.module.head(pooled)
        if pooled.dim() == 4:  # timm_pool abs_attn and rot_attn: the head pools
            pooled = pooled.mean((1, 2) if getattr(trunk, "output_fmt", "") == "NHWC" else (2, 3))
        return tokens, pooled, features

    def layer_ids(self) -> dict[str, int]:
        from timm.models import group_parameters

        depth: Any = group_parameters(self.module.trunk, self.module.trunk.group_matcher(), reverse=True)
        last = max(depth.values(), default=0) + 1
        return {name: depth.get(name.removeprefix("module.trunk."), last) for name, _ in self.named_parameters()}


def _widen_projection(head: nn.Module, narrow: int, width: int) -> None:
    """Replace the first linear map of a projection head that open_clip made for `narrow` features, where the trunk gives `width`."""
    for name, layer in head.named_modules():
        if isinstance(layer, nn.Linear) and layer.in_features == narrow:
            fitting = nn.Linear(width, layer.out_features, layer.bias is not None, device=layer.weight.device)
            head.set_submodule(name, fitting)
            return


class ResNetTower(Adapter):
    """CLIP's ResNet with attention pooling."""

    def run(self, data: Tensor) -> Tensor:
        m = self.module
        return m.layer4(m.layer3(m.layer2(m.layer1(m.stem(data)))))

    def read(self, x: Tensor, data: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        features = self.module.attnpool(x)
        return x.flatten(2).mT, x.mean((2, 3)), features


class OpenClipViT(Adapter):
    """open_clip's own ViT, for options that the native one lacks."""

    def run(self, data: Tensor) -> Tensor:
        return self.module.transformer(self.module._embeds(data))

    def read(self, x: Tensor, data: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        pooled, tokens = self.module._pool(x)
        return tokens if tokens.dim() == 3 else None, pooled, pooled if self.module.proj is None else pooled @ self.module.proj


class OpenClipText(Adapter):
    """open_clip's own text Transformer. It attends to padding, so captions are never trimmed."""

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
    """open_clip's wrapper of a transformers text encoder. The network runs in `read`, since its pooler needs all its outputs."""

    words = True
    context_length: int

    def __init__(self, module: HFTextEncoder, embed_dim: int):
        config: Any = module.config  # transformers', whose attributes depend on the model
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
    """Build the adapter of one part of an open_clip config, with the initial weights of open_clip.

    Args:
        part: "vision_cfg" or "text_cfg".
        cfg: the config.
    """
    quick_gelu, embed_dim, given = cfg.get("quick_gelu", False), cfg["embed_dim"], cfg[part]
    if part == "text_cfg":
        text: Any = _build_text_tower(embed_dim, given, quick_gelu)
        if isinstance(text, HFTextEncoder):
            words: OpenClipHFText | OpenClipText = OpenClipHFText(text, embed_dim)
        else:
            words = OpenClipText(text, text.width, embed_dim)
        # of a transformers model the length that open_clip's tokenizer pads to, rather than the longest that it could take
        length = given.get("context_length", CLIPTextCfg.context_length) if isinstance(text, HFTextEncoder) else text.context_length
        words.context_length = min(length, text.context_length or length)
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
    pools = given.get("attentional_pool")  # its tokens are in the joint space, and do not correspond to patches
    tower = OpenClipViT(module, embed_dim if pools else given["width"], embed_dim)
    tower.patch_size = None if pools else module.patch_size[0]
    return tower


def timm_config(name: str) -> tuple[dict, dict, str, bool]:
    """Return `timm:NAME` as an open_clip config of an image tower alone, with timm's own pooling and preprocessing.

    Returns:
        (model_cfg, preprocess_cfg, tokenizer, False).

    Raises:
        ModelError: timm has no such model.
    """
    import timm

    if not name.startswith("hf-hub:") and not timm.is_model(name):
        raise ModelError(f"unknown timm model {name!r}{hint(name.split('.')[0], timm.list_models(), 3)}")
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    size = known.input_size[1] if known else 224
    vision = {"timm_model_name": name, "image_size": size, "timm_pool": "", "timm_proj": "linear"}
    preprocess = {"mean": list(known.mean), "std": list(known.std), "interpolation": known.interpolation} if known else {}
    return {"embed_dim": 512, "vision_cfg": vision}, preprocess, "clip", False
