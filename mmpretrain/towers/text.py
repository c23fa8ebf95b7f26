"""The native text Transformer: open_clip's parameter names, with trimming, mask embeddings and bidirectional encoding."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmpretrain.errors import ModelError
from mmpretrain.towers.base import Tokens, Tower
from mmpretrain.towers.transformer import LayerNorm, Transformer, compute_dtype, take
from mmpretrain.types import Encoded


class TextTransformer(Tower):
    """The causal text tower of CLIP, with the parameters of open_clip's TextTransformer.

    The pooled position is that of the highest id (`argmax`: EOT in CLIP's vocabulary), of the first `eos_id`, or the
    first or last one. It is found from ids in which a masked word is -1, which is never taken for EOT.

    Source: Radford et al. 2021, section 2.4.
    """

    def __init__(
        self,
        embed_dim: int,
        context_length: int = 77,
        vocab_size: int = 49408,
        width: int = 512,
        heads: int = 8,
        layers: int = 12,
        mlp_ratio: float = 4.0,
        ls_init_value: float | None = None,
        pad_id: int = 0,
        eos_id: int = 2,
        no_causal_mask: bool = False,
        pool_type: str = "argmax",
        proj_bias: bool = False,
        proj_type: str = "linear",
        quick_gelu: bool = False,
        act_kwargs: dict | None = None,
        norm_kwargs: dict | None = None,
    ):
        super().__init__()
        norm = norm_kwargs or {}
        self.width, self.context_length, self.vocab_size = width, context_length, vocab_size
        self.pad_id, self.eos_id, self.pool_type, self.causal = pad_id, eos_id, pool_type, not no_causal_mask
        self.trimmable = self.causal and pool_type in ("argmax", "eos", "first")
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        block = {"mlp_ratio": mlp_ratio, "ls_init_value": ls_init_value, "quick_gelu": quick_gelu, "act": act_kwargs or {}, "norm": norm}
        self.transformer = Transformer(width, layers, heads, **block)
        self.ln_final = LayerNorm(width, **norm)
        self.embed_dim = width if proj_type == "none" else embed_dim
        self.text_projection: nn.Linear | nn.Parameter | None = None
        if proj_type != "none":
            self.text_projection = nn.Linear(width, embed_dim) if proj_bias else nn.Parameter(torch.empty(width, embed_dim))
        self.init_parameters()

    def init_parameters(self) -> None:
        """Draw CLIP's initial weights, in open_clip's order."""
        width, blocks = self.width, self.transformer.blocks
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        out_std = width**-0.5 * (2 * len(blocks)) ** -0.5
        for block in blocks:
            nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(block.attn.out_proj.weight, std=out_std)
            mlp: Any = block.mlp  # nn.Sequential does not type its named parts
            nn.init.normal_(mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(mlp.c_proj.weight, std=out_std)
        if isinstance(self.text_projection, nn.Linear):
            nn.init.normal_(self.text_projection.weight, std=width**-0.5)
            nn.init.zeros_(self.text_projection.bias)
        elif self.text_projection is not None:
            nn.init.normal_(self.text_projection, std=width**-0.5)

    def _positions(self, ids: Tensor) -> Tensor:
        """Return the pooled position of each row, int64 [B]."""
        if self.pool_type == "argmax":
            return ids.argmax(1)
        if self.pool_type == "eos":
            return (ids == self.eos_id).int().argmax(1)
        return torch.full((len(ids),), 0 if self.pool_type == "first" else ids.shape[1] - 1, device=ids.device)

    def embed(
        self,
        data: Tensor,
        hidden: Tensor | None = None,
        mode: Literal["replace", "drop"] = "replace",
        bidirectional: bool = False,
    ) -> Tokens:
        if data.shape[1] > self.context_length:
            raise ModelError(f"text of {data.shape[1]} tokens for a tower of context_length {self.context_length}: tokenize to that")
        if hidden is not None and mode == "drop":
            raise ModelError("words cannot be dropped from a text tower: use a mask of mode 'replace'")
        dtype = compute_dtype(self.token_embedding.weight, self.token_embedding.weight)
        pool_index = self._positions(data)
        masked = None
        if self.mask_embedding is not None:
            masked = data < 0 if hidden is None else (data < 0) | hidden
        elif hidden is not None or (not data.is_cuda and bool((data < 0).any())):
            raise ModelError("masked words need a mask embedding: call add_mask_embedding() once the tower is built")
        x = self.token_embedding(data.clamp(min=0)).to(dtype)
        if masked is not None and self.mask_embedding is not None:
            x = torch.where(masked[..., None], self.mask_embedding.to(dtype), x)
        x = x + self.positional_embedding[: data.shape[1]].to(dtype)
        valid = None
        if bidirectional:
            if self.pool_type in ("argmax", "eos"):
                valid = torch.arange(data.shape[1], device=data.device) <= pool_index[:, None]
            else:
                valid = data != self.pad_id
        return Tokens(x, self.causal and not bidirectional, valid, pool_index, hidden=hidden)

    def trunk(self, tokens: Tokens, attention: bool = False, pooled_only: bool = False) -> tuple[Tensor, Tensor | None]:
        return self.transformer(tokens, attention, pooled_only)

    def readout(self, x: Tensor, tokens: Tokens, outputs: frozenset[str], attention: Tensor | None = None) -> Encoded:
        words = features = pooled = None
        if "tokens" in outputs:
            words = x = self.ln_final(x)
        if outputs & {"features", "pooled"}:
            pooled = x[:, 0] if x.shape[1] == 1 else take(x, tokens.pool_index)[:, 0]
            pooled = pooled if "tokens" in outputs else self.ln_final(pooled)
            features = pooled
            if isinstance(self.text_projection, nn.Linear):
                features = self.text_projection(pooled)
            elif self.text_projection is not None:
                features = pooled @ self.text_projection
        return Encoded(
            features if "features" in outputs else None, pooled if "pooled" in outputs else None, words, attention, tokens.hidden
        )

    def add_mask_embedding(self) -> None:
        if self.mask_embedding is None:
            self.mask_embedding = nn.Parameter(torch.randn(self.width) * 0.02)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.transformer.grad_checkpointing = enable

    def compile_trunk(self) -> None:
        self.transformer.compile(dynamic=False)
