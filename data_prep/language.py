"""Which language a caption is in, by py3langid (the optional extra `prep`)."""

from __future__ import annotations

from functools import cache
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
