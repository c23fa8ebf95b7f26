"""What is said of the demo's scenes: many phrasings, left-out attributes, a known share of wrong captions, prompts never trained on."""

from __future__ import annotations

import json
import random
import re

import pytest

from data_prep.demo import captions as words
from data_prep.demo.records import chunk
from data_prep.demo.scenes import CLASS_NAMES, COLOUR_NAMES, HELD_OUT, NUM_TRAINED, WRONG_CAPTIONS

_SLOT = {
    "np": r"an? [a-z ]+",
    "nn": r"[a-z ]+",
    "other": r"an? [a-z ]+",
    "bg": "(?:" + "|".join(COLOUR_NAMES) + ")",
    "place": r"(?:in|at|on) the [a-z]+(?: [a-z]+)?",
    "relation": r"(?:left of|right of|above|below)",
    "opposite": r"(?:left of|right of|above|below)",
    "count": r"[a-z]+ objects?",
}


def is_training_phrasing(text: str) -> bool:
    """Could a training phrasing that names the class with a frame around it have produced this sentence? Bare noun phrases do not count."""
    framed = [p for p in words.PHRASINGS if re.sub(r"\{\w+\}", "", p).strip() or p.count("{") > 1]
    return any(re.fullmatch(re.sub(r"\{(\w+)\}", lambda m: _SLOT[m[1]], p), text.strip(" .!")) for p in framed)


@pytest.fixture(scope="module")
def records() -> list[dict]:
    return [json.loads(members["json"]) for _, members in chunk((0, "pairs", 0, 1260))]


def _named(caption: str) -> list[tuple[set[str], set[str]]]:
    """(textures, shapes) that each noun phrase of a caption names, synonyms included."""
    back = {word: name for name, options in words.SYNONYMS.items() for word in options}
    found = []
    for phrase in re.split(r"\b(?:and a|and an|with|left of|right of|above|below|among)\b", caption):
        known = {back[w] for w in phrase.split() if w in back}
        found.append((known - {shape for _, shape in words.CLASSES}, known & {shape for _, shape in words.CLASSES}))
    return found


def test_every_phrasing_is_used_and_there_are_at_least_twenty(records: list[dict]):
    assert len(set(words.PHRASINGS)) >= 20
    told = [c for record in records for c in record["captions"]]
    for phrasing in set(words.PHRASINGS) - {"{np}", "{nn}"}:
        pattern = re.sub(r"\{(\w+)\}", lambda m: _SLOT[m[1]], phrasing)
        assert any(re.fullmatch(pattern, caption) for caption in told), phrasing


def test_each_sample_has_two_to_five_different_captions(records: list[dict]):
    assert {len(record["captions"]) for record in records} == {2, 3, 4, 5}
    assert all(len(set(record["captions"])) == len(record["captions"]) for record in records)


def test_attributes_are_left_out_at_random_but_never_shape_and_texture_together(records: list[dict]):
    right = [(r["attributes"], c) for r in records if not r["wrong_caption"] for c in r["captions"]]
    said = {
        name: sum(any(o in c.split() for o in words.SYNONYMS.get(a[name], (a[name],))) for a, c in right) / len(right)
        for name in ("shape", "texture", "colour", "size")
    }
    assert 0.92 < said["shape"] < 0.995
    assert 0.85 < said["texture"] < 0.98
    assert 0.25 < said["colour"] < 0.5
    assert 0.1 < said["size"] < 0.25
    for a, c in right:
        assert any(o in c.split() for n in ("shape", "texture") for o in words.SYNONYMS[a[n]]), c


def test_the_stated_share_of_captions_is_wrong_and_comes_from_another_class(records: list[dict]):
    wrong = [r for r in records if r["wrong_caption"]]
    assert abs(len(wrong) / len(records) - WRONG_CAPTIONS) < 0.025
    fits = [
        any(any(o in c.split() for o in words.SYNONYMS[r["attributes"]["shape"]]) for c in r["captions"])
        and any(any(o in c.split() for o in words.SYNONYMS[r["attributes"]["texture"]]) for c in r["captions"])
        for r in wrong
    ]
    assert sum(fits) < len(wrong) / 3  # a distractor may carry the missing word


def test_only_training_pairs_have_wrong_captions():
    assert not any(json.loads(m["json"])["wrong_caption"] for _, m in chunk((0, "test", 0, 128)))


def test_no_training_caption_names_a_held_out_class(records: list[dict]):
    for record in records:
        for caption in record["captions"]:
            for textures, shapes in _named(caption):
                assert not any(t in textures and s in shapes for t, s in HELD_OUT), caption


def test_prompts_are_phrasings_never_trained_on_and_differ_between_val_and_test(records: list[dict]):
    told = {c for record in records for c in record["captions"]}
    for which in words.TEMPLATES:
        for prompt in words.prompts(which):
            assert not is_training_phrasing(prompt), prompt
            assert prompt not in told
            assert prompt.strip(".!") not in told
    assert not set(words.TEMPLATES["val"]) & set(words.TEMPLATES["test"])
    assert all(is_training_phrasing(c) for c in told if c.startswith(("a picture of", "look at", "there is", "we see")))


def test_class_words_of_the_prompts_are_seen_in_training(records: list[dict]):
    seen = {word for r in records for c in r["captions"] for word in c.split()}
    assert {word for name in CLASS_NAMES for word in name.split()} <= seen
    assert all(f"a {name}"[2] not in "aeiou" for name in CLASS_NAMES)  # so that "a {c}" is good English


def test_synonyms_belong_to_one_word_each():
    options = [o for group in words.SYNONYMS.values() for o in group]
    assert len(options) == len(set(options))


def test_binding_sentences_say_what_is_left_and_the_swap_says_the_opposite():
    left = words.Thing(0, "red", None, "medium", 16, 32, 100, [0, 0, 1, 1])
    right = words.Thing(1, "blue", None, "medium", 48, 32, 100, [0, 0, 1, 1])
    found = {}
    for seed in range(20):
        sentence = words.binding(left, right, random.Random(seed))
        assert sentence["caption"] == f"a red {left.shape} left of a blue {right.shape}"
        found[sentence["swap_kind"]] = sentence["swap"]
    assert found == {
        "attribute": f"a blue {left.shape} left of a red {right.shape}",
        "order": f"a blue {right.shape} left of a red {left.shape}",
    }


def test_relations():
    a, b = (words.Thing(0, "red", None, "medium", x, y, 9, []) for x, y in ((10, 30), (40, 35)))
    assert words.relation_words(a, b) == ("left of", "right of")
    b.x, b.y = 12, 60
    assert words.relation_words(a, b) == ("above", "below")


def test_questions_have_right_answers():
    scene = words.Description("blue", [words.Thing(i, "red", "white", "large", 9, 9, 9, []) for i in range(2)])
    shapes = {t.shape for t in scene.things}
    for seed in range(40):
        for qa in words.questions(scene, random.Random(seed)):
            if qa["question"].startswith("is there a "):
                assert (qa["question"][len("is there a ") : -1] in shapes) == (qa["answer"] == "yes")
            if qa["question"] == "how many objects are there?":
                assert qa["answer"] == "2"


def test_labels_stay_true_where_the_caption_is_wrong(records: list[dict]):
    for record in records:
        assert record["class"] == CLASS_NAMES[record["label"]] == f"{record['attributes']['texture']} {record['attributes']['shape']}"
        assert record["label"] < NUM_TRAINED
        assert record["boxes"][0]["category_id"] == record["label"]
