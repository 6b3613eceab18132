"""The positions of the windows of an image."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Window", "make_grid"]


@dataclass(frozen=True)
class Window:
    """A part of an image.

    Args:
        left, top, right, bottom: Its edges in pixels of the image, half-open.
        image_size: ``(height, width)`` of the image.
    """

    left: int
    top: int
    right: int
    bottom: int
    image_size: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """The ``(height, width)`` of the window."""
        return self.bottom - self.top, self.right - self.left

    @property
    def edges(self) -> tuple[int, int, int, int]:
        """The window as an xyxy box."""
        return self.left, self.top, self.right, self.bottom

    @property
    def slices(self) -> tuple[slice, slice]:
        """The rows and columns of the window."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    @property
    def inner(self) -> tuple[bool, bool, bool, bool]:
        """Whether the image continues beyond the left, top, right and bottom edge."""
        height, width = self.image_size
        return self.left > 0, self.top > 0, self.right < width, self.bottom < height


def make_grid(
    image_size: tuple[int, int], tile: tuple[int, int], overlap: float
) -> list[list[Window]]:
    """Cover an image with as few equally large windows as overlap enough, in rows.

    The first and the last window of a row or column touch the edges of the image, and those between
    are spaced evenly. No window is larger than the image.

    Args:
        image_size: ``(height, width)`` of the image.
        tile: ``(height, width)`` of a window.
        overlap: The minimum overlap of neighbours, as a fraction of the tile's side in [0, 1).

    >>> [[window.edges for window in row] for row in make_grid((4, 10), (4, 4), 0.25)]
    [[(0, 0, 4, 4), (3, 0, 7, 4), (6, 0, 10, 4)]]
    """
    rows, columns = (
        _starts(side, length, overlap) for side, length in zip(image_size, tile, strict=True)
    )
    height, width = (min(pair) for pair in zip(image_size, tile, strict=True))
    return [
        [Window(left, top, left + width, top + height, image_size) for left in columns]
        for top in rows
    ]


def _starts(side: int, length: int, overlap: float) -> list[int]:
    if length >= side:
        return [0]
    step = max(1, math.floor(length * (1 - overlap)))
    intervals = math.ceil((side - length) / step)
    # Neighbours are at most their average distance, rounded up, apart, which is not above the step.
    return [(side - length) * index // intervals for index in range(intervals + 1)]
