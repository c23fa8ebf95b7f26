"""Samples of demo scenes: images, masks, captions and metadata, as pure functions of (seed, split, index). Imports no torch."""

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

JPEG_QUALITY = 92  # without chroma subsampling, which would blur the colours of the textures at 64 pixels
VIRTUAL = 1 << 40  # scenes from this index on are never written: wrong captions describe them
_PALETTE = [0, 0, 0] + [int(v) for v in np.random.Generator(np.random.Philox(1)).integers(60, 256, 3 * len(CLASSES))]


def visible(instances: np.ndarray) -> list[list[tuple[int, int, list[int]]]]:
    """Finds the objects that show at least MIN_VISIBLE pixels.

    Args:
        instances: uint8 [B, S, S], slot + 1 of the topmost object, 0 for the background.

    Returns:
        For each scene, by slot: (slot, pixels, box [x, y, width, height]).
    """
    objects: list[list[tuple[int, int, list[int]]]] = [[] for _ in instances]
    for slot in range(MAX_OBJECTS):
        shown = instances == slot + 1
        lines, columns = shown.any(2), shown.any(1)
        top, bottom = lines.argmax(1).tolist(), (SIDE - lines[:, ::-1].argmax(1)).tolist()
        left, right = columns.argmax(1).tolist(), (SIDE - columns[:, ::-1].argmax(1)).tolist()
        for i, area in enumerate(np.count_nonzero(shown, (1, 2)).tolist()):
            if area >= MIN_VISIBLE:
                objects[i].append((slot, area, [left[i], top[i], right[i] - left[i], bottom[i] - top[i]]))
    return objects


def jpeg(image: np.ndarray) -> bytes:
    """Encodes an image, uint8 [S, S, 3], as a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return file.getvalue()


def mask_png(scenes: Scenes, i: int, instance: np.ndarray) -> bytes:
    """Encodes the classes of scene `i` as an index PNG [S, S]: 0 background, class + 1 of the topmost object."""
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


def _other_scenes(seed: int, split: str, index: np.ndarray) -> list[Description]:
    """Describes, for each scene, a virtual one of the same split and another class.

    An even index and the next lie in one block of labels, so at least one of their classes differs.
    """
    other = VIRTUAL + 2 * index
    other += labels(seed, split, other) == labels(seed, split, index)
    scenes = sample(seed, split, other)
    return _descriptions(scenes, instances(scenes))


def _captioned(scenes: Scenes, shown: list[Description], draws: list[random.Random]) -> list[Description]:
    """Returns the scene that the captions of each sample describe: its own, or for a random share of samples another one."""
    share = SPLITS[scenes.split].wrong_captions
    wrong = np.flatnonzero([draw.random() < share for draw in draws])
    captioned = list(shown)
    if len(wrong):
        for i, other in zip(wrong.tolist(), _other_scenes(scenes.seed, scenes.split, scenes.index[wrong])):
            captioned[i] = other
    return captioned


def _data(scenes: Scenes, i: int, scene: Description, captioned: Description, draw: random.Random) -> dict[str, Any]:
    """Makes the json member of sample `i`, which shows `scene` and whose captions describe `captioned`."""
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
        "captions": captions.captions(captioned, draw),
        "wrong_caption": captioned is not scene,  # for analysis; training must not use it
        "qa": captions.questions(scene, draw),
    }


def members(scenes: Scenes) -> list[dict[str, bytes]]:
    """Returns extension -> data for the sample of each scene."""
    images, instance = render(scenes)
    samples = [{"jpg": jpeg(image)} for image in images]
    if not SPLITS[scenes.split].text:
        return samples
    shown = _descriptions(scenes, instance)
    draws = [_draw(scenes.seed, scenes.split, int(index)) for index in scenes.index]
    captioned = shown if scenes.split == "binding" else _captioned(scenes, shown, draws)
    for i, sample_members in enumerate(samples):
        data = _data(scenes, i, shown[i], captioned[i], draws[i])
        if "label" in data:
            sample_members["cls"] = str(data["label"]).encode()
        sample_members["txt"] = data["captions"][0].encode()
        sample_members["json"] = json.dumps(data, separators=(",", ":")).encode()
        sample_members["mask.png"] = mask_png(scenes, i, instance[i])
    return samples


def chunk(job: tuple[int, str, int, int]) -> list[tuple[str, dict[str, bytes]]]:
    """Renders scenes `start` to `stop - 1`; `job` is (seed, split, start, stop). Returns (key, members) of each."""
    seed, split, start, stop = job
    samples = []
    for low in range(start, stop, 32):
        scenes = sample(seed, split, np.arange(low, min(low + 32, stop)))
        samples += [(f"{split}-{int(index):06d}", data) for index, data in zip(scenes.index, members(scenes))]
    return samples
