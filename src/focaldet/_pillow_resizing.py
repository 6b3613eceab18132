"""Bilinear resizing of bytes exactly as Pillow does it, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["resize_as_pillow", "resize_with_integers"]

_BITS = 22  # of the fractions that stand for the weights


def resize_as_pillow(levels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image of bytes as ``PIL.Image.Image.resize`` does with its bilinear filter.

    Pillow widens the filter where an image shrinks, resizes the rows first and rounds to bytes before
    it resizes the columns. torch's own resizing of bytes has fewer bits for the weights, so that up to
    1% of its values differ by one level.

    Args:
        levels: ``[C, H, W]`` uint8. On the CPU, Pillow itself does the work.
        size: The new ``(height, width)``.

    Returns:
        ``[C, height, width]`` uint8.

    >>> resize_as_pillow(torch.tensor([[[0, 100]]], dtype=torch.uint8), (1, 4))
    tensor([[[  0,  25,  75, 100]]], dtype=torch.uint8)
    """
    if levels.device.type != "cpu":
        return resize_with_integers(levels, size)
    import numpy as np
    from PIL import Image

    def resized(pixels: np.ndarray) -> Tensor:
        image = Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image))

    if len(levels) == 3:  # faster than one channel at a time
        return resized(levels.permute(1, 2, 0).contiguous().numpy()).permute(2, 0, 1).contiguous()
    return torch.stack([resized(plane) for plane in levels.contiguous().numpy()])


def resize_with_integers(levels: Tensor, size: tuple[int, int]) -> Tensor:
    """Implement :func:`resize_as_pillow` in integers, for devices that Pillow does not support.

    Deviation: newer versions of Pillow resize the columns of an image first that is more than 100 times
    as tall as wide. Here the rows always come first.
    """
    height, width = size
    if levels.shape[2] != width:
        levels = _resize_columns(levels.transpose(1, 2), width).transpose(1, 2)
    return _resize_columns(levels, height) if levels.shape[1] != height else levels.contiguous()


def _resize_columns(levels: Tensor, length: int) -> Tensor:
    """Resize ``[C, H, W]`` to ``[C, length, W]``."""
    index, weights = (part.to(levels.device) for part in _taps(levels.shape[1], length))
    sums = torch.full_like(levels[:, index[0]], 1 << (_BITS - 1), dtype=torch.int32)
    for rows, weight in zip(index, weights, strict=True):
        sums += levels[:, rows].int() * weight[:, None]
    return (sums >> _BITS).clamp_(0, 255).byte()


def _taps(old: int, new: int) -> tuple[Tensor, Tensor]:
    """Return the pixels that contribute to each new pixel, ``[taps, new]``, and their weights.

    The weights are triangles about the new pixel's centre, at least one old pixel wide on each side,
    and have :data:`_BITS` fractional bits.
    """
    scale = old / new
    support = max(scale, 1.0)
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale
    first = (centres - support + 0.5).long().clamp(min=0)
    end = (centres + support + 0.5).long().clamp(max=old)
    index = first + torch.arange(2 * math.ceil(support) + 1)[:, None]
    weights = (1 - ((index - centres + 0.5) * (1 / support)).abs()).clamp(min=0)
    weights = torch.where(index < end, weights, 0.0)
    weights /= weights.cumsum(0)[-1]  # one after the other, as Pillow adds them
    return index.clamp(max=old - 1), (weights * (1 << _BITS) + 0.5).floor().int()
