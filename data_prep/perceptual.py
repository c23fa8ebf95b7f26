"""Perceptual hashes of images, the search for near pairs of them (by bands), and the differences of thumbnails.

No step compares all N x N. The thresholds come from 3,500 emoji and 3,000 photographs with re-encoded, resized and
brightened copies: such copies differ by at most 16 of 255 where they differ most, and the most similar distinct pictures
(two skin tones) by 18.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import combinations, pairwise
from math import comb

import imagehash
import numpy as np
from PIL import Image

from data_prep.shards.read import Shard, image_member, pixels
from mmpretrain.config.build import OptionError
from mmpretrain.data.decode import ImageLimits
from mmpretrain.data.schema import IMAGE_EXTENSIONS, BadSample

HASH_DISTANCE = 10  # bits of 64; 99.9% of the copies above are within it
DIFFERENCE = 17.0  # of 255: maximum over places and colours of the mean over 2 x 2 of 32 x 32 pixels
GAIN = 1.12  # maximum factor by which a copy may be brighter or darker
_GAINS = np.arange(1.0, GAIN + 0.001, 0.02, dtype=np.float32)


def bands(distance: int, count: int) -> tuple[int, int]:
    """Chooses (k bands, m of them equal): hashes at most `distance` apart agree in m of k bands of 64 bits if m <= k - distance.

    The choice minimises the work for `count` hashes: a sort and a lookup per table, and the pairs that share a bucket.
    """

    def work(k: int, m: int) -> float:
        return comb(k, m) * (8 * count + count**2 / 2 / 2 ** (64 * m / k))

    return min(((distance + m, m) for m in (1, 2, 3, 4) if distance + m <= 64), key=lambda choice: work(*choice))


def pairs_within(hashes: np.ndarray, distance: int) -> Iterator[np.ndarray]:
    """Finds all pairs of hashes within a distance.

    Memory O(N). Time: comb(k, m) sorts of N, and one comparison per pair that shares a bucket of 64 * m / k bits (see
    `bands`): for distance 10 and hashes of distinct pictures about N * N / 100 at a hundred thousand, N * N / 100,000 per
    table beyond.

    Args:
        hashes: uint64 [N].
        distance: maximum number of different bits.

    Yields:
        int64 [p,2], i < j: together all pairs, some of them repeatedly.

    Raises:
        OptionError: a distance outside 0..32.
    """
    if not 0 <= distance <= 32:
        raise OptionError(f"a hash distance of {distance}: expected 0 to 32 of 64 bits (unrelated pictures lie around 32)")
    k, m = bands(distance, len(hashes))
    edges = [64 * band // k for band in range(k + 1)]
    masks = [((1 << (high - low)) - 1) << low for low, high in pairwise(edges)]
    for band_masks in combinations(masks, m):
        key = hashes & np.uint64(sum(band_masks))
        order = np.argsort(key, kind="stable")
        key, value = key[order], hashes[order]
        start = np.arange(len(key))
        for step in range(1, len(key)):  # compares members of a bucket `step` apart; ends with the largest bucket
            start = start[start + step < len(key)]
            start = start[key[start] == key[start + step]]
            if not len(start):
                break
            near = start[np.bitwise_count(value[start] ^ value[start + step]) <= distance]
            if len(near):
                yield np.sort(np.stack([order[near], order[near + step]], 1), axis=1)


def alike_in_colour(first: np.ndarray, second: np.ndarray, limit: float = DIFFERENCE) -> np.ndarray:
    """Tests whether mean colours, uint8 [p,27] each, allow copies: bool [p]. A fast prefilter; the close comparison follows."""
    return np.abs(first.astype(np.int16) - second).max(1) <= limit + (GAIN - 1) * 255 + 4


def _pooled(difference: np.ndarray) -> np.ndarray:
    """Reduces [..., 32, 32, 3] to the maximum absolute mean over 2 x 2 pixels, [...]."""
    upper, lower = difference[..., ::2, :, :], difference[..., 1::2, :, :]
    total = upper[..., ::2, :] + upper[..., 1::2, :] + lower[..., ::2, :] + lower[..., 1::2, :]  # a quarter of the time of `mean`
    return np.abs(total / 4).max((-3, -2, -1))


def _neighbourhood_maximum(image: np.ndarray) -> np.ndarray:
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = np.maximum(np.maximum(padded[:-2], padded[1:-1]), padded[2:])
    return np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def _residuals(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Computes the residuals of y as x brightened (clipped at white) or darkened by each gain.

    Args:
        x: float32 [32, 32, 3].
        y: float32 [32, 32, 3].

    Returns:
        float32 [2 * gains, 32, 32, 3].
    """
    gains = _GAINS[1:, None, None, None]
    brightest = np.minimum(gains * x, 255)
    beside_white = gains * _neighbourhood_maximum(x) >= 250  # there thumbnail pixels mix clipped and unclipped ones
    darkest = np.where(beside_white, np.minimum(brightest, x), brightest)
    return np.stack([y - np.clip(y, darkest, brightest), y - x / gains], axis=1).reshape(-1, *y.shape)


