"""What every tower offers: embed -> trunk -> readout, so that encodes of one network can share one trunk forward."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmpretrain.errors import ModelError
from mmpretrain.types import OUTPUTS, Encoded

_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks|layers|layer|stages|h)\.(\d+)\.")
_EMBEDDING = re.compile(r"embed|conv1|(?:^|\.)(?:cls|pos|stem|ln_pre|pre_layrnorm|bn1|class)")


class Tokens(NamedTuple):
    """A view ready for the trunk. L = what the trunk sees: class token and visible patches, or words."""

    x: Tensor  # [B,L,D]; raw pixels [B,3,H,W] or ids [B,L] for towers that cannot be split
    causal: bool = False
    valid: Tensor | None = None  # bool [B,L], keys that may be attended; None = all
    pool_at: Tensor | None = None  # int64 [B]: the position that is pooled; None = the first (class) token
    grid: tuple[int, int] | None = None  # patches down, across
    hidden: Tensor | None = None  # bool [B,N]


def merge(parts: Sequence[Tokens]) -> Tokens:
    """Concatenate tokens of equal `merge_key` along the batch. `grid` and `hidden` stay with the parts: readout wants those."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    valid = None if first.valid is None else torch.cat([p.valid for p in parts])  # type: ignore[misc]
    pool_at = None if first.pool_at is None else torch.cat([p.pool_at for p in parts])  # type: ignore[misc]
    return Tokens(torch.cat([p.x for p in parts]), first.causal, valid, pool_at)


def unmasked(module: nn.Module, data: Tensor, hidden: Tensor | None, bidirectional: bool) -> Tokens:
    """Data as another library's module takes it; ValueError where token masks or another attention mask are asked of it."""
    what = f"{type(module).__name__} of another library"
    negative = not data.is_floating_point() and not data.is_cuda and bool((data < 0).any())
    if hidden is not None or negative:
        raise ModelError(f"{what} cannot mask tokens: masked objectives need a native tower (a plain ViT or CLIP text config)")
    if bidirectional:
        raise ModelError(f"{what} cannot change its attention mask: bidirectional encodes need a native text tower")
    return Tokens(data)


class Tower(nn.Module):
    """An encoder of one modality.

    `forward` is embed, trunk and readout in a row. The trainer calls them apart: it embeds every view, concatenates those with
    equal `merge_key`, runs the trunk once and reads each part out, computing only the outputs wanted.
    """

    width: int  # D
    embed_dim: int  # E
    mergeable: bool = True  # False with BatchNorm: its statistics would couple views
    one_position: bool = True  # features are read at one position: where nobody wants tokens, the last block computes that one alone
    trimmable: bool = False  # text: padding after the first EOT never changes the features
    patch_size: int | None = None  # pixels a side; None: not a patch tower, so no token masks
    mask_embedding: nn.Parameter | None  # [D], what stands where a token is hidden; see `add_mask_embedding`

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("mask_embedding", None)

    def embed(
        self,
        data: Tensor,
        hidden: Tensor | None = None,
        mode: Literal["replace", "drop"] = "replace",
        bidirectional: bool = False,
    ) -> Tokens:
        """Pixels [B,3,H,W] or ids [B,L] -> Tokens.

        `hidden` (bool [B,N]) are the tokens to replace by the mask embedding or to drop; every row drops the same number.
        Text: id -1 is replaced by the mask embedding too; `bidirectional` swaps the causal mask for key padding.
        Raises ValueError where the tower cannot do what is asked.
        """
        raise NotImplementedError

    def trunk(self, tokens: Tokens, attention: bool = False, pooled_only: bool = False) -> tuple[Tensor, Tensor | None]:
        """-> x after the blocks, and if `attention` the pooled token's attention [B,N] in the last block (detached).

        `pooled_only` lets the last block compute the pooled position alone, x [B,1,D]: same features, tokens not available.
        """
        raise NotImplementedError

    def readout(self, x: Tensor, tokens: Tokens, outputs: frozenset[str], attention: Tensor | None = None) -> Encoded:
        """The fields of Encoded named in `outputs`; mask and grid always."""
        raise NotImplementedError

    def merge_key(self, tokens: Tokens) -> Hashable:
        """Tokens with equal keys may be concatenated before the trunk; towers with BatchNorm never share a key."""
        return (tokens.x.shape[1:], tokens.causal, tokens.valid is None) if self.mergeable else object()

    def forward(
        self,
        data: Tensor,
        hidden: Tensor | None = None,
        mode: Literal["replace", "drop"] = "replace",
        bidirectional: bool = False,
        outputs: frozenset[str] = frozenset({"features"}),
    ) -> Encoded:
        """One view through the whole tower."""
        if unknown := outputs - OUTPUTS:
            raise ModelError(f"unknown outputs {sorted(unknown)}: a tower computes {sorted(OUTPUTS)}")
        tokens = self.embed(data, hidden, mode, bidirectional)
        x, attention = self.trunk(tokens, "attention" in outputs, "tokens" not in outputs)
        return self.readout(x, tokens, outputs, attention)

    def add_mask_embedding(self) -> None:
        """Give the tower a learned stand-in for hidden tokens (BERT, BEiT, iBOT); a tower that hides none has none.

        Raises ValueError where the tower cannot hide tokens.
        """
        raise ModelError(
            f"{type(self).__name__} of another library cannot mask tokens: masked objectives need a native tower "
            "(a plain ViT or CLIP text config)"
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass: less memory, about a third more compute."""
        raise ModelError(f"{type(self).__name__} cannot checkpoint activations: take a tower that can, or leave the option off")

    def compile_trunk(self) -> None:
        """torch.compile the blocks in place, for fixed shapes. A deep copy of the tower is not compiled."""
        raise ModelError(f"{type(self).__name__} has no trunk to compile: set compile=false, or take a native tower (a plain ViT)")

    def no_weight_decay(self) -> set[str]:
        """Parameters, beside those of one dimension, that should not decay."""
        return set()

    def layer_ids(self) -> dict[str, int]:
        """Parameter name -> depth for layer-wise decay: embeddings 0, block i at i + 1, what follows the blocks at the end."""
        names = [name for name, _ in self.named_parameters()]
        depth = {name: int(found[1]) + 1 for name in names if (found := _BLOCK.search(name))}
        last = max(depth.values(), default=0) + 1
        return {name: depth.get(name, 0 if _EMBEDDING.search(name) else last) for name in names}
