"""Language of captions, by py3langid (the optional extra `prep`), and their length in CLIP tokens."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

from data_prep.records import InputError

MIN_LETTERS = 20  # captions with fewer letters are too often assigned to the wrong language


def _library() -> Any:
    try:
        import py3langid
    except ImportError as error:
        raise InputError("--language needs py3langid: pip install 'mmpretrain-clip[prep]'") from error
    return py3langid


@cache
def known() -> frozenset[str]:
    """Returns the ISO 639-1 codes that py3langid distinguishes. Raises InputError where it is missing."""
    return frozenset(str(code) for code, _ in _library().rank("words"))


def check(languages: tuple[str, ...]) -> None:
    """Raises InputError for a code that is not among `known()`, or where py3langid is missing."""
    unknown = [language for language in languages if language not in known()]
    if unknown:
        raise InputError(f"--language {', '.join(unknown)}: expected codes among {' '.join(sorted(known()))}")


@cache
def can_tell_languages() -> bool:
    """Returns whether py3langid is installed."""
    return find_spec("py3langid") is not None


def language_of(text: str) -> str | None:
    """Detects the most likely language of a text.

    Returns an ISO 639-1 code, or None for fewer than MIN_LETTERS letters. Raises InputError where py3langid is missing.
    """
    beginning = text[:400]
    if sum(character.isalpha() for character in beginning) < MIN_LETTERS:
        return None
    return str(_library().classify(beginning)[0])


CONTEXT = 77  # tokens that CLIP's text tower reads, including the two special ones


@lru_cache(1)
def _tokenizer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def num_tokens(text: str) -> int:
    """Counts the tokens of CLIP's tokenizer, including begin and end, before truncation.

    Byte pairs are merged in time quadratic in the length of a word. Characters beyond the first 200 of a word or the
    first 8,192 of the text are therefore not counted; CLIP reads far fewer.
    """
    return len(_tokenizer().encode(re.sub(r"(\S{200})\S+", r"\1", text[:8192]))) + 2
