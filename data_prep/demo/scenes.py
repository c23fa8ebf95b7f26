"""Demo scenes: vocabulary, splits, and random composition, without pixels.

A scene is a pure function of (GENERATOR_VERSION, seed, split, index). The main object, the largest, defines the class (texture x
shape); smaller distractors of random classes surround it. B scenes, K = MAX_OBJECTS slots (slot 0: main object), lengths in pixels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

GENERATOR_VERSION = 2  # raise it when a change gives any seed another scene, caption or split

SHAPES = ("circle", "hourglass", "triangle", "star", "cross", "ring")
TEXTURES = ("solid", "striped", "barred", "dotted", "checkered", "slanted", "bordered", "split")
# Never drawn nor named in any training split, though every shape and every texture occurs in other combinations.
HELD_OUT = (
    ("striped", "circle"),
    ("dotted", "triangle"),
    ("solid", "star"),
    ("split", "cross"),
    ("checkered", "ring"),
    ("bordered", "hourglass"),
)
COLOURS = {
    "red": (214, 40, 40),
    "orange": (244, 128, 30),
    "yellow": (248, 216, 60),
    "green": (48, 152, 64),
    "teal": (0, 164, 172),
    "blue": (44, 84, 204),
    "purple": (128, 60, 172),
    "pink": (246, 146, 194),
    "brown": (124, 76, 44),
    "white": (244, 244, 240),
    "black": (24, 24, 28),
    "gray": (130, 130, 134),
}
COLOUR_NAMES = tuple(COLOURS)
_ALL = tuple((texture, shape) for texture in TEXTURES for shape in SHAPES)
CLASSES = tuple(pair for pair in _ALL if pair not in HELD_OUT) + HELD_OUT  # trained classes first: their index is the same in every split
NUM_TRAINED = len(CLASSES) - len(HELD_OUT)
CLASS_NAMES = tuple(f"{texture} {shape}" for texture, shape in CLASSES)
CLASS_TEXTURE = np.array([TEXTURES.index(texture) for texture, _ in CLASSES])
CLASS_SHAPE = np.array([SHAPES.index(shape) for _, shape in CLASSES])

# Difficulty: all parameters of the generator.
SIDE = 64  # pixels
MAX_OBJECTS = 4
MAIN_DIAMETER = (0.72, 0.88)  # of the side
DISTRACTOR_DIAMETER = (0.15, 0.26)
BINDING_DIAMETER = (0.34, 0.42)
OVERFLOW = 0.04  # fraction of its diameter by which the main object may leave the image
SPREAD = 0.85  # greatest offset of the main object, of the free distance from the middle to the border
MAX_ROTATION = 12.0  # degrees either way
MAX_TEXTURE_ANGLE = 10.0  # degrees either way, relative to the object
TEXTURE_PERIOD = (0.23, 0.28)  # between two stripes, dots, or equal checks, of the object's diameter
MIN_PERIOD = 5.0  # pixels, for small objects
MAIN_OCCLUDED = 0.1  # probability that a distractor covers the edge of the main object
OBJECT_OVERLAP = 0.8  # least distance of centres as a fraction of the sum of radii, where there is room
COLOUR_JITTER = 34.0  # per channel, uniform either way
CONTRAST = 130.0  # least weighted RGB distance between an object's two colours, and between it and the background
LIGHT = (0.85, 1.1)  # gain on the whole image
NOISE = (1.0, 5.0)  # standard deviation of the pixel noise, of 255
WRONG_CAPTIONS = 0.05


@dataclass(frozen=True)
class Split:
    """A split. `number` is part of the seed, so that splits draw differently; `count` is the default size."""

    number: int
    count: int
    backgrounds: tuple[str, ...] = ("plain", "gradient", "cloudy")
    main_diameter: tuple[float, float] = MAIN_DIAMETER
    noise: tuple[float, float] = NOISE
    held_out: bool = False  # the main object is of a held-out class
    wrong_captions: float = 0.0
    text: bool = True  # False: the image is the only member
    templates: str | None = None  # "test" or "val": the prompts written beside the shards


SPLITS = {
    "pairs": Split(0, 16_000, wrong_captions=WRONG_CAPTIONS),
    "photos": Split(1, 32_000, ("cloudy", "bands", "vignette"), (0.60, 0.84), (2.0, 10.0), text=False),
    "val": Split(2, 1_000, templates="val"),
    "test": Split(3, 2_500, templates="test"),
    "heldout": Split(4, 2_000, held_out=True, templates="test"),
    "shifted": Split(5, 2_000, ("patches", "coarse"), templates="test"),
    "binding": Split(6, 2_000),
}


@dataclass
class Scenes:
    """B scenes as arrays. `present`: the slots that hold an object; `order`: the order of painting slots, back to front."""

    seed: int
    split: str
    index: np.ndarray  # int [B]
    label: np.ndarray  # int [B], the main object's class
    present: np.ndarray  # bool [B, K]
    category: np.ndarray  # int [B, K], class of each object
    colour: np.ndarray  # int [B, K]
    second: np.ndarray  # int [B, K], the texture's other colour
    rgb: np.ndarray  # float [B, K, 2, 3], both colours with their jitter
    radius: np.ndarray  # [B, K] pixels
    x: np.ndarray  # [B, K] pixels from the left
    y: np.ndarray  # [B, K] pixels from the top
    angle: np.ndarray  # [B, K] radians
    texture_angle: np.ndarray  # [B, K] radians
    texture_phase: np.ndarray  # [B, K, 2] in 0..1
    period: np.ndarray  # [B, K] pixels
    order: np.ndarray  # int [B, K]
    background: np.ndarray  # int [B], colour
    background_kind: np.ndarray  # int [B], index into the split's backgrounds
    background_rgb: np.ndarray  # [B, 3]
    background_draws: np.ndarray  # [B, 24] uniform numbers for its pattern
    light: np.ndarray  # [B]
    noise: np.ndarray  # [B]


def generator(seed: int, split: str, index: int, purpose: int) -> np.random.Generator:
    """Returns the random stream of a scene; `purpose`: 0 composition, 1 pixels, 2 captions, 3 class order (index = block)."""
    key = np.random.SeedSequence([GENERATOR_VERSION, seed, SPLITS[split].number, index, purpose])
    return np.random.Generator(np.random.Philox(key))


@functools.lru_cache(maxsize=4096)
def _block(seed: int, split: str, block: int, low: int, high: int) -> np.ndarray:
    return generator(seed, split, block, 3).permutation(np.arange(low, high))


def labels(seed: int, split: str, index: np.ndarray) -> np.ndarray:
    """Returns the class of each scene, int [B]: each block of consecutive scenes is a permutation of the split's classes."""
    low, high = (NUM_TRAINED, len(CLASSES)) if SPLITS[split].held_out else (0, NUM_TRAINED)
    n = high - low
    return np.array([_block(seed, split, int(i) // n, low, high)[int(i) % n] for i in index], dtype=np.int64)


_RGB = np.array(list(COLOURS.values()), dtype=np.float64)
_WEIGHT = np.sqrt(np.array([0.9, 1.5, 0.6]))  # green differences are the most visible, blue ones the least
_DISTANCE = np.linalg.norm((_RGB[:, None] - _RGB[None]) * _WEIGHT, axis=-1)
_CONTRASTS = _DISTANCE > CONTRAST  # bool [colours, colours]


def _choose(allowed: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Chooses uniformly among allowed choices; allowed bool [..., C], u [...] in 0..1. Returns int [...]."""
    rank = (u * allowed.sum(-1)).astype(np.int64)
    return np.argmax(np.cumsum(allowed, -1) > rank[..., None], -1)


def _contrasting(first: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns the colours that contrast with both, bool [..., colours]; with the first alone where none contrasts with both."""
    both = _CONTRASTS[first] & _CONTRASTS[other]
    return np.where(both.any(-1, keepdims=True), both, _CONTRASTS[first])


def _between(low_high: tuple[float, float], u: np.ndarray) -> np.ndarray:
    return low_high[0] + (low_high[1] - low_high[0]) * u


def _place(radius: np.ndarray, main_xy: np.ndarray, trials: np.ndarray) -> np.ndarray:
    """Places distractors: each takes its first trial position that is far enough from earlier objects, else its freest one.

    Args:
        radius: [B, K] pixels.
        main_xy: [B, 2] pixels, the centre of the main object.
        trials: [B, K, T, 2] in 0..1, the trial positions.

    Returns:
        Centres [B, K, 2] in pixels.
    """
    centres = np.zeros((*radius.shape, 2))
    centres[:, 0] = main_xy
    rows = np.arange(len(radius))
    for k in range(1, radius.shape[1]):
        candidates = _between((0.07 * SIDE, 0.93 * SIDE), trials[:, k])  # [B, T, 2]
        apart = np.linalg.norm(candidates[:, :, None] - centres[:, None, :k], axis=-1)  # [B, T, k]
        margin = (apart - OBJECT_OVERLAP * (radius[:, None, :k] + radius[:, k, None, None])).min(-1)
        pick = np.where((margin > 0).any(-1), np.argmax(margin > 0, -1), np.argmax(margin, -1))
        centres[:, k] = candidates[rows, pick]
    return centres


def sample(seed: int, split: str, index: np.ndarray) -> Scenes:
    """Draws the scenes with these indices (int [B]): everything except the pixel noise."""
    kind, B, K, T = SPLITS[split], len(index), MAX_OBJECTS, 12
    per_object, per_scene = 17, 40
    u = np.stack([generator(seed, split, int(i), 0).random(K * per_object + K * T * 2 + per_scene) for i in index])
    o = u[:, : K * per_object].reshape(B, K, per_object)
    tries = u[:, K * per_object : -per_scene].reshape(B, K, T, 2)
    s = u[:, -per_scene:]

    label = labels(seed, split, index)
    count = 1 + (s[:, 0] * K).astype(np.int64)
    category = (o[..., 0] * NUM_TRAINED).astype(np.int64)
    category[:, 0] = label
    colour = (o[..., 1] * len(COLOURS)).astype(np.int64)
    # Every object contrasts with the background: draw the main object's colours, then the background, then the other colours.
    second = _choose(_CONTRASTS[colour], o[..., 2])
    background = _choose(_contrasting(colour[:, 0], second[:, 0]), s[:, 1])
    colour[:, 1:] = _choose(_CONTRASTS[background][:, None].repeat(K - 1, 1), o[:, 1:, 1])
    second[:, 1:] = _choose(_contrasting(colour[:, 1:], background[:, None]), o[:, 1:, 2])

    radius = _between(DISTRACTOR_DIAMETER, o[..., 3]) * SIDE / 2
    radius[:, 0] = _between(kind.main_diameter, o[:, 0, 3]) * SIDE / 2
    inset = radius[:, :1] * (1 - 2 * OVERFLOW)
    free = np.maximum(SIDE - 2 * inset, 0) * SPREAD
    centres = _place(radius, SIDE / 2 + free * (o[:, 0, 4:6] - 0.5), tries)
    over = s[:, 2] < MAIN_OCCLUDED
    order = np.where(over[:, None], [3, 2, 0, 1], [3, 2, 1, 0])

    if split == "binding":  # slot 0 left, slot 1 right, equal partners; neither shares its shape or colour with the other
        count[:] = 2
        category[:, 1] = _choose(CLASS_SHAPE[:NUM_TRAINED] != CLASS_SHAPE[category[:, :1]], o[:, 1, 0])
        partner = _CONTRASTS[background] & (np.arange(len(COLOURS)) != colour[:, :1])
        colour[:, 1] = _choose(partner, o[:, 1, 1])
        second[:, 1] = _choose(_contrasting(colour[:, 1], background), o[:, 1, 2])
        radius[:, :2] = _between(BINDING_DIAMETER, o[:, :2, 3]) * SIDE / 2
        centres[:, :2] = np.array([[0.26, 0.5], [0.74, 0.5]]) * SIDE + (o[:, :2, 4:6] - 0.5) * np.array([0.06, 0.5]) * SIDE

    jitter = (o[..., 6:12].reshape(B, K, 2, 3) * 2 - 1) * COLOUR_JITTER
    return Scenes(
        seed=seed,
        split=split,
        index=np.asarray(index),
        label=label,
        present=np.arange(K) < count[:, None],
        category=category,
        colour=colour,
        second=second,
        rgb=_RGB[np.stack([colour, second], -1)] + jitter,
        radius=radius,
        x=centres[..., 0],
        y=centres[..., 1],
        angle=np.deg2rad(_between((-MAX_ROTATION, MAX_ROTATION), o[..., 12])),
        texture_angle=np.deg2rad(_between((-MAX_TEXTURE_ANGLE, MAX_TEXTURE_ANGLE), o[..., 13])),
        texture_phase=o[..., 14:16],
        period=np.maximum(_between(TEXTURE_PERIOD, o[..., 16]) * 2 * radius, MIN_PERIOD),
        order=order,
        background=background,
        background_kind=(s[:, 3] * len(kind.backgrounds)).astype(np.int64),
        background_rgb=_RGB[background] + (s[:, 4:7] * 2 - 1) * COLOUR_JITTER,
        background_draws=s[:, 7:31],
        light=_between(LIGHT, s[:, 31]),
        noise=_between(kind.noise, s[:, 32]),
    )
