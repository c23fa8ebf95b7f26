"""The interface of towers: embed -> trunk -> readout, so that encodes of one network can share a pass through the trunk."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mmpretrain.errors import ModelError
from mmpretrain.towers.positions import POSITIONAL
from mmpretrain.types import OUTPUTS, Encoded

_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks|layers|layer|stages|h)\.(\d+)\.")
_EMBEDDING = re.compile(r"embed|conv1|(?:^|\.)(?:cls|pos|stem|ln_pre|pre_layrnorm|bn1|class)")


class Tokens(NamedTuple):
    """A view ready for the trunk. L: positions of the trunk, which are class token and visible patches, or words."""

    x: Tensor  # [B,L,D]; raw pixels [B,3,H,W] or ids [B,L] for towers that cannot be split
    causal: bool = False
    valid: Tensor | None = None  # bool [B,L], keys that may be attended; None = all
    pool_index: Tensor | None = None  # int64 [B]: the position that is pooled; None = the first (class) token
    grid: tuple[int, int] | None = None  # patches down, across
    hidden: Tensor | None = None  # bool [B,N]


def merge(parts: Sequence[Tokens]) -> Tokens:
    """Concatenate tokens of equal `merge_key` along the batch. `grid` and `hidden` stay with the parts, for readout."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    valid = None if first.valid is None else torch.cat([p.valid for p in parts])  # type: ignore[misc]
    pool_index = None if first.pool_index is None else torch.cat([p.pool_index for p in parts])  # type: ignore[misc]
    return Tokens(torch.cat([p.x for p in parts]), first.causal, valid, pool_index)


def unmasked(module: nn.Module, data: Tensor, hidden: Tensor | None, bidirectional: bool) -> Tokens:
    """Wrap the input of another library's module as Tokens.

    Raises:
        ModelError: a token mask or another attention mask was requested.
    """
    what = f"{type(module).__name__} of another library"
    negative = not data.is_floating_point() and not data.is_cuda and bool((data < 0).any())
    if hidden is not None or negative:
        raise ModelError(f"{what} cannot mask tokens: masked objectives need a native tower (a plain ViT or CLIP text config)")
    if bidirectional:
        raise ModelError(f"{what} cannot change its attention mask: bidirectional encodes need a native text tower")
    return Tokens(data)


class Tower(nn.Module):
    """An encoder of one modality.

    `forward` is embed, trunk and readout in sequence. The trainer calls them separately: it embeds every view,
    concatenates those with equal `merge_key`, runs the trunk once, and reads out each part, computing only the
    requested outputs.
    """

    width: int  # D
    embed_dim: int  # E
    mergeable: bool = True  # False with BatchNorm: its statistics would couple views
    one_position: bool = True  # features are read at one position: without tokens, the last block computes that one alone
    trimmable: bool = False  # text: padding after the first EOT never changes the features
    patch_size: int | None = None  # pixels a side; None: not a patch tower, so no token masks
    mask_embedding: nn.Parameter | None  # [D], takes the place of hidden tokens; see `add_mask_embedding`

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
        """Embed pixels [B, 3, H, W] or ids [B, L].

        Args:
            data: pixels or ids; id -1 is replaced by the mask embedding.
            hidden: bool [B, N], the tokens to hide.
            mode: replace hidden tokens by the mask embedding, or drop them; every row drops the same number.
            bidirectional: text: replace the causal mask by key padding.

        Raises:
            ModelError: the tower does not support the request.
        """
        raise NotImplementedError

    def trunk(self, tokens: Tokens, attention: bool = False, pooled_only: bool = False) -> tuple[Tensor, Tensor | None]:
        """Apply the blocks.

        Args:
            tokens: from `embed`, possibly merged.
            attention: also return attention.
            pooled_only: let the last block compute the pooled position alone: the same features, without tokens.

        Returns:
            (x [B, L, D], or [B, 1, D] with `pooled_only`; attention [B, N] of the pooled token in the last block,
            detached, or None).
        """
        raise NotImplementedError

    def readout(self, x: Tensor, tokens: Tokens, outputs: frozenset[str], attention: Tensor | None = None) -> Encoded:
        """Compute the fields of Encoded named in `outputs`; mask and grid are always set.

        Args:
            x: from `trunk`, of this view.
            tokens: from `embed`, of this view.
            outputs: a subset of OUTPUTS.
            attention: from `trunk`, of this view.
        """
        raise NotImplementedError

    def merge_key(self, tokens: Tokens) -> Hashable:
        """Return a key: tokens with equal keys may be concatenated before the trunk."""
        return (tokens.x.shape[1:], tokens.causal, tokens.valid is None) if self.mergeable else object()

    def forward(
        self,
        data: Tensor,
        hidden: Tensor | None = None,
        mode: Literal["replace", "drop"] = "replace",
        bidirectional: bool = False,
        outputs: frozenset[str] = frozenset({"features"}),
    ) -> Encoded:
        """Encode one view. Arguments are those of `embed` and `readout`."""
        if unknown := outputs - OUTPUTS:
            raise ModelError(f"unknown outputs {sorted(unknown)}: a tower computes {sorted(OUTPUTS)}")
        tokens = self.embed(data, hidden, mode, bidirectional)
        x, attention = self.trunk(tokens, "attention" in outputs, "tokens" not in outputs)
        return self.readout(x, tokens, outputs, attention)

    def add_mask_embedding(self) -> None:
        """Add the learned embedding that replaces hidden tokens (BERT, BEiT, iBOT), if the tower has none.

        Raises:
            ModelError: the tower cannot hide tokens.
        """
        raise ModelError(
            f"{type(self).__name__} of another library cannot mask tokens: masked objectives need a native tower "
            "(a plain ViT or CLIP text config)"
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass: less memory, about a third more compute.

        Raises:
            ModelError: the tower does not support it.
        """
        raise ModelError(f"{type(self).__name__} cannot checkpoint activations: take a tower that can, or leave the option off")

    def compile_trunk(self) -> None:
        """Compile the blocks in place with torch.compile, for fixed shapes. A deep copy of the tower is not compiled.

        Raises:
            ModelError: the tower does not support it.
        """
        raise ModelError(f"{type(self).__name__} has no trunk to compile: set compile=false, or take a native tower (a plain ViT)")

    def no_weight_decay(self) -> set[str]:
        """Parameters, beside those of one dimension, that should not decay: those of positions, and tokens that no input makes."""
        return {name for name, _ in self.named_parameters() if POSITIONAL.search(name)}

    def layer_ids(self) -> dict[str, int]:
        """Return parameter name -> depth for layer-wise decay: embeddings 0, block i at i + 1, the rest last."""
        names = [name for name, _ in self.named_parameters()]
        depth = {name: int(match[1]) + 1 for name in names if (match := _BLOCK.search(name))}
        last = max(depth.values(), default=0) + 1
        return {name: depth.get(name, 0 if _EMBEDDING.search(name) else last) for name in names}
