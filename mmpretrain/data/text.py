"""Tokenizers behind one interface, and trimming of a padded batch to its longest caption."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from mmpretrain.system import lock_across_forks

MAX_WORDS = 1 << 16  # whose ids are cached
FIELDS = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")  # of a text_cfg, in open_clip's format
SPECIAL = ("<start_of_text>", "<end_of_text>")
_LOCK = lock_across_forks()
_TOKENIZERS: dict[str, Tokenizer] = {}


class Tokenizer:
    """A tokenizer, with the special ids that pooling and masking need."""

    def __init__(self, name: str, inner: Any, sot: int | None, eot: int | None, vocab_size: int) -> None:
        self.name = name
        self.sot, self.eot, self.vocab_size = sot, eot, vocab_size
        self._inner = inner

    def encode(self, texts: list[str], context_length: int = 77) -> Tensor:
        """Encode texts to int64 [n, context_length], padded; a longer text is cut, and ends with EOT where the tokenizer has one."""
        return self._inner(texts, context_length=context_length).long()

    def save(self, folder: str | Path) -> None:
        """Write the files that open_clip and transformers load it from; open_clip's own BPE has none, since every copy brings it."""
        if hasattr(self._inner, "save_pretrained"):
            self._inner.save_pretrained(str(folder))


def get_tokenizer(name: str = "clip") -> Tokenizer:
    """Return the tokenizer of a name, cached.

    Args:
        name: `clip`, open_clip's bundled BPE; an open_clip model's name; `local-dir:FOLDER`, a model folder with its tokenizer's files;
            a transformers tokenizer; or as JSON the fields of a text_cfg that name one, as `tokenizer_name` writes them.

    Raises:
        ValueError: there is no such tokenizer, or it does not take its options.
    """
    with _LOCK:  # loader threads call it at the same time
        if name not in _TOKENIZERS:
            _TOKENIZERS[name] = _build(name)
        return _TOKENIZERS[name]


def _build(name: str) -> Tokenizer:
    if name == "clip":
        inner = _clip()
        return Tokenizer(name, inner, inner.sot_token_id, inner.eot_token_id, inner.vocab_size)
    try:
        inner = _inner(name)
    except (OSError, TypeError, AssertionError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"tokenizer {name} cannot be loaded: {reason}") from error
    below: Any = getattr(inner, "tokenizer", inner)

    def first(*names: str) -> int | None:
        values = (getattr(below, attribute, None) for attribute in names)
        return next((value for value in values if value is not None), None)

    sot = first("sot_token_id", "bos_token_id", "cls_token_id")
    eot = first("eot_token_id", "eos_token_id", "sep_token_id")
    size = int(below.vocab_size)
    return Tokenizer(name, inner, sot, eot, max(size, len(below)) if hasattr(below, "__len__") else size)


def tokenizer_name(text_cfg: dict[str, Any]) -> str:
    """The name of the tokenizer that a text_cfg of open_clip's format describes, for `get_tokenizer`."""
    fields = {key: text_cfg[key] for key in FIELDS if text_cfg.get(key)}
    if not fields.keys() - {"tokenizer_mode"}:  # the mode is one of transformers tokenizers
        return "clip"
    return fields["hf_tokenizer_name"] if list(fields) == ["hf_tokenizer_name"] else json.dumps(fields, sort_keys=True)


def _inner(name: str) -> Any:
    """The tokenizer of open_clip's that a name stands for."""
    import open_clip
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    if name.startswith("{"):
        fields = json.loads(name)
        options = fields.get("tokenizer_kwargs", {})
        if "reduction_mask" in options:
            raise ValueError("its tokenizer_kwargs.reduction_mask drops tokens at random, which no seed of a run repeats: leave it out")
        if "hf_tokenizer_name" not in fields:
            return SimpleTokenizer(**options)
        return HFTokenizer(fields["hf_tokenizer_name"], tokenizer_mode=fields.get("tokenizer_mode"), **options)
    if not Path(name).is_dir() and (name in open_clip.list_models() or name.startswith(("local-dir:", "hf-hub:"))):
        return open_clip.get_tokenizer(name)
    return HFTokenizer(name)


def _clip() -> Any:
    """Build open_clip's BPE with the same ids, several times as fast on plain text, and with a bounded cache of words."""
    from open_clip.tokenizer import SimpleTokenizer

    class Clip(SimpleTokenizer):
        def __init__(self) -> None:
            super().__init__()
            self.word = functools.lru_cache(MAX_WORDS)(self.word)  # type: ignore[method-assign]

        def word(self, word: str) -> tuple[int, ...]:
            token = "".join(self.byte_encoder[b] for b in word.encode("utf-8"))
            ids = tuple(self.encoder[part] for part in self.bpe(token).split(" "))
            if token not in SPECIAL:
                self.cache.pop(token, None)  # it would keep every word
            return ids

        def encode(self, text: str) -> list[int]:
            # ftfy and HTML entities cannot change printable ASCII without an ampersand, and take most of the time.
            plain = text.isascii() and text.isprintable() and "&" not in text
            text = " ".join(text.split()).lower() if plain else self.clean_fn(text)
            return [number for word in self.pat.findall(text) for number in self.word(word)]

    return Clip()


def trim(ids: Tensor, eot: int | None) -> Tensor:
    """Cut ids, int64 [B, L], to the longest caption up to its first EOT.

    The length is rounded up to a multiple of 8, so that few lengths occur. Nothing is cut where a row has no EOT, or
    the tokenizer has none (`eot` None). For causal towers that pool at EOT the result is exact: later positions do not
    affect it.
    """
    if eot is None:
        return ids
    ended = ids == eot
    if not bool(ended.any(1).all()):
        return ids
    longest = int(ended.int().argmax(1).max()) + 1
    return ids[:, : min(ids.shape[1], -(-longest // 8) * 8)]
