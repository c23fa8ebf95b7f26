"""6. Photometric operations for a whole batch, on the loader's threads or on the device.

Brightness, contrast, saturation, hue, greyscale and normalisation are affine in colour, so a row's whole chain is ONE 3x4 matrix; blur
and solarize follow in normalised space. Departures from torchvision, which clamps after every operation and turns hue in HSV: values are
clamped once, after the chain; hue is a rotation in YIQ, which keeps luma. Contrast blends with the mean grey of the row's own image, as
torchvision does: the mean passes exactly through affine operations, so it is taken once, before them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.data import buffers

STRIP = 2 << 20  # bytes of float pixels at a time on CPU: they stay in the cache from one operation to the next
LUMA = (0.299, 0.587, 0.114)
_YIQ = ((0.299, 0.587, 0.114), (0.59590059, -0.27455667, -0.32134392), (0.21153661, -0.52273617, 0.31119955))
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
    to_yiq = torch.tensor(_YIQ, dtype=turns.dtype, device=turns.device)
    angle = turns * (2 * math.pi)
    rotation = torch.zeros(len(turns), 3, 3, dtype=turns.dtype, device=turns.device)
    rotation[:, 0, 0] = 1
    rotation[:, 1, 1] = rotation[:, 2, 2] = angle.cos()
    rotation[:, 1, 2], rotation[:, 2, 1] = angle.sin(), -angle.sin()
    return _matmul(_matmul(torch.linalg.inv(to_yiq), rotation), to_yiq)


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
    matrix, offset = eye, torch.zeros_like(mean)
    rows = torch.arange(B, device=mean.device)
    for position in range(4):
        which = order[:, position]
        step = operations[rows, which]
        current = _matmul(matrix, mean[:, :, None])[..., 0] + offset  # the mean colour so far
        towards = (1 - factors[:, 1]) * _luma(current) * (which == CONTRAST)
        offset = _matmul(step, offset[:, :, None])[..., 0] + towards[:, None]
        matrix = _matmul(step, matrix)
    return matrix, offset


def _affine(pixels: Tensor, matrix: Tensor, offset: Tensor) -> Tensor:
    """uint8 [B,3,H,W] -> float32 [B,3,H,W]: matrix @ colour + offset.

    Plain arithmetic: a matrix product would wake MKL's threads on CPU, and round to TF32 on a GPU that is told to.
    """
    red, green, blue = (pixels[:, c].float() for c in range(3))
    out = torch.empty(pixels.shape, device=pixels.device) if pixels.is_cuda else buffers.empty(pixels.shape)
    factor = matrix[..., None, None]
    for c in range(3):
        torch.mul(red, factor[:, c, 0], out=out[:, c])
        out[:, c].addcmul_(green, factor[:, c, 1]).addcmul_(blue, factor[:, c, 2]).add_(offset[:, c, None, None])
    return out


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B,3,H,W] -> float32 (x/255 - mean) / std."""
    mean_, std_ = (torch.tensor(v, device=pixels.device, dtype=torch.float32)[:, None, None] for v in (mean, std))
    scale, shift = 1 / (255 * std_), -mean_ / std_
    if pixels.is_cuda:
        return torch.addcmul(shift, pixels.float(), scale)
    out, step = buffers.empty(pixels.shape), max(1, STRIP // (4 * max(1, pixels[:1].numel())))
    for strip, part in zip(pixels.split(step), out.split(step)):
        torch.addcmul(shift, part.copy_(strip), scale, out=part)
    return out


def _convolve(images: Tensor, sigma: Tensor, reach: int) -> Tensor:
    """Separable Gaussian of each row, `reach` pixels to either side, weights beyond three sigma zero, edges reflected."""
    distance = torch.arange(reach + 1, device=sigma.device)
    taps = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-3)[:, None]) ** 2) * (distance <= (3 * sigma).ceil()[:, None])  # [B, reach+1]
    taps = (taps / (taps[:, :1] + 2 * taps[:, 1:].sum(1, keepdim=True)))[:, :, None, None, None]
    for axis, pad in ((-1, (reach, reach, 0, 0)), (-2, (0, 0, reach, reach))):
        size = images.shape[axis]
        padded = F.pad(images, pad, mode="reflect")
        images = padded.narrow(axis, reach, size) * taps[:, 0]
        for k in range(1, reach + 1):
            images.addcmul_(padded.narrow(axis, reach - k, size) + padded.narrow(axis, reach + k, size), taps[:, k])
    return images


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of each row [B,3,H,W] by its own `sigma` [B], up to 2 pixels; 0 leaves the row alone.

    On CPU rows of the same reach are done together, in place. On a device all rows take the widest reach: grouping would wait for it.
    """
    limit = min(images.shape[-2:]) - 1
    if images.is_cuda:
        return _convolve(images, sigma, min(math.ceil(3 * SIGMA[1]), limit))
    radius = (3 * sigma).ceil().long().clamp(max=limit)
    for reach in radius.unique().tolist():
        if reach:
            rows = (radius == reach).nonzero()[:, 0]
            images[rows] = _convolve(images[rows], sigma[rows], reach)
    return images


def photometric(pixels: Tensor, params: dict[str, Tensor], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B,3,H,W] -> normalised float32 [B,3,H,W].

    `params`, all optional: `factors` [B,3], `turns` [B], `order` [B,4] of the colour jitter; `grey` bool [B]; `sigma` [B] of the blur;
    `solarize` bool [B]. In this order, as in SimCLR, MoCo v3 and BYOL.
    """
    colour = "factors" in params or "grey" in params
    if not colour:
        out = normalise(pixels, mean, std)
    else:
        B, device = len(pixels), pixels.device
        mean_, std_ = (torch.tensor(v, device=device, dtype=torch.float32) for v in (mean, std))
        if "factors" in params:
            average = torch.stack([pixels[:, c].float().mean((1, 2)) for c in range(3)], 1) / 255
            matrix, offset = jitter_matrix(average, params["factors"], params["turns"], params["order"])
        else:
            matrix, offset = torch.eye(3, device=device).expand(B, 3, 3), torch.zeros(B, 3, device=device)
        if "grey" in params:
            grey = params["grey"]
            offset = torch.where(grey[:, None], _luma(offset)[:, None], offset)
            row = _luma(matrix.transpose(1, 2))[:, None].expand(-1, 3, -1)
            matrix = torch.where(grey[:, None, None], row, matrix)
        out = _affine(pixels, matrix / (255 * std_[:, None]), (offset - mean_) / std_)
        low, high = -mean_ / std_, (1 - mean_) / std_
        out.clamp_(low[:, None, None], high[:, None, None])
    if "sigma" in params:
        out = blur(out, params["sigma"])
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
