"""Resize bytes in the fixed-point arithmetic of OpenCV.

OpenCV's weights have 11 bits. It interpolates along rows exactly. Along columns it then drops 4 bits of
each sum, multiplies it by its weight, drops 16 bits of the product, and rounds away the last 2 bits of
the result.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["resize_as_opencv"]


def resize_as_opencv(
    image: Tensor, size: tuple[int, int], *, factor: float | None = None
) -> Tensor:
    """Resize bytes bilinearly, with a result that is bitwise that of OpenCV's ``cv2.resize``.

    Args:
        image: ``[C, H, W]`` uint8.
        size: ``(height, width)`` of the result.
        factor: The factor that ``cv2.resize`` is given as ``fx`` and ``fy`` instead of the size. None
            uses the ratio of the sizes.

    Returns:
        ``[C, height, width]``, integers in [0, 255].
    """
    old_height, old_width = image.shape[1:]
    height, width = size
    if (old_height, old_width) == size:
        return image
    if factor == 0.5 or (factor is None and (old_height, old_width) == (2 * height, 2 * width)):
        return _halved(image, height, width)
    left, fraction = _source_positions(old_width, width, factor)
    outside = (left < 0) | (left >= old_width - 1)
    columns = _both_neighbours(left, old_width, image.device)
    column_weights = _weights(fraction.masked_fill(outside, 0), image.device)
    top, fraction = _source_positions(old_height, height, factor)
    rows = _both_neighbours(top, old_height, image.device)
    # Beyond the first and last row, the same row is used twice, with weights that OpenCV keeps.
    row_weights = _weights(fraction, image.device)
    if 2 * height < old_height:  # many rows are not needed
        image = image.index_select(1, rows.flatten())
        rows = torch.arange(2 * height, device=image.device).view(2, height)
    # Whole rows of the transposed image are copied, which is faster than single values.
    across = image.transpose(1, 2).contiguous()
    sums = _weighted(across, columns[0], column_weights[0])
    sums += _weighted(across, columns[1], column_weights[1])
    sums = sums.bitwise_right_shift_(4).transpose(1, 2).contiguous()
    upper, lower = (
        _weighted(sums, row, weight).bitwise_right_shift_(16)
        for row, weight in zip(rows, row_weights, strict=True)
    )
    return upper.add_(lower).add_(2).bitwise_right_shift_(2)


def _halved(image: Tensor, height: int, width: int) -> Tensor:
    """Average blocks of 2x2 pixels, as OpenCV does. At odd ends, blocks are smaller."""
    _, old_height, old_width = image.shape
    padding = (0, 2 * width - old_width, 0, 2 * height - old_height)
    pixels = F.pad(image.int(), padding)  # cuts an odd end off if it has no block of its own
    rows = pixels[:, 0::2] + pixels[:, 1::2]
    sums = rows[:, :, 0::2] + rows[:, :, 1::2]
    down, across = (
        (old - 2 * torch.arange(new, device=image.device)).clamp(max=2)
        for old, new in ((old_height, height), (old_width, width))
    )
    counts = down[:, None] * across
    return torch.where(counts == 4, (sums + 2) >> 2, (sums / counts).round().int())


def _source_positions(old: int, new: int, factor: float | None) -> tuple[Tensor, Tensor]:
    """Return where new pixels come from: the pixel before, and the float32 fraction beyond it."""
    step = 1 / (new / old if factor is None else factor)
    places = ((torch.arange(new, dtype=torch.float64) + 0.5) * step - 0.5).float()
    before = places.floor()
    return before.long(), places - before


def _both_neighbours(before: Tensor, count: int, device: torch.device) -> Tensor:
    """Return the pixels before and after each position, ``[2, N]``, with edges repeated."""
    return torch.stack((before, before + 1)).clamp_(0, count - 1).to(device)


def _weights(fraction: Tensor, device: torch.device) -> Tensor:
    """Return the weights of both neighbours in units of 2**-11, ``[2, N, 1]``, halves rounded to even."""
    both = torch.stack((1 - fraction, fraction))
    return (both * 2048).round().int()[:, :, None].to(device)


def _weighted(image: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return image.index_select(1, index).int().mul_(weight)
