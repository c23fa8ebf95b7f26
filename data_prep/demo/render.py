"""The renderer of demo scenes: signed distance tables for shapes, periodic functions for textures, analytic antialiasing.

B scenes, K object slots, S = SIDE pixels. Distances are in pixels, negative inside.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from data_prep.demo.scenes import CLASS_SHAPE, CLASS_TEXTURE, SHAPES, SIDE, SPLITS, TEXTURES, Scenes, generator

_EXTENT, _CELLS = 1.7, 340  # a table spans [-1.7, 1.7] radii in cells of 0.01 radius
_BORDER = np.array([{"ring": 0.14, "cross": 0.19, "star": 0.22}.get(shape, 0.27) for shape in SHAPES])  # width, of the radius
_DOT = 0.33  # radius of a dot, of the period
Floats = np.ndarray


def _polygon(points: Floats, x: Floats, y: Floats) -> Floats:
    """Computes the signed distance to a closed polygon with vertices `points` [V, 2]."""
    nearest = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, -1, 0)):
        ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, np.hypot(wx - t * ex, wy - t * ey))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ex * (y - ay) / (by - ay) + ax)
    return np.where(inside, -nearest, nearest)


def _points(shape: str) -> Floats:
    if shape == "hourglass":
        w, e = 0.16, 0.92
        return np.array([[-e, -e], [e, -e], [w, 0], [e, e], [-e, e], [-w, 0]])
    if shape == "triangle":
        a = np.deg2rad([-90, 30, 150])
        return np.stack([1.1 * np.cos(a), 1.1 * np.sin(a) + 0.2], -1)
    if shape == "star":
        a = np.deg2rad(np.arange(10) * 36 - 90)
        r = np.where(np.arange(10) % 2, 0.5, 1.12)
        return np.stack([r * np.cos(a), r * np.sin(a)], -1)
    if shape == "cross":
        w, e = 0.34, 0.98
        return np.array([[-w, -e], [w, -e], [w, -w], [e, -w], [e, w], [w, w], [w, e], [-w, e], [-w, w], [-e, w], [-e, -w], [-w, -w]])
    raise ValueError(f"{shape} is not a polygon")


@functools.lru_cache(maxsize=1)
def _tables() -> Floats:
    """Tabulates the signed distance to each shape, in radii: float32 [shapes, cells, cells]."""
    line = (np.arange(_CELLS) + 0.5) / _CELLS * 2 * _EXTENT - _EXTENT
    x, y = np.meshgrid(line, line)
    round_ = np.hypot(x, y)
    made = {
        "circle": round_ - 0.92,
        "ring": np.abs(round_ - 0.72) - 0.29,
    }
    return np.stack([made[s] if s in made else _polygon(_points(s), x, y) for s in SHAPES]).astype(np.float32)


def _wave(p: Floats, period: Floats) -> Floats:
    """Computes the signed distance to the edges of stripes of half a period."""
    f = p / period
    return (np.abs(f - np.floor(f) - 0.5) - 0.25) * period


def _texture(name: str, p: Floats, q: Floats, distance: Floats, period: Floats, border: Floats) -> Floats | None:
    """Computes the signed distance to the part in the first colour; None: it covers all. Arrays are [b, W, W] or [b, 1, 1]."""
    if name == "striped":  # across
        return _wave(q, period)
    if name == "barred":  # down
        return _wave(p, period)
    if name == "slanted":
        return _wave((p + q) * np.float32(0.70710678), period)
    if name == "dotted":
        fp, fq = p / period, q / period
        return _DOT * period - period * np.hypot(fp - np.floor(fp) - 0.5, fq - np.floor(fq) - 0.5)
    if name == "checkered":
        a, b = _wave(p, period * 1.1), _wave(q, period * 1.1)
        return np.where(a * b < 0, -1, 1).astype(np.float32) * np.minimum(np.abs(a), np.abs(b))
    if name == "bordered":
        return distance + border
    if name == "split":
        return p
    return None


def _cover(distance: Floats) -> Floats:
    return np.clip(0.5 - distance, 0, 1)  # the part of a pixel that lies inside an edge at that distance


_GRID = (np.arange(SIDE, dtype=np.float32) + 0.5)[None]
_REACH = 1.2  # greatest distance of a shape's edge from its centre, in radii


def _window(scenes: Scenes, rows: np.ndarray, slot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns pixel columns and rows (int [b, W] each) of squares that contain the visible part of each of these objects."""
    width = min(SIDE, 2 * int(np.ceil(_REACH * scenes.radius[rows, slot].max())) + 4)
    span = np.arange(width)

    def lines(centre: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(centre - width / 2).astype(np.int64), 0, SIDE - width)[:, None] + span

    return lines(scenes.x[rows, slot]), lines(scenes.y[rows, slot])


