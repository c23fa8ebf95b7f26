"""What a caption is: its language, by py3langid (the optional extra `prep`), and its length in CLIP's tokens."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

from data_prep.records import InputError

MIN_LETTERS = 20  # of a caption whose language is guessed; shorter ones are too often taken for another's


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


@cache
def can_tell_languages() -> bool:
    """Is py3langid installed?"""
    return find_spec("py3langid") is not None


def language_of(text: str) -> str | None:
    """The likeliest language, an ISO 639-1 code; None for fewer than MIN_LETTERS letters. Raises InputError where py3langid is missing."""
    beginning = text[:400]
    if sum(character.isalpha() for character in beginning) < MIN_LETTERS:
        return None
    return str(_library().classify(beginning)[0])


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
