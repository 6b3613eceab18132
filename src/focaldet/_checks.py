"""How the project says that an argument is wrong: one grammar, a few shared checks.

Every message reads "`name` must be <condition>; got <value>. <what to do>."
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

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


def check_image(
    name: str,
    image: object,
    *,
    dtypes: Literal["float", "float or uint8"] = "float or uint8",
    values: bool = True,
) -> None:
    """Raise unless ``image`` is a ``[3, H, W]`` RGB tensor, uint8 or floating-point in 0-1.

    Args:
        name: what the message calls it.
        image: what to check.
        dtypes: whether uint8 will do.
        values: check the values of a floating-point image too, which waits for a GPU to finish.
    """
    if not isinstance(image, torch.Tensor):
        raise TypeError(must_be(name, "a tensor", type(image).__name__))
    if not image.is_floating_point() and (dtypes == "float" or image.dtype != torch.uint8):
        wanted = "floating-point in 0-1" if dtypes == "float" else "uint8 or floating-point in 0-1"
        remedy = "Divide by 255." if image.dtype == torch.uint8 else ""
        raise TypeError(must_be(name, wanted, image.dtype, remedy))
    if image.ndim != 3 or image.shape[0] != 3:
        remedy = "Convert the image to RGB and put the channels first."
        raise ValueError(must_be(name, "of shape [3, height, width]", list(image.shape), remedy))
    if not image.numel():
        raise ValueError(must_be(name, "of at least one pixel", list(image.shape)))
    if values and image.is_floating_point():
        _check_image_values(name, image)


def _check_image_values(name: str, image: Tensor) -> None:
    low, high = (float(extreme) for extreme in torch.aminmax(image))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(must_be(name, "finite", f"values from {low:g} to {high:g}"))
    if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
        remedy = (
            "Divide 0-255 images by 255."
            if high > 4
            else "The model normalises images itself: don't subtract a mean before."
        )
        raise ValueError(must_be(name, "in 0-1", f"values from {low:g} to {high:g}", remedy))