def difference(first: np.ndarray, second: np.ndarray) -> float:
    """Computes the largest local difference of two thumbnails, apart from brightness.

    The minimum of two values is returned: without a gain, and with the one gain of all pixels and colours that leaves the
    smallest mean difference.

    Args:
        first: uint8 [32,32,3].
        second: uint8 [32,32,3].

    Returns:
        The difference, 0..255.
    """
    a, b = first.astype(np.float32), second.astype(np.float32)
    residuals = np.concatenate([_residuals(a, b), _residuals(b, a)])
    best = residuals[np.abs(residuals).reshape(len(residuals), -1).mean(1).argmin()]
    return float(min(_pooled(a - b), _pooled(best)))


def differences(first: np.ndarray, second: np.ndarray, limit: float = DIFFERENCE, *, brightened: bool = True) -> np.ndarray:
    """Computes `difference` of pairs of thumbnails, and skips the search for a gain where none can reach `limit`.

    Args:
        first: uint8 [p,32,32,3].
        second: uint8 [p,32,32,3] or [1,32,32,3].
        limit: differences above it need not be exact.
        brightened: search for a gain at all.

    Returns:
        float32 [p].
    """
    result = _pooled(first.astype(np.float32) - second.astype(np.float32)).astype(np.float32)
    second = np.broadcast_to(second, first.shape)
    for row in np.flatnonzero((result > limit) & (result <= limit + (GAIN - 1) * 255)) if brightened else ():
        result[row] = difference(first[row], second[row])
    return result


SIGNATURE = np.dtype(
    [
        ("digest", "<u8", 2),  # of width, height and RGB values
        ("hash", "<u8"),
        ("colour", "u1", 27),  # mean RGB of 3 x 3 cells
        ("area", "<u4"),  # pixels
        ("caption", "<u2"),  # characters of the longest caption
    ]
)
GRID = 3
THUMBNAIL = 32  # side of the thumbnails by which candidates are compared
FLAT = 2.0  # standard deviation of a thumbnail below which its hash would be noise
LIMITS = ImageLimits(min_side=1, max_aspect=float("inf"))  # the limits of training do not apply to comparisons


def decoded(shard: Shard, sample: int) -> np.ndarray:
    """Decodes the image of a sample to uint8 [H,W,3]. Raises BadSample."""
    extension = image_member(shard.index.members(sample))
    if extension is None:
        raise BadSample("missing_image", f"it has {', '.join(sorted(shard.index.members(sample)))}; an image is one of {IMAGE_EXTENSIONS}")
    return pixels(shard.read(sample, {extension}).members[extension], LIMITS).permute(1, 2, 0).numpy()


def small(image: np.ndarray) -> np.ndarray:
    """Shrinks uint8 [H,W,3] to a thumbnail [32,32,3], filtered so that resized copies give nearly the same one."""
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS))


def signature(image: np.ndarray, caption: int = 0) -> np.ndarray:
    """Computes the signature of an image.

    Args:
        image: uint8 [H,W,3].
        caption: characters of its longest caption.

    Returns:
        A SIGNATURE scalar.
    """
    result = np.zeros((), SIGNATURE)
    height, width = image.shape[:2]
    image = np.ascontiguousarray(image)
    digest = hashlib.blake2b(f"{width} {height} ".encode(), digest_size=16)
    digest.update(image.data)
    result["digest"] = np.frombuffer(digest.digest(), "<u8")
    thumbnail = small(image)  # phash shrinks to this side itself; passing the thumbnail saves a pass over the image
    picture = Image.fromarray(thumbnail)
    if thumbnail.std((0, 1)).max() >= FLAT:
        result["hash"] = np.packbits(imagehash.phash(picture).hash.ravel()).view("<u8")[0]
    result["colour"] = np.asarray(picture.resize((GRID, GRID), Image.Resampling.BOX)).ravel()
    result["area"], result["caption"] = min(width * height, 2**32 - 1), min(caption, 2**16 - 1)
    return result
