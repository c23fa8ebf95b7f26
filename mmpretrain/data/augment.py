"""6. Photometric operations for a whole batch, on the loader's threads or on the device.

Brightness, contrast, saturation, hue, greyscale and normalisation are affine in colour, so a row's whole chain is ONE 3x4 matrix; blur
and solarize follow in normalised space. Departures from torchvision, which clamps after every operation and turns hue in HSV: values are
clamped once, after the chain; hue is a rotation in YIQ, which keeps luma. Contrast blends with the mean grey of the row's own image, as
torchvision does: the mean passes exactly through affine operations, so it is taken once, before them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.data import buffers

STRIP = 1 << 20  # bytes of float pixels at a time on CPU
LUMA = (0.299, 0.587, 0.114)
_YIQ = ((0.299, 0.587, 0.114), (0.59590059, -0.27455667, -0.32134392), (0.21153661, -0.52273617, 0.31119955))
_FROM_YIQ = torch.linalg.inv(torch.tensor(_YIQ, dtype=torch.float64)).tolist()
SIGMA = (0.1, 2.0)  # pixels; what blur draws from (SimCLR, appendix A)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """[...,3,3] @ [...,3,n] spelled out: library products round differently with the batch, and rows must not depend on their company."""
    return a[..., :, 0:1] * b[..., 0:1, :] + a[..., :, 1:2] * b[..., 1:2, :] + a[..., :, 2:3] * b[..., 2:3, :]


def _luma(colour: Tensor) -> Tensor:
    """[..., 3] -> [...]"""
    return LUMA[0] * colour[..., 0] + LUMA[1] * colour[..., 1] + LUMA[2] * colour[..., 2]


def hue_matrix(turns: Tensor) -> Tensor:
    """Turns of the colour circle, [B] -> [B,3,3]: rotation of the chroma plane of YIQ."""
    to_yiq, from_yiq = (torch.tensor(m, dtype=turns.dtype, device=turns.device) for m in (_YIQ, _FROM_YIQ))
    angle = turns * (2 * math.pi)
    rotation = torch.zeros(len(turns), 3, 3, dtype=turns.dtype, device=turns.device)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = angle.sin(), -angle.sin()
    return _matmul(_matmul(from_yiq, rotation), to_yiq)


def jitter_matrix(mean: Tensor, factors: Tensor, turns: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The colour jitter of each row as (matrix [B,3,3], offset [B,3]), on values in 0..1.

    `mean` [B,3] the image's mean colour; `factors` [B,3] of brightness, contrast, saturation; `turns` [B] of hue; `order` int64 [B,4] which
    operation comes first, second, ...
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


def _strips(images: Tensor) -> Iterator[slice]:
    """Rows [B,3,H,W] to be done at a time: on CPU so few that their floats stay in the cache from one operation to the next."""
    step = max(1, len(images) if images.is_cuda else STRIP // (4 * max(1, images[:1].numel())))
    return (slice(at, at + step) for at in range(0, len(images), step))


def _affine(pixels: Tensor, matrix: Tensor, offset: Tensor, out: Tensor) -> None:
    """uint8 [B,3,H,W] -> float32 `out`: matrix @ colour + offset.

    Plain arithmetic: a matrix product would wake MKL's threads on CPU, and round to TF32 on a GPU that is told to.
    """
    colour, factor = pixels.float(), matrix[..., None, None]
    for c in range(3):
        torch.mul(colour[:, 0], factor[:, c, 0], out=out[:, c])
        out[:, c].addcmul_(colour[:, 1], factor[:, c, 1]).addcmul_(colour[:, 2], factor[:, c, 2]).add_(offset[:, c, None, None])


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B,3,H,W] -> float32 (x/255 - mean) / std."""
    mean_, std_ = (torch.tensor(v, device=pixels.device, dtype=torch.float32)[:, None, None] for v in (mean, std))
    scale, shift = 1 / (255 * std_), -mean_ / std_
    out = buffers.empty(pixels.shape, device=pixels.device)
    for rows in _strips(pixels):
        torch.addcmul(shift, out[rows].copy_(pixels[rows]), scale, out=out[rows])
    return out


def _convolve(images: Tensor, kernel: Sequence[float] | Sequence[Tensor]) -> Tensor:
    """Rows [B,3,H,W] with a kernel, its middle first, along both axes; edges reflected. A weight is a number, or one for each row [B,1].

    A padded image is one line of pixels, so that a step along either axis is an offset; what comes of the padding is cut off.
    """
    reach = len(kernel) - 1
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    line = padded.shape[3]
    pixels = padded.flatten(1)
    for step in (1, line):
        shifted = pixels.unfold(1, pixels.shape[1] - 2 * reach * step, step).unbind(1)
        pixels = shifted[reach] * kernel[0]
        for distance, weight in enumerate(kernel[1:], 1):
            for part in (shifted[reach - distance], shifted[reach + distance]):
                pixels = pixels.addcmul_(part, weight) if isinstance(weight, Tensor) else pixels.add_(part, alpha=weight)
    return pixels.as_strided(images.shape, (pixels.shape[1], padded.shape[2] * line, line, 1))


