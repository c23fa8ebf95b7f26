"""Photometric operations (stage 6 of the data pipeline): image by image in the loader's workers, a whole batch at once on a device.

Brightness, contrast, saturation, hue, greyscale and normalisation are affine in colour, so a row's whole chain is ONE
3x4 matrix; blur and solarize follow in normalised space. Departures from torchvision, which clamps after every
operation and changes hue in HSV: values are clamped once, after the chain; hue is a rotation in YIQ, which keeps luma.
Contrast blends with the mean grey of the row's own image, as in torchvision: affine operations map the mean exactly,
so it is computed once, before them.

On CPU, OpenCV does the work in a few calls per image, while the cache holds it. Few calls matter: a hundred short
operations per image would take longer to call than to compute, and threads of one interpreter would wait for each
other between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.data import buffers

cv2.setNumThreads(0)  # the loader's workers run in parallel already
LUMA = (0.299, 0.587, 0.114)
_YIQ = ((0.299, 0.587, 0.114), (0.59590059, -0.27455667, -0.32134392), (0.21153661, -0.52273617, 0.31119955))
_FROM_YIQ = torch.linalg.inv(torch.tensor(_YIQ, dtype=torch.float64)).tolist()
STRIP = 1 << 20  # bytes of float pixels at a time on CPU
SIGMA = (0.1, 2.0)  # pixels; range of the blur's sigma (SimCLR, appendix A)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
Bounds = tuple[tuple[float, ...], tuple[float, ...]]  # lowest and highest value of each channel, normalised


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply [..., 3, 3] @ [..., 3, n] in explicit terms: library products round differently depending on the batch size."""
    return a[..., :, 0:1] * b[..., 0:1, :] + a[..., :, 1:2] * b[..., 1:2, :] + a[..., :, 2:3] * b[..., 2:3, :]


def _luma(colour: Tensor) -> Tensor:
    """Compute the luma of colours [..., 3]."""
    return LUMA[0] * colour[..., 0] + LUMA[1] * colour[..., 1] + LUMA[2] * colour[..., 2]


def hue_matrix(turns: Tensor) -> Tensor:
    """Build the rotation of the chroma plane of YIQ, [B, 3, 3], for turns of the colour circle, [B]."""
    to_yiq, from_yiq = (torch.tensor(m, dtype=turns.dtype, device=turns.device) for m in (_YIQ, _FROM_YIQ))
    angle = turns * (2 * math.pi)
    rotation = torch.zeros(len(turns), 3, 3, dtype=turns.dtype, device=turns.device)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = angle.sin(), -angle.sin()
    return _matmul(_matmul(from_yiq, rotation), to_yiq)


