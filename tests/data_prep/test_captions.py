"""The language of a caption, and its length in tokens: the same for every command."""

from pathlib import Path

import pytest

from data_prep.captions import language_of, num_tokens
from data_prep.filter.command import select
from data_prep.filter.rules import Rules
from data_prep.records import Record
from data_prep.shards.serial import write_shards
from data_prep.stats.command import report

GERMAN, ENGLISH = "Ein kleiner Hund spielt mit seinem Ball im Garten", "a small dog plays with its ball in the garden"


def test_languages_where_there_is_enough_text() -> None:
    pytest.importorskip("py3langid")
    assert language_of(GERMAN) == "de"
    assert language_of("dog") is None


def test_filter_drops_the_captions_that_stats_counts_in_another_language(tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    texts = [GERMAN, ENGLISH, "dog", "Hund", "12345", "un petit chien joue avec son ballon dans le jardin", ENGLISH + " 2"]
    write_shards([Record(str(i), {"txt": text.encode()}) for i, text in enumerate(texts)], tmp_path)
    languages = report([str(tmp_path)], processes=1, page=False)[0]["languages"]
    assert languages == {"short": 3, "en": 2, "de": 1, "fr": 1}
    for language in ("en", "de"):
        dropped = select([str(tmp_path)], rules=Rules(languages=(language,)), processes=1)["dropped"]
        assert dropped["language"] == len(texts) - languages["short"] - languages[language]


def test_tokens_are_those_of_clip_and_hostile_words_do_not_hang() -> None:
    assert num_tokens("a photo of a cat") == 7
    assert 78 > num_tokens("x" * 60_000) > 2
    assert num_tokens("cat " * 100) == 102
