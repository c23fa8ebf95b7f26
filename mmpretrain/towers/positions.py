"""Position embeddings of another image size or context length: which tensors they are, and how each kind is resized."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Parameters that say where a token is, or that stand for a token of no position of its own (class, distillation, register and mask tokens).
POSITIONAL = re.compile(
    r"(?:^|[._])(?:pos(?:ition)?(?:al)?_?emb\w*|pos_block|position_bias|rel_pos\w*|relative_position_\w+|relative_attention_bias|"
    r"attention_biases|cpb_mlp|cls_token|class_token|class_embedding|cls_emb|reg_token|reg_tokens|register_tokens|dist_token|"
    r"distillation_token|storage_tokens|mask_token|mask_embedding)(?:$|\.)"
)
_ABSOLUTE = re.compile(r"(?:^|[._])pos(?:ition)?(?:al)?_?emb\w*(?:\.weight)?$")


def resize_positions(state: dict[str, Tensor], own: Mapping[str, Tensor], towers: nn.Module) -> list[str]:
    """Resize in place the position embeddings of `state` to the shapes in `own`.

    Grids are interpolated bicubically as open_clip and timm do when they load, sequences linearly. Buffers that follow from the image
    size alone (an attention mask, an index of relative positions) are replaced by `own`'s. What is of another kind stays as it is.

    Args:
        state: a checkpoint's tensors by name, `visual.*` and `text.*`.
        own: the tensors of the model that they are for.
        towers: that model, whose buffers are looked up by name.

    Returns:
        A message for each tensor that was resized.
    """
    constant = {name for name, _ in towers.named_buffers() if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    constant |= {name.replace(".module.", ".", 1) for name in constant}  # an adapter's state has its module's own names
    last_token = getattr(getattr(getattr(towers, "text", None), "module", None), "cls_emb", None) is not None
    messages = []
    for key, value in state.items():
        if key not in own or value.shape == own[key].shape:
            continue
        shape = tuple(own[key].shape)
        if key in constant:
            state[key] = own[key].detach().clone()
            continue
        if key == "text.positional_embedding":
            resized = _sequence(value, shape, 1 if last_token else 0)
        else:
            resized = _resized(key, value, shape) if key.startswith("visual.") else None
        if resized is not None:
            messages.append(f"{key} is resized from {list(value.shape)} to {list(shape)}")
            state[key] = resized
    return messages


def _resized(key: str, value: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """One position embedding of an image tower in another shape; None where it is not of a kind known here."""
    name = key.rsplit(".", 1)[-1]
    if value.dim() != len(shape):
        return None
    if name == "relative_position_bias_table":
        return _table(value, shape)
    if name in ("rel_pos_h", "rel_pos_w"):  # [2S-1,D]
        return _sequence(value, shape, 0)
    if name == "attention_biases" and value.dim() == 2:  # [heads, offsets down x across]
        sides = [math.isqrt(n) for n in (value.shape[1], shape[1])]
        if value.shape[0] != shape[0] or [s * s for s in sides] != [value.shape[1], shape[1]]:
            return None
        return _grid(value.view(1, -1, sides[0], sides[0]), (sides[1], sides[1])).view(shape)
    if not _ABSOLUTE.search(key):
        return None
    if value.dim() == 4 and value.shape[-1] == shape[-1]:  # [1,H,W,D]
        return _grid(value.permute(0, 3, 1, 2), shape[1:3]).permute(0, 2, 3, 1).contiguous()
    if value.dim() == 4 and value.shape[1] == shape[1]:  # [1,D,H,W]
        return _grid(value, shape[2:])
    if value.dim() in (2, 3) and value.shape[-1] == shape[-1] and value.shape[:-2] == shape[:-2]:  # [...,P+N,D]
        return _tokens(value, shape)
    return None


def _tokens(value: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """[...,P+N,D] -> `shape`, both grids square: the first P are those of tokens without a place, and stay."""
    old, new = value.shape[-2], shape[-2]
    for prefix in range(min(old, new, 9)):
        sides = [math.isqrt(n - prefix) for n in (old, new)]
        if [side * side + prefix for side in sides] == [old, new] and min(sides) > 0:
            rows = value.reshape(-1, old, value.shape[-1])
            grid = rows[:, prefix:].mT.reshape(len(rows), -1, sides[0], sides[0])
            resized = _grid(grid, (sides[1], sides[1])).flatten(2).mT
            return torch.cat([rows[:, :prefix], resized], dim=1).reshape(shape)
    return None


def _grid(value: Tensor, size: tuple[int, ...]) -> Tensor:
    """[B,D,h,w] -> [B,D,*size]: bicubic, antialiased, as open_clip and timm resize on loading."""
    return F.interpolate(value.float(), size=size, mode="bicubic", antialias=True, align_corners=False).to(value.dtype)


def _sequence(value: Tensor, shape: tuple[int, ...], last: int) -> Tensor | None:
    """[L,D] -> [L',D], linearly; the `last` rows are of tokens without a place, and stay."""
    if value.shape[1] != shape[1]:
        return None
    places = value[: len(value) - last].float().mT[None]
    resized = F.interpolate(places, size=shape[0] - last, mode="linear")[0].mT.to(value.dtype)
    return torch.cat([resized, value[len(value) - last :]])


def _table(value: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """A table of relative positions, [(2S-1)^2 + extra, heads] or [heads, 2S-1, 2S-1], for another window S, as timm resizes it."""
    from timm.layers import resize_rel_pos_bias_table

    if value.dim() == 3:
        window = (shape[1] + 1) // 2, (shape[2] + 1) // 2
        return resize_rel_pos_bias_table(value, window, shape) if value.shape[0] == shape[0] else None
    for extra in (0, 3):  # BEiT's class token has three of its own
        sides = [math.isqrt(n - extra) for n in (len(value), shape[0])]
        if [side * side + extra for side in sides] == [len(value), shape[0]] and value.shape[1] == shape[1]:
            window = (sides[1] + 1) // 2
            return resize_rel_pos_bias_table(value, (window, window), shape)
    return None
