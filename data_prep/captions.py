"""Which language a caption is in, by py3langid (the optional extra `prep`)."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from typing import Any

from data_prep.records import InputError


def _library() -> Any:
    try:
        import py3langid
    except ImportError as error:
        raise InputError("--language needs py3langid: pip install 'mmpretrain-clip[prep]'") from error
    return py3langid


@cache
def known() -> frozenset[str]:
    """The ISO 639-1 codes it tells apart. Raises InputError where py3langid is missing."""
    return frozenset(str(code) for code, _ in _library().rank("words"))


def check(languages: tuple[str, ...]) -> None:
    """Raises InputError for a code that is none of `known`, or where py3langid is missing."""
    unknown = [language for language in languages if language not in known()]
    if unknown:
        raise InputError(f"--language {', '.join(unknown)}: expected codes among {' '.join(sorted(known()))}")


def language_of(text: str) -> str:
    """The likeliest language. A guess for a word or two: names and numbers have none."""
    return str(_library().classify(text)[0])


CONTEXT = 77  # tokens that CLIP's text tower reads, the two special ones among them


@lru_cache(1)
def _tokenizer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def num_tokens(text: str) -> int:
    """Tokens of CLIP's tokenizer, begin and end among them, before any cut.

    Byte pairs are merged in time quadratic in a word's length: from runs of more than 200 characters and texts of more than 8,192 what
    is beyond is not counted, which is far past what CLIP reads.
    """
    return len(_tokenizer().encode(re.sub(r"(\S{200})\S+", r"\1", text[:8192]))) + 2
