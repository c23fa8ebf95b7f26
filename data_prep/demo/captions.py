"""Texts of a demo scene: training captions, prompts that no training caption uses, questions, and binding sentences.

A caption omits attributes at random. The texture or the shape is sometimes omitted too, but never both, and each may be replaced by
a synonym; class names and prompts use the first word of each list. Draws come from `random.Random(int).random()`, whose sequence is
the same in every version of Python.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.demo.scenes import CLASS_NAMES, CLASSES, COLOUR_NAMES, SIDE, Scenes

# {np} "a red striped circle", {nn} the same without article, {other} one distractor, {bg} background colour, {place}, {relation}, {count}
PHRASINGS = (
    "{np}",
    "{nn}",
    "one {nn}",
    "{np} {place}",
    "{np} on a {bg} background",
    "{np} on {bg}",
    "a picture of {np}",
    "a picture of {np} {place}",
    "a drawing of {np}",
    "a drawing of {np} on {bg}",
    "there is {np}",
    "there is {np} {place}",
    "we see {np}",
    "we see {np} on a {bg} background",
    "{place} there is {np}",
    "the largest object is {np}",
    "the {nn} is in front",
    "this scene shows {np}",
    "a scene with {np}",
    "look at the {nn}",
    "an icon of {np}",
    "the main thing is {np}",
    "a {bg} background with {np}",
    "everything behind the {nn} is {bg}",
    "{count} and the biggest is {np}",
    "{np} among {count}",
    "{np} and {other}",
    "{np} with {other}",
    "it contains {np} and {other}",
    "{np} {relation} {other}",
    "{np} {relation} {other}",
    "{other} {opposite} {np}",
)
_ALONE = tuple(p for p in PHRASINGS if not re.search("other|count", p))  # for scenes without distractors
TEMPLATES = {  # zero-shot prompts: sentences that no training caption uses
    "test": (
        "a photo of a {c}.",
        "an image of a {c}.",
        "here you have a {c}.",
        "this image has a {c} in it.",
        "a {c} is what the image shows.",
        "the object in the image is a {c}.",
        "a big {c} can be found here.",
    ),
    "val": ("a {c} is visible.", "a good example of a {c}.", "what a nice {c}!", "somebody made a {c}."),
}
SYNONYMS = {
    "circle": ("circle", "disc"),
    "hourglass": ("hourglass", "bow"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "donut"),
    "solid": ("solid", "plain"),
    "striped": ("striped", "banded"),
    "barred": ("barred",),
    "slanted": ("slanted", "diagonal"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"),
    "bordered": ("bordered", "framed"),
    "split": ("split", "halved"),
}
P_SIZE, P_COLOUR, P_SECOND, P_TEXTURE, P_SHAPE, P_SYNONYM = 0.15, 0.35, 0.2, 0.95, 0.97, 0.12
P_OTHER_COLOUR, P_OTHER_TEXTURE = 0.7, 0.5  # probabilities to name the attributes of distractors; those above: of the main object
MIN_VISIBLE = 12  # pixels an object must show to be counted, boxed or named
CAPTIONS = (2, 5)  # least and greatest number per sample
COUNTS = ("no object", "one object", "two objects", "three objects", "four objects")


@dataclass
class Thing:
    """One visible object, in words."""

    category: int
    colour: str
    second: str | None  # None: a solid object has one colour
    size: str
    x: float  # centre, pixels
    y: float
    area: int  # visible pixels
    box: list[int]  # x, y, width, height of what is visible, pixels

    @property
    def texture(self) -> str:
        return CLASSES[self.category][0]

    @property
    def shape(self) -> str:
        return CLASSES[self.category][1]


@dataclass
class Description:
    """A scene in words; things[0] is the main object."""

    background: str
    things: list[Thing] = field(default_factory=list)


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def size_word(radius: float, main: bool) -> str:
    """Names the size of a radius in pixels; main objects and distractors have different words."""
    part = 2 * radius / SIDE
    if main:
        return "huge" if part > 0.83 else "large" if part > 0.77 else "medium"
    return "small" if part > 0.2 else "tiny"


def place_word(x: float, y: float) -> str:
    """Names the place of a centre, in pixels."""
    near = 0.07 * SIDE
    row = "top" if y < SIDE / 2 - near else "bottom" if y > SIDE / 2 + near else ""
    column = "left" if x < SIDE / 2 - near else "right" if x > SIDE / 2 + near else ""
    if row and column:
        return f"in the {row} {column}"
    return f"at the {row}" if row else f"on the {column}" if column else "in the middle"


def relation_words(a: Thing, b: Thing) -> tuple[str, str]:
    """Names the directions of a from b, and of b from a."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= abs(dy):
        return ("left of", "right of") if dx < 0 else ("right of", "left of")
    return ("above", "below") if dy < 0 else ("below", "above")


