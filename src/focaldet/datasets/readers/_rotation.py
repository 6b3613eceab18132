"""Bounding boxes of rotated boxes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["rotated_bounds"]


def rotated_bounds(box: Sequence[float], degrees: float, pivot: tuple[float, float]) -> list[float]:
    """Return the bounding box of a rotated box.

    Args:
        box: The box (xyxy) before its rotation.
        degrees: The angle of the rotation, clockwise as the image is seen.
        pivot: The point ``(x, y)`` around which the box is rotated.

    >>> [round(side, 6) for side in rotated_bounds([0, 0, 4, 2], 90, (0, 0))]
    [-2.0, 0.0, 0.0, 4.0]
    """
    x1, y1, x2, y2 = box
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    corners = [(x - pivot[0], y - pivot[1]) for x in (x1, x2) for y in (y1, y2)]
    xs = [pivot[0] + x * cosine - y * sine for x, y in corners]
    ys = [pivot[1] + x * sine + y * cosine for x, y in corners]
    return [min(xs), min(ys), max(xs), max(ys)]
