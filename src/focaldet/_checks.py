"""How the project says that an argument is wrong: one grammar, a few shared checks.

Every message reads "`name` must be <condition>; got <value>. <what to do>."
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

_OVERSHOOT = 0.2  # bicubic resizing leaves 0-1 by up to about this much


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


def check_image(name: str, image: Tensor, *, uint8: bool = True, values: bool = True) -> None:
    """Raise unless ``image`` is a ``[3, H, W]`` RGB tensor, uint8 or floating point in [0, 1].

    Args:
        name: what the message calls it.
        image: what to check.
        uint8: whether uint8 will do.
        values: check the values of a floating-point image too, which waits for a GPU to finish.
    """
    if not isinstance(image, torch.Tensor):
        raise TypeError(must_be(name, "a tensor", type(image).__name__))
    if not image.is_floating_point() and not (uint8 and image.dtype == torch.uint8):
        condition = "uint8 or floating point in [0, 1]" if uint8 else "floating point in [0, 1]"
        remedy = "Values from 0 to 255 can be given as " + (
            "image.to(torch.uint8)." if uint8 else "image.float() / 255."
        )
        raise TypeError(must_be(name, condition, image.dtype, remedy))
    shape = list(image.shape)
    if image.ndim != 3 or shape[0] != 3:
        raise ValueError(must_be(name, "of shape [3, H, W]", shape, _shape_remedy(shape)))
    if 0 in shape:
        raise ValueError(must_be(name, "at least one pixel high and wide", shape))
    if values and image.is_floating_point():
        _check_image_values(name, image)


def _shape_remedy(shape: list[int]) -> str:
    if len(shape) == 4:
        return "Give the images of a batch one by one, as list(batch)."
    if len(shape) not in (2, 3):
        return ""
    if len(shape) == 2 or shape[0] == 1:
        return "Repeat a greyscale channel with .expand(3, -1, -1)."
    if shape[0] == 4:
        return "Drop the alpha channel with image[:3]."
    if shape[-1] == 3:
        return "Put channels first with .permute(2, 0, 1)."
    return ""


def _check_image_values(name: str, image: Tensor) -> None:
    low, high = (float(bound) for bound in torch.aminmax(image.detach()))
    got = f"values from {low:g} to {high:g}"
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(must_be(name, "finite", got))
    if low < -_OVERSHOOT:
        remedy = "The model normalises by itself: give the image before mean and std."
    elif high > 1 + _OVERSHOOT:
        remedy = "Divide values from 0 to 255 by 255, or convert them to uint8."
    else:
        return
    raise ValueError(must_be(name, "in [0, 1] if it is floating point", got, remedy))