def describe(scenes: Scenes, i: int, things: list[tuple[int, int, list[int]]]) -> Description:
    """Describes scene `i` in words.

    Args:
        scenes: a batch of scenes.
        i: its index in the batch.
        things: (slot, visible pixels, box) of each visible object, main object first.
    """
    described = []
    for slot, area, box in things:
        category = int(scenes.category[i, slot])
        second = None if CLASSES[category][0] == "solid" else COLOUR_NAMES[scenes.second[i, slot]]
        size = size_word(float(scenes.radius[i, slot]), main=slot == 0 or scenes.split == "binding")
        x, y = float(scenes.x[i, slot]), float(scenes.y[i, slot])
        described.append(Thing(category, COLOUR_NAMES[scenes.colour[i, slot]], second, size, x, y, area, box))
    return Description(COLOUR_NAMES[scenes.background[i]], described)


def _noun_phrase(thing: Thing, draw: random.Random, main: bool) -> str:
    words = []
    if draw.random() < P_SIZE:
        words.append(thing.size)
    if draw.random() < (P_COLOUR if main else P_OTHER_COLOUR):
        words.append(f"{thing.colour} and {thing.second}" if thing.second and draw.random() < P_SECOND else thing.colour)
    shape = draw.random() < P_SHAPE
    texture = draw.random() < (P_TEXTURE if main else P_OTHER_TEXTURE) or not shape
    for named, word in ((texture, thing.texture), (shape, thing.shape)):
        options = SYNONYMS[word]
        if named:
            words.append(options[1] if len(options) > 1 and draw.random() < P_SYNONYM else options[0])
    return " ".join(words if shape else [*words, "shape"])


def caption(scene: Description, draw: random.Random) -> str:
    """Draws a training caption."""
    phrasing = PHRASINGS[int(draw.random() * len(PHRASINGS))]
    others = scene.things[1:]
    if not others and phrasing not in _ALONE:
        phrasing = _ALONE[int(draw.random() * len(_ALONE))]
    main = scene.things[0]
    other = others[int(draw.random() * len(others))] if others else main
    nn = _noun_phrase(main, draw, main=True)
    other_nn = _noun_phrase(other, draw, main=False)
    relation, opposite = relation_words(main, other)
    return phrasing.format(
        np=_article(nn),
        nn=nn,
        other=_article(other_nn),
        bg=scene.background,
        place=place_word(main.x, main.y),
        relation=relation,
        opposite=opposite,
        count=COUNTS[len(scene.things)],
    )


def captions(scene: Description, draw: random.Random) -> list[str]:
    """Draws 2 to 5 different captions of a scene."""
    count = CAPTIONS[0] + int(draw.random() * (CAPTIONS[1] - CAPTIONS[0] + 1))
    texts: list[str] = []
    while len(texts) < count:
        text = caption(scene, draw)
        if text not in texts:
            texts.append(text)
    return texts


def questions(scene: Description, draw: random.Random) -> list[dict[str, str]]:
    """Draws two questions with one-word answers."""
    main = scene.things[0]
    shapes = sorted({thing.shape for thing in scene.things})
    absent = sorted(set(SYNONYMS) & {shape for _, shape in CLASSES} - set(shapes))
    yes = draw.random() < 0.5
    asked = (shapes if yes else absent)[int(draw.random() * len(shapes if yes else absent))]
    pool = [
        ("what shape is the largest object?", main.shape),
        ("what texture does the largest object have?", main.texture),
        ("what is the main colour of the largest object?", main.colour),
        ("what colour is the background?", scene.background),
        ("how many objects are there?", str(len(scene.things))),
        (f"is there a {asked}?", "yes" if yes else "no"),
    ]
    first = int(draw.random() * len(pool))
    second = (first + 1 + int(draw.random() * (len(pool) - 1))) % len(pool)
    return [{"question": pool[k][0], "answer": pool[k][1]} for k in (first, second)]


def binding(left: Thing, right: Thing, draw: random.Random) -> dict[str, str]:
    """Makes a true sentence and its swap: of the attributes ("attribute") or the two sides ("order"), with equal probability."""

    def sentence(a: str, b: str) -> str:
        return f"{_article(a)} left of {_article(b)}"

    a, b = f"{left.colour} {left.shape}", f"{right.colour} {right.shape}"
    if draw.random() < 0.5:
        swap, kind = sentence(f"{right.colour} {left.shape}", f"{left.colour} {right.shape}"), "attribute"
    else:
        swap, kind = sentence(b, a), "order"
    return {"caption": sentence(a, b), "swap": swap, "swap_kind": kind}


def prompts(which: str, names: Sequence[str] = CLASS_NAMES) -> list[str]:
    """Fills every template of a set ("test" or "val") with every class name."""
    return [template.format(c=name) for template in TEMPLATES[which] for name in names]
