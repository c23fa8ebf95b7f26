"""Words and script of captions."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache

# A word is a run of letters, digits and inner apostrophes; scripts written without spaces count character by character.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_SPACELESS}]|(?:(?![{_SPACELESS}])\w)+(?:['’](?:(?![{_SPACELESS}])\w)+)*")

_ENGLISH = """a an and are as at be but by for from had has have he her his i in into is it its no not of off on or our out over she so than
that the their them then there these they this to up was we were what when which who will with you your"""
STOP_WORDS = frozenset(_ENGLISH.split())

_SCRIPTS = {
    "LATIN": "Latin", "CYRILLIC": "Cyrillic", "GREEK": "Greek", "CJK": "Han", "HIRAGANA": "Japanese kana", "KATAKANA": "Japanese kana",
    "HANGUL": "Hangul", "ARABIC": "Arabic", "HEBREW": "Hebrew", "DEVANAGARI": "Devanagari", "BENGALI": "Bengali", "THAI": "Thai",
    "TAMIL": "Tamil", "TELUGU": "Telugu", "GEORGIAN": "Georgian", "ARMENIAN": "Armenian", "ETHIOPIC": "Ethiopic", "KHMER": "Khmer",
    "MYANMAR": "Burmese", "GUJARATI": "Gujarati", "GURMUKHI": "Gurmukhi", "KANNADA": "Kannada", "MALAYALAM": "Malayalam", "LAO": "Lao",
}  # fmt: skip


def words(text: str) -> list[str]:
    """Splits a text into lower-case words."""
    return _WORD.findall(text.casefold())


@lru_cache(1 << 14)
def _script_of(letter: str) -> str:
    name = unicodedata.name(letter, "").split(" ", 1)[0].split("-", 1)[0]
    return _SCRIPTS.get(name, name.capitalize() or "unnamed")


def script(text: str) -> str:
    """Returns the most frequent script of the letters; kana beside Han means Japanese."""
    counts = Counter(_script_of(c) for c in text[:2000] if c.isalpha())
    if not counts:
        return "none (no letters)"
    if counts["Japanese kana"] and counts["Han"]:
        return "Japanese kana"
    return max(counts.items(), key=lambda item: (item[1], item[0]))[0]
