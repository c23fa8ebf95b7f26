"""The tokenizer: open_clip's ids, whatever the text."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from mmpretrain.data.text import get_tokenizer

THEIRS = SimpleTokenizer()
WORDS = st.sampled_from(
    ["a", "Cat's", "naïve", "&amp;", "&", "<end_of_text>", "<start_of_text>", "12", "!!", "\t", "\x1b[31m", "“q”", "日本", "é"]
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.text(st.characters(max_codepoint=127)), st.lists(WORDS).map(" ".join), st.lists(WORDS).map("".join)))
def test_ids_are_open_clips(text):
    assert torch.equal(get_tokenizer("clip").encode([text], 20), THEIRS([text], 20))


def test_the_memory_of_words_is_bounded():
    tokenizer = get_tokenizer("clip")
    before = len(tokenizer._inner.cache)
    tokenizer.encode([f"word{chr(97 + i)}{chr(97 + j)}x" for i in range(26) for j in range(26)])
    assert len(tokenizer._inner.cache) == before
    assert tokenizer._inner.word.cache_info().maxsize == 1 << 16
