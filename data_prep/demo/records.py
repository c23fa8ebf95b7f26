"""Demo scenes -> the members of a sample. Pure functions of (seed, split, index); imports no torch, so that worker processes start fast."""

from __future__ import annotations

import io
import json
import random
from typing import Any

import numpy as np
from PIL import Image

from data_prep.demo import captions
from data_prep.demo.captions import MIN_VISIBLE, Description, Thing
from data_prep.demo.render import instances, render
from data_prep.demo.scenes import CLASS_NAMES, CLASSES, MAX_OBJECTS, SIDE, SPLITS, Scenes, generator, labels, sample

JPEG_QUALITY = 92  # no chroma subsampling: at 64 pixels it would smear the colours of the textures
VIRTUAL = 1 << 40  # scenes from this index on are never written: wrong captions are taken from them
_PALETTE = [0, 0, 0] + [int(v) for v in np.random.Generator(np.random.Philox(1)).integers(60, 256, 3 * len(CLASSES))]


def visible(instances: np.ndarray) -> list[list[tuple[int, int, list[int]]]]:
    """Of each scene: (slot, pixels, box [x, y, width, height]) of every object that shows MIN_VISIBLE pixels, by slot.

    instances: uint8 [B, S, S].
    """
    found: list[list[tuple[int, int, list[int]]]] = [[] for _ in instances]
    for slot in range(MAX_OBJECTS):
        shown = instances == slot + 1
        lines, columns = shown.any(2), shown.any(1)
        top, bottom = lines.argmax(1).tolist(), (SIDE - lines[:, ::-1].argmax(1)).tolist()
        left, right = columns.argmax(1).tolist(), (SIDE - columns[:, ::-1].argmax(1)).tolist()
        for i, area in enumerate(np.count_nonzero(shown, (1, 2)).tolist()):
            if area >= MIN_VISIBLE:
                found[i].append((slot, area, [left[i], top[i], right[i] - left[i], bottom[i] - top[i]]))
    return found


def jpeg(image: np.ndarray) -> bytes:
    """uint8 [S, S, 3] -> JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def mask_png(scenes: Scenes, i: int, instance: np.ndarray) -> bytes:
    """Index PNG [S, S]: 0 background, class + 1 where an object is on top."""
    lookup = np.zeros(MAX_OBJECTS + 1, dtype=np.uint8)
    lookup[1:] = scenes.category[i] + 1
    picture = Image.fromarray(lookup[instance], "P")
    picture.putpalette(_PALETTE)
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=3)
    return file.getvalue()


def _attributes(thing: Thing) -> dict[str, object]:
    place = captions.place_word(thing.x, thing.y)
    return {
        "shape": thing.shape,
        "texture": thing.texture,
        "colour": thing.colour,
        "second_colour": thing.second,
        "size": thing.size,
        "place": place,
    }


def _boxes(scene: Description) -> list[dict[str, object]]:
    return [{"bbox": t.box, "category": CLASS_NAMES[t.category], "category_id": t.category, "area": t.area} for t in scene.things]


def _draw(seed: int, split: str, index: int) -> random.Random:
    return random.Random(int(generator(seed, split, index, 2).integers(1 << 62)))


def _descriptions(scenes: Scenes, instance: np.ndarray) -> list[Description]:
    return [captions.describe(scenes, i, things) for i, things in enumerate(visible(instance))]


def _strangers(seed: int, split: str, index: np.ndarray) -> list[Description]:
    """For each scene another of the split, of another class: an even index and the next lie in one block of labels, so their classes
    differ."""
    other = VIRTUAL + 2 * index
    other += labels(seed, split, other) == labels(seed, split, index)
    scenes = sample(seed, split, other)
    return _descriptions(scenes, instances(scenes))


def _told(scenes: Scenes, seen: list[Description], draws: list[random.Random]) -> list[Description]:
    """What the captions of each scene tell of: the scene itself, or for a share of them, by one draw each, another one."""
    share = SPLITS[scenes.split].wrong_captions
    wrong = np.flatnonzero([draw.random() < share for draw in draws])
    told = list(seen)
    if len(wrong):
        for i, stranger in zip(wrong.tolist(), _strangers(scenes.seed, scenes.split, scenes.index[wrong])):
            told[i] = stranger
    return told


def _data(scenes: Scenes, i: int, scene: Description, told: Description, draw: random.Random) -> dict[str, Any]:
    """The json member of scene i: what is seen, and captions of what is told."""
    data: dict[str, Any] = {"background": scene.background, "boxes": _boxes(scene), "objects": [_attributes(t) for t in scene.things]}
    if scenes.split == "binding":
        left, right = scene.things[:2]
        sentences = captions.binding(left, right, draw)
        return data | sentences | {"captions": [sentences["caption"]]}
    label = int(scenes.label[i])
    return data | {
        "label": label,
        "class": CLASS_NAMES[label],
        "attributes": _attributes(scene.things[0]) | {"background": scene.background, "count": len(scene.things)},
        "captions": captions.captions(told, draw),
        "wrong_caption": told is not scene,  # for analysis; training must not look
        "qa": captions.questions(scene, draw),
    }


def members(scenes: Scenes) -> list[dict[str, bytes]]:
    """The members of each scene, by extension."""
    images, instance = render(scenes)
    made = [{"jpg": jpeg(image)} for image in images]
    if not SPLITS[scenes.split].text:
        return made
    seen = _descriptions(scenes, instance)
    draws = [_draw(scenes.seed, scenes.split, int(index)) for index in scenes.index]
    told = seen if scenes.split == "binding" else _told(scenes, seen, draws)
    for i, found in enumerate(made):
        data = _data(scenes, i, seen[i], told[i], draws[i])
        if "label" in data:
            found["cls"] = str(data["label"]).encode()
        found["txt"] = data["captions"][0].encode()
        found["json"] = json.dumps(data, separators=(",", ":")).encode()
        found["mask.png"] = mask_png(scenes, i, instance[i])
    return made


def chunk(job: tuple[int, str, int, int]) -> list[tuple[str, dict[str, bytes]]]:
    """(seed, split, start, stop) -> (key, members) of those scenes."""
    seed, split, start, stop = job
    made = []
    for low in range(start, stop, 32):
        scenes = sample(seed, split, np.arange(low, min(low + 32, stop)))
        made += [(f"{split}-{int(index):06d}", found) for index, found in zip(scenes.index, members(scenes))]
    return made