def _distances(scenes: Scenes, rows: np.ndarray, slot: np.ndarray) -> tuple[tuple[Floats, ...], Floats, list[tuple[int, slice, slice]]]:
    """Computes signed distances to the edges of objects, each in a window of W pixels around it.

    Args:
        scenes: B scenes.
        rows: int [b], the scenes.
        slot: int [b], an object of each.

    Returns:
        (x [b, 1, W] and y [b, W, 1] from the centres; signed distances [b, W, W]; (row, lines, columns) of each
        window).
    """

    def of(field: Floats) -> Floats:
        return field[rows, slot].astype(np.float32)[:, None, None]

    radius, angle = of(scenes.radius), of(scenes.angle)
    columns, lines = _window(scenes, rows, slot)
    dx = columns[:, None, :].astype(np.float32) + (0.5 - of(scenes.x))
    dy = lines[:, :, None].astype(np.float32) + (0.5 - of(scenes.y))
    scale = _CELLS / (2 * _EXTENT) / radius
    c, s = np.cos(angle) * scale, np.sin(angle) * scale
    column = np.clip(c * dx + s * dy + _CELLS / 2, 0, _CELLS - 1).astype(np.intp)
    line = np.clip(c * dy - s * dx + _CELLS / 2, 0, _CELLS - 1).astype(np.intp)
    line += CLASS_SHAPE[scenes.category[rows, slot]][:, None, None] * _CELLS
    line *= _CELLS
    line += column
    distance = _tables().take(line, mode="wrap")  # this mode skips the bounds check; all indices are valid
    distance *= radius
    width = columns.shape[1]
    starts = zip(rows.tolist(), lines[:, 0].tolist(), columns[:, 0].tolist())
    return (dx, dy), distance, [(row, slice(top, top + width), slice(left, left + width)) for row, top, left in starts]


def _paint(canvas: Floats, instance: np.ndarray, scenes: Scenes, rows: np.ndarray, slot: np.ndarray) -> None:
    """Paints the object of `slot` (int [b]) into each of `rows` (int [b]); canvas [B, 3, S, S], instance uint8 [B, S, S]."""

    def of(field: Floats) -> Floats:
        return field[rows, slot].astype(np.float32)[:, None, None]

    radius, angle, turn, period = of(scenes.radius), of(scenes.angle), of(scenes.texture_angle), of(scenes.period)
    (dx, dy), distance, windows = _distances(scenes, rows, slot)
    category = scenes.category[rows, slot]
    alpha = _cover(distance)

    phase = scenes.texture_phase[rows, slot].astype(np.float32)[:, :, None, None]
    split = CLASS_TEXTURE[category][:, None, None] == TEXTURES.index("split")
    shift = np.where(split, 0.15 * radius, period)  # a split lies near the middle, the phase of others is arbitrary
    ct, st = np.cos(angle + turn), np.sin(angle + turn)
    p = ct * dx + st * dy + (phase[:, 0] - 0.5) * shift
    q = ct * dy - st * dx + (phase[:, 1] - 0.5) * shift
    border = _BORDER[CLASS_SHAPE[category]].astype(np.float32)[:, None, None] * radius
    first = np.ones_like(distance)
    for texture, name in enumerate(TEXTURES):
        chosen = np.flatnonzero(CLASS_TEXTURE[category] == texture)
        if len(chosen) and (edge := _texture(name, p[chosen], q[chosen], distance[chosen], period[chosen], border[chosen])) is not None:
            first[chosen] = _cover(edge)
    rgb = scenes.rgb[rows, slot].astype(np.float32)  # [b, 2, 3]
    colour = first[:, None] * (rgb[:, 0] - rgb[:, 1])[..., None, None]  # [b, 3, W, W]
    colour += rgb[:, 1, :, None, None]
    shown, number = alpha > 0.5, (slot + 1).astype(np.uint8)
    for b, (row, lines, columns) in enumerate(windows):
        below, change = canvas[row, :, lines, columns], colour[b]
        change -= below
        change *= alpha[b]
        below += change
        np.copyto(instance[row, lines, columns], number[b], where=shown[b])


def _smooth(coarse: Floats) -> Floats:
    """Interpolates [b, n, n] linearly to [b, S, S]."""
    n = coarse.shape[1]
    positions = np.linspace(0, n - 1, SIDE)
    weight = np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(n))).astype(np.float32)  # [S, n]
    return weight @ coarse @ weight.T


