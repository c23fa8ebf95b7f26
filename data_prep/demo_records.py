"""Demo scenes -> the members of a sample. Pure functions of (seed, split, index); imports no torch, so that worker processes start fast."""

from __future__ import annotations

import io
import json
import pickle
import random
import sys

import numpy as np
from PIL import Image

from data_prep import demo_captions
from data_prep.demo_captions import MIN_VISIBLE, Description, Thing
from data_prep.demo_render import render
from data_prep.demo_scenes import CLASS_NAMES, CLASSES, MAX_OBJECTS, SPLITS, Scenes, generator, labels, sample

JPEG_QUALITY = 92  # no chroma subsampling: at 64 pixels it would smear the colours of the textures
VIRTUAL = 1 << 40  # scenes from this index on are never written: wrong captions are taken from them
_PALETTE = [0, 0, 0] + [int(v) for v in np.random.Generator(np.random.Philox(1)).integers(60, 256, 3 * len(CLASSES))]


def visible(instance: np.ndarray) -> list[tuple[int, int, list[int]]]:
    """(slot, pixels, box [x, y, width, height]) of every object that shows MIN_VISIBLE pixels, by slot. instance: uint8 [S, S]."""
    found = []
    for slot in range(MAX_OBJECTS):
        shown = instance == slot + 1
        area = int(np.count_nonzero(shown))
        if area >= MIN_VISIBLE:
            rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
            x, y = int(columns[0]), int(rows[0])
            found.append((slot, area, [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]))
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
    place = demo_captions.place_word(thing.x, thing.y)
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


def _describe(seed: int, split: str, index: int) -> Description:
    scenes = sample(seed, split, np.array([index]))
    return demo_captions.describe(scenes, 0, visible(render(scenes)[1][0]))


def _stranger(seed: int, split: str, index: int) -> Description:
    """Another scene of the split, of another class: an even index and the next lie in one block of labels, so their classes differ."""
    own, other = labels(seed, split, np.array([index]))[0], VIRTUAL + 2 * index
    return _describe(seed, split, other if labels(seed, split, np.array([other]))[0] != own else other + 1)


def members(scenes: Scenes, i: int, image: np.ndarray, instance: np.ndarray) -> dict[str, bytes]:
    """The members of scene i, by extension."""
    split, index = SPLITS[scenes.split], int(scenes.index[i])
    made = {"jpg": jpeg(image)}
    if not split.text:
        return made
    scene = demo_captions.describe(scenes, i, visible(instance))
    draw = _draw(scenes.seed, scenes.split, index)
    data: dict[str, object] = {"background": scene.background, "boxes": _boxes(scene), "objects": [_attributes(t) for t in scene.things]}
    if scenes.split == "binding":
        data |= demo_captions.binding(*scene.things[:2], draw)
        data["captions"] = [data["caption"]]
    else:
        label = int(scenes.label[i])
        wrong = draw.random() < split.wrong_captions
        told = _stranger(scenes.seed, scenes.split, index) if wrong else scene
        data |= {
            "label": label,
            "class": CLASS_NAMES[label],
            "attributes": _attributes(scene.things[0]) | {"background": scene.background, "count": len(scene.things)},
            "captions": demo_captions.captions(told, draw),
            "wrong_caption": wrong,  # for analysis; training must not look
            "qa": demo_captions.questions(scene, draw),
        }
        made["cls"] = str(label).encode()
    made["txt"] = data["captions"][0].encode()
    made["json"] = json.dumps(data, separators=(",", ":")).encode()
    made["mask.png"] = mask_png(scenes, i, instance)
    return made


def chunk(job: tuple[int, str, int, int]) -> list[tuple[str, dict[str, bytes]]]:
    """(seed, split, start, stop) -> (key, members) of those scenes."""
    seed, split, start, stop = job
    made = []
    for low in range(start, stop, 32):
        scenes = sample(seed, split, np.arange(low, min(low + 32, stop)))
        images, instances = render(scenes)
        for i, index in enumerate(scenes.index):
            made.append((f"{split}-{int(index):06d}", members(scenes, i, images[i], instances[i])))
    return made


def serve() -> None:
    """Answer the pickled jobs on stdin with pickled chunks on stdout, until stdin closes: the child's side of `demo._Worker`."""
    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(chunk(job), sys.stdout.buffer, protocol=pickle.HIGHEST_PROTOCOL)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