def jitter_matrix(mean: Tensor, factors: Tensor, turns: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Compose the colour jitter of each row, on values in 0..1.

    Args:
        mean: [B, 3], the image's mean colour.
        factors: [B, 3], of brightness, contrast, saturation.
        turns: [B], of hue.
        order: int64 [B, 4], the operation that comes first, second, ...

    Returns:
        (matrix [B, 3, 3], offset [B, 3]).
    """
    B = len(mean)
    eye = torch.eye(3, device=mean.device).expand(B, 3, 3)
    luma = torch.tensor(LUMA, device=mean.device)
    grey = luma.expand(3, 3)  # every channel becomes the luma
    scale = factors[:, :, None, None]
    saturation = scale[:, 2] * eye + (1 - scale[:, 2]) * grey
    operations = torch.stack([scale[:, 0] * eye, scale[:, 1] * eye, saturation, hue_matrix(turns)], 1)  # [B,4,3,3]
    chain = torch.cat([eye, torch.zeros(B, 3, 1, device=mean.device), mean[:, :, None]], 2)  # matrix, offset, and the mean colour so far
    rows = torch.arange(B, device=mean.device)
    for position in range(4):
        which = order[:, position]
        towards = (1 - factors[:, 1]) * _luma(chain[:, :, 4]) * (which == CONTRAST)
        chain = _matmul(operations[rows, which], chain)
        chain[:, :, 3:] += towards[:, None, None]
    return chain[:, :, :3], chain[:, :, 3]


def _colour(pixels: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Compose colour jitter and greyscale of uint8 [B, 3, H, W] as (matrix [B, 3, 3], offset [B, 3]); one row if there are neither."""
    device = pixels.device
    if "factors" in params:
        if device.type == "cpu":
            average = torch.tensor([cv2.mean(image)[:3] for image in pixels.permute(0, 2, 3, 1).numpy()])
        else:
            average = pixels.float().mean((2, 3))
        matrix, offset = jitter_matrix(average / 255, params["factors"], params["turns"], params["order"])
    else:
        matrix, offset = torch.eye(3, device=device)[None], torch.zeros(1, 3, device=device)
    if "grey" in params:
        grey = params["grey"]
        offset = torch.where(grey[:, None], _luma(offset)[:, None], offset)
        row = _luma(matrix.transpose(1, 2))[:, None].expand(-1, 3, -1)
        matrix = torch.where(grey[:, None, None], row, matrix)
    return matrix, offset


def _reach(sigma: float, height: int, width: int) -> int:
    """Return the radius of a blur in pixels: three sigma, limited by what can be reflected at the edges."""
    return min(math.ceil(3 * sigma), height - 1, width - 1)


def _coloured(pixels: Tensor, chain: Tensor) -> Iterator[np.ndarray]:
    """Yield each row of uint8 [B, 3, H, W] as float32 [H, W, 3], transformed by `chain`; valid until the next.

    Args:
        pixels: uint8 [B, 3, H, W].
        chain: [B, 3, 4], or [1, 3, 4] for all rows: it is then applied to as many rows at once as fit the cache, since
            calls dominate for small images.
    """
    images, chains = np.ascontiguousarray(pixels.permute(0, 2, 3, 1).numpy()), chain.numpy()
    B, H, W, _ = images.shape
    step = 1 if len(chains) > 1 else max(1, STRIP // (12 * H * W))
    plain, coloured = np.empty((2, step * H, W, 3), np.float32)  # reused, so that they stay in the cache
    for first in range(0, B, step):
        strip = images[first : first + step].reshape(-1, W, 3)
        np.copyto(plain[: len(strip)], strip)
        cv2.transform(plain[: len(strip)], chains[first % len(chains)], dst=coloured[: len(strip)])
        yield from coloured[: len(strip)].reshape(-1, H, W, 3)


def _one_by_one(pixels: Tensor, chain: Tensor, bounds: Bounds | None, sigma: Tensor | None) -> Tensor:
    """Transform uint8 [B, 3, H, W] on the CPU by `chain` [B or 1, 3, 4], clamp to `bounds`, and blur by `sigma` [B], to float32."""
    out = buffers.empty(pixels.shape)
    sigmas = [0.0] * len(pixels) if sigma is None else sigma.tolist()
    blurred = np.empty((*pixels.shape[2:], 3), np.float32)
    for colour, s, planes in zip(_coloured(pixels, chain), sigmas, out.numpy()):
        if bounds is not None:
            low, high = ((*edge, 0.0) for edge in bounds)  # OpenCV's scalars have four values
            cv2.min(colour, high, dst=colour)  # pyright: ignore[reportCallIssue, reportArgumentType] (stubs lack scalars)
            cv2.max(colour, low, dst=colour)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if s > 0:
            side = 2 * _reach(s, *colour.shape[:2]) + 1
            colour = cv2.GaussianBlur(colour, (side, side), s, dst=blurred, borderType=cv2.BORDER_REFLECT_101)
        cv2.split(colour, list(planes))
    return out


def _together(pixels: Tensor, chain: Tensor, bounds: Bounds | None, sigma: Tensor | None) -> Tensor:
    """Transform, clamp and blur all rows at once on a device, as `_one_by_one` does, without waiting for it.

    It uses plain arithmetic: a matrix product would round to TF32 on a GPU that is configured so.
    """
    colour, factor = pixels.float(), chain[..., None, None]
    out = torch.empty(pixels.shape, device=pixels.device)
    for c in range(3):
        torch.mul(colour[:, 0], factor[:, c, 0], out=out[:, c])
        out[:, c].addcmul_(colour[:, 1], factor[:, c, 1]).addcmul_(colour[:, 2], factor[:, c, 2]).add_(factor[:, c, 3])
        if bounds is not None:
            out[:, c].clamp_(bounds[0][c], bounds[1][c])
    return out if sigma is None else _blur(out, sigma)


def _blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each row [B, 3, H, W] by its own `sigma` [B], with the greatest radius for all.

    A radius per row would have to wait for the device. A padded image is one line of pixels, so that a step along
    either axis is an offset; results in the padding are cut off.
    """
    reach = _reach(SIGMA[1], *images.shape[-2:])
    distance = torch.arange(reach + 1, device=sigma.device)
    half = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-3)[:, None]) ** 2) * (distance <= (3 * sigma).ceil()[:, None])
    weights = (half / (2 * half.sum(1, keepdim=True) - half[:, :1])).T[..., None]  # [reach+1,B,1], the middle first
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    line = padded.shape[3]
    pixels = padded.flatten(1)
    for step in (1, line):
        shifted = pixels.unfold(1, pixels.shape[1] - 2 * reach * step, step).unbind(1)
        pixels = shifted[reach] * weights[0]
        for far in range(1, reach + 1):
            pixels.addcmul_(shifted[reach - far], weights[far]).addcmul_(shifted[reach + far], weights[far])
    return pixels.as_strided(images.shape, (pixels.shape[1], padded.shape[2] * line, line, 1))


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalise uint8 [B, 3, H, W] to float32 (x/255 - mean) / std."""
    return photometric(pixels, {}, mean, std)


def photometric(pixels: Tensor, params: dict[str, Tensor], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Apply the photometric operations and normalise: uint8 [B, 3, H, W] -> float32 [B, 3, H, W].

    Args:
        pixels: uint8 [B, 3, H, W].
        params: all optional and applied in this order, as in SimCLR, MoCo v3 and BYOL: `factors` [B, 3], `turns` [B]
            and `order` [B, 4] of the colour jitter; `grey` bool [B]; `sigma` [B] of the blur; `solarize` bool [B].
        mean: of the normalisation, per channel.
        std: of the normalisation, per channel.
    """
    mean_, std_ = (torch.tensor(v, device=pixels.device, dtype=torch.float32) for v in (mean, std))
    matrix, offset = _colour(pixels, params)
    chain = torch.cat([matrix / (255 * std_[:, None]), ((offset - mean_) / std_)[:, :, None]], 2)
    changes = "factors" in params or "grey" in params
    low, high = (tuple((edge - m) / s for m, s in zip(mean, std)) for edge in (0, 1))
    bounds = (low, high) if changes else None
    apply = _one_by_one if pixels.device.type == "cpu" else _together
    out = apply(pixels, chain, bounds, params.get("sigma"))
    if "solarize" in params:
        out = solarize(out, params["solarize"], mean, std)
    return out


def solarize(images: Tensor, rows: Tensor, mean: tuple[float, ...], std: tuple[float, ...], threshold: float = 0.5) -> Tensor:
    """Invert, in place, the values from `threshold` on, in the rows selected by `rows`.

    Args:
        images: normalised [B, 3, H, W].
        rows: bool [B].
        mean: of the normalisation, per channel.
        std: of the normalisation, per channel.
        threshold: in 0..1.
    """
    mean_, std_ = (torch.tensor(v, device=images.device, dtype=torch.float32)[:, None, None] for v in (mean, std))
    if images.is_cuda:  # without waiting for the device to count rows
        return torch.where(rows[:, None, None, None] & (images >= (threshold - mean_) / std_), (1 - 2 * mean_) / std_ - images, images)
    chosen = rows.nonzero()[:, 0]
    if len(chosen):
        x = images[chosen]
        images[chosen] = torch.where(x >= (threshold - mean_) / std_, (1 - 2 * mean_) / std_ - x, x)
    return images
