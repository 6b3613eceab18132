"""OpenCV's bilinear resizing by a factor, reimplemented: of floats, and of bytes in fixed point."""

from __future__ import annotations

from typing import Any

import numpy as np

Image = np.ndarray[Any, Any]


def resized_by_factor(image: Image, factor: float) -> Image:
    """Resize ``[H, W, C]`` as ``cv2.resize(image, None, fx=factor, fy=factor)`` does.

    The new sides are rounded to whole pixels, halves to the even number, but pixels are sampled every
    ``1 / factor``. Bytes stay bytes.
    """
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    if (height, width) == image.shape[:2]:
        return image
    left, right, x = _places(image.shape[1], width, factor)
    if image.dtype == np.uint8:
        if factor == 0.5:
            return _blocks_of_four(image, height, width)
        # Beyond the first and last row, OpenCV keeps the weights of the same row twice.
        rows = _places(image.shape[0], height, factor, keep_weights=True)
        return _fixed_point(image, rows, (left, right, x))
    top, bottom, y = _places(image.shape[0], height, factor)
    x, y = x[None, :, None], y[:, None, None]
    upper = image[top][:, left] * (1 - x) + image[top][:, right] * x
    lower = image[bottom][:, left] * (1 - x) + image[bottom][:, right] * x
    resized: Image = upper * (1 - y) + lower * y
    return resized


def _places(
    old: int, new: int, factor: float, *, keep_weights: bool = False
) -> tuple[Image, Image, Image]:
    """Return for each new pixel its two old ones, and the weight of the second."""
    place = ((np.arange(new) + 0.5) * (1 / factor) - 0.5).astype(np.float32)
    low = np.floor(place).astype(int)
    share = place - np.floor(place)
    if not keep_weights:
        share[(low < 0) | (low >= old - 1)] = 0
    return np.clip(low, 0, old - 1), np.clip(low + 1, 0, old - 1), share


def _blocks_of_four(image: Image, height: int, width: int) -> Image:
    """Average blocks of 2x2 pixels with halves up, and parts of one at the edges with halves to even."""
    pixels = image.astype(np.int64)
    result = np.empty((height, width, image.shape[2]), np.uint8)
    for row in range(height):
        for column in range(width):
            block = pixels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            count = block.shape[0] * block.shape[1]
            total = block.sum(axis=(0, 1))
            result[row, column] = (total + 2) >> 2 if count == 4 else np.rint(total / count)
    return result


def _fixed_point(image: Image, rows: Any, columns: Any) -> Image:
    """Interpolate with weights of 11 bits, whose sums lose their last bits on the way."""
    top, bottom, y = rows
    left, right, x = columns
    pixels = image.astype(np.int64)
    first, second = (
        np.rint(share * np.float32(2048)).astype(np.int64)[None, :, None] for share in (1 - x, x)
    )
    across = pixels[:, left] * first + pixels[:, right] * second
    first, second = (
        np.rint(share * np.float32(2048)).astype(np.int64)[:, None, None] for share in (1 - y, y)
    )
    upper = (first * (across[top] >> 4)) >> 16
    lower = (second * (across[bottom] >> 4)) >> 16
    resized: Image = np.clip((upper + lower + 2) >> 2, 0, 255).astype(np.uint8)
    return resized