class Blur:
    """Gaussian blur of rows [B,3,H,W], each by its own `sigma` [B], up to 2 pixels, as far as three sigma; 0 leaves a row alone.

    On CPU each row takes its own reach, in place. On a device all rows take the widest: to know theirs would be to wait for it.
    """

    def __init__(self, sigma: Tensor, height: int, width: int) -> None:
        distance = torch.arange(min(math.ceil(3 * SIGMA[1]), height - 1, width - 1) + 1, device=sigma.device)
        half = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-3)[:, None]) ** 2) * (distance <= (3 * sigma).ceil()[:, None])
        self._half = half / (2 * half.sum(1, keepdim=True) - half[:, :1])  # [B, reach+1], the middle first
        self._kernels = [] if sigma.is_cuda else [half[: math.ceil(3 * s) + 1] for half, s in zip(self._half.tolist(), sigma.tolist())]

    def __call__(self, images: Tensor, rows: slice = slice(None)) -> Tensor:
        """`images` are the rows of this slice."""
        if images.is_cuda:
            return _convolve(images, self._half[rows].T[..., None].unbind())
        for row, kernel in zip(images.split(1), self._kernels[rows]):
            if len(kernel) > 1:
                row.copy_(_convolve(row, kernel))
        return images


def _colour(pixels: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Colour jitter and greyscale of each row of uint8 [B,3,H,W] as (matrix [B,3,3], offset [B,3]), on values in 0..1."""
    B, device = len(pixels), pixels.device
    if "factors" in params:
        average = torch.cat([pixels[rows].float().mean((2, 3)) for rows in _strips(pixels)]) / 255
        matrix, offset = jitter_matrix(average, params["factors"], params["turns"], params["order"])
    else:
        matrix, offset = torch.eye(3, device=device).expand(B, 3, 3), torch.zeros(B, 3, device=device)
    if "grey" in params:
        grey = params["grey"]
        offset = torch.where(grey[:, None], _luma(offset)[:, None], offset)
        row = _luma(matrix.transpose(1, 2))[:, None].expand(-1, 3, -1)
        matrix = torch.where(grey[:, None, None], row, matrix)
    return matrix, offset


def photometric(pixels: Tensor, params: dict[str, Tensor], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B,3,H,W] -> normalised float32 [B,3,H,W].

    `params`, all optional: `factors` [B,3], `turns` [B], `order` [B,4] of the colour jitter; `grey` bool [B]; `sigma` [B] of the blur;
    `solarize` bool [B]. In this order, as in SimCLR, MoCo v3 and BYOL.
    """
    blur = Blur(params["sigma"], *pixels.shape[-2:]) if "sigma" in params else None
    if "factors" in params or "grey" in params:
        mean_, std_ = (torch.tensor(v, device=pixels.device, dtype=torch.float32) for v in (mean, std))
        matrix, offset = _colour(pixels, params)
        matrix, offset = matrix / (255 * std_[:, None]), (offset - mean_) / std_

        def chain(rows: slice, out: Tensor) -> Tensor:
            _affine(pixels[rows], matrix[rows], offset[rows], out)
            for c in range(3):
                out[:, c].clamp_(-mean[c] / std[c], (1 - mean[c]) / std[c])
            return out if blur is None else blur(out, rows)

        if pixels.is_cuda:
            out = chain(slice(None), torch.empty(pixels.shape, device=pixels.device))
        else:  # in memory that the cache holds, unlike that of a batch
            out, strips = buffers.empty(pixels.shape), list(_strips(pixels))
            scratch = torch.empty(pixels[strips[0]].shape)
            for rows in strips:
                out[rows] = chain(rows, scratch[: len(pixels[rows])])
    else:
        out = normalise(pixels, mean, std)
        out = out if blur is None else blur(out)
    if "solarize" in params:
        out = solarize(out, params["solarize"], mean, std)
    return out


def solarize(images: Tensor, rows: Tensor, mean: tuple[float, ...], std: tuple[float, ...], threshold: float = 0.5) -> Tensor:
    """Invert the values from `threshold` on, of normalised images [B,3,H,W] where `rows` (bool [B]) says so. In place."""
    mean_, std_ = (torch.tensor(v, device=images.device, dtype=torch.float32)[:, None, None] for v in (mean, std))
    if images.is_cuda:  # without waiting for the device to count rows
        return torch.where(rows[:, None, None, None] & (images >= (threshold - mean_) / std_), (1 - 2 * mean_) / std_ - images, images)
    at = rows.nonzero()[:, 0]
    if len(at):
        x = images[at]
        images[at] = torch.where(x >= (threshold - mean_) / std_, (1 - 2 * mean_) / std_ - x, x)
    return images
