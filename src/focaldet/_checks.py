"""How the project says that an argument is wrong: one grammar, a few shared checks.

Every message reads "`name` must be <condition>; got <value>. <what to do>."
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


def must_be(name: str, condition: str, got: object, remedy: str = "") -> str:
    """Build an error message in the project's grammar.

    >>> must_be("gamma", ">= 0", -1.0, "The paper uses 2.")
    '`gamma` must be >= 0; got -1.0. The paper uses 2.'
    """
    return f"`{name}` must be {condition}; got {got}." + (f" {remedy}" if remedy else "")


def check_range(
    name: str, value: float, low: float, high: float = math.inf, *, low_open: bool = False
) -> None:
    """Raise ``ValueError`` unless ``low <= value <= high`` (``low < value`` if ``low_open``)."""
    if (value > low if low_open else value >= low) and value <= high:
        return
    if high == math.inf:
        condition = f"{'>' if low_open else '>='} {low}"
    else:
        condition = f"in {'(' if low_open else '['}{low}, {high}]"
    raise ValueError(must_be(name, condition, value))


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(must_be(name, f"one of {', '.join(map(repr, choices))}", repr(value)))


def check_boxes(name: str, boxes: Tensor) -> None:
    """Raise unless ``boxes`` is a floating-point tensor of shape ``[N, 4]``."""
    if not boxes.is_floating_point():
        raise TypeError(must_be(name, "a floating-point tensor", boxes.dtype))
    if boxes.ndim != 2 or boxes.shape[-1] != 4:
        raise ValueError(must_be(name, "of shape [N, 4] (x1, y1, x2, y2)", list(boxes.shape)))