def _background(kind: str, rgb: Floats, u: Floats, streams: list[np.random.Generator]) -> Floats:
    """Paints backgrounds of one kind, [b, 3, S, S]; rgb [b, 3], u [b, 24] uniform numbers, one random stream per scene."""
    b = len(rgb)
    canvas = np.broadcast_to(rgb[..., None, None], (b, 3, SIDE, SIDE)).astype(np.float32)
    x, y = (_GRID[:, None, :] / SIDE - 0.5), (_GRID[:, :, None] / SIDE - 0.5)
    a = (u[:, 0] * 2 * np.pi).astype(np.float32)[:, None, None]
    along = np.cos(a) * x + np.sin(a) * y  # [b, S, S]
    strength = (0.6 + 0.8 * u[:, 1]).astype(np.float32)[:, None, None]
    if kind == "gradient":
        return canvas + (strength * 50 * along)[:, None]
    if kind == "cloudy":
        return canvas + (strength * 18 * _smooth(np.stack([g.standard_normal((6, 6), dtype=np.float32) for g in streams])))[:, None]
    if kind == "bands":
        return canvas + (strength * 22 * np.sin(along * (18 + 24 * u[:, 2, None, None]) + 6.28 * u[:, 3, None, None]))[:, None]
    if kind == "vignette":
        away = np.hypot(x - (u[:, 2, None, None] - 0.5), y - (u[:, 3, None, None] - 0.5))
        return canvas + (strength * (40 - 110 * away))[:, None]
    if kind == "coarse":
        return canvas + 22 * np.stack([g.standard_normal((3, 8, 8), dtype=np.float32) for g in streams]).repeat(8, 2).repeat(8, 3)
    if kind == "patches":
        for k in range(4):
            left, top, width, height = (u[:, 4 + 4 * k + j, None, None] for j in range(4))
            inside = (np.abs(x + 0.5 - left) < 0.15 + 0.2 * width) & (np.abs(y + 0.5 - top) < 0.15 + 0.2 * height)
            canvas = canvas + (inside * (60 * u[:, 20 + k] - 30)[:, None, None])[:, None]
    return canvas


def _depths(scenes: Scenes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (rows int [b], slot int [b]) of objects that are painted together, back to front."""
    B = len(scenes.index)
    for depth in range(scenes.order.shape[1]):
        slot = scenes.order[:, depth]
        here = scenes.present[np.arange(B), slot]
        for rows in (np.flatnonzero(here & (slot == 0)), np.flatnonzero(here & (slot > 0))):  # separately: main objects need larger windows
            if len(rows):
                yield rows, slot[rows]


def instances(scenes: Scenes) -> np.ndarray:
    """Returns the instance map of `render` without painting: uint8 [B, S, S], 0 background, k + 1 where slot k is on top."""
    instance = np.zeros((len(scenes.index), SIDE, SIDE), dtype=np.uint8)
    for rows, slot in _depths(scenes):
        _, distance, windows = _distances(scenes, rows, slot)
        shown, number = _cover(distance) > 0.5, (slot + 1).astype(np.uint8)
        for b, (row, lines, columns) in enumerate(windows):
            np.copyto(instance[row, lines, columns], number[b], where=shown[b])
    return instance


def render(scenes: Scenes) -> tuple[np.ndarray, np.ndarray]:
    """Renders scenes.

    Returns:
        (images uint8 [B, S, S, 3]; instance map uint8 [B, S, S]: 0 background, k + 1 where slot k is on top).
    """
    B = len(scenes.index)
    streams = [generator(scenes.seed, scenes.split, int(i), 1) for i in scenes.index]
    canvas = np.empty((B, 3, SIDE, SIDE), dtype=np.float32)
    for number, kind in enumerate(SPLITS[scenes.split].backgrounds):
        chosen = np.flatnonzero(scenes.background_kind == number)
        if len(chosen):
            canvas[chosen] = _background(kind, scenes.background_rgb[chosen], scenes.background_draws[chosen], [streams[i] for i in chosen])
    instance = np.zeros((B, SIDE, SIDE), dtype=np.uint8)
    for rows, slot in _depths(scenes):
        _paint(canvas, instance, scenes, rows, slot)
    light, noise = scenes.light.astype(np.float32), scenes.noise.astype(np.float32)
    images = np.empty((B, SIDE, SIDE, 3), dtype=np.uint8)
    drawn = np.empty((3, SIDE, SIDE), dtype=np.float32)
    for i, stream in enumerate(streams):  # image by image: each stays in the processor's cache
        stream.standard_normal(dtype=np.float32, out=drawn)
        drawn *= noise[i]
        picture = canvas[i]
        picture *= light[i]
        picture += drawn
        picture += 0.5
        np.clip(picture, 0, 255, out=picture)
        images[i] = picture.astype(np.uint8).transpose(1, 2, 0)
    return images, instance
