"""Checks of arguments that several modules share, with messages that name argument and value."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "check_boxes",
    "check_choice",
    "check_image",
    "check_image_values",
    "check_integer",
    "check_levels",
    "check_maps",
    "check_names",
    "check_number",
    "check_range",
    "check_size",
    "existing_file",
    "existing_folder",
    "is_number",
    "printable",
    "shortened",
]

_OVERSHOOT = 0.2  # bicubic resizing overshoots [0, 1] by up to about this much


def check_range(
    name: str, value: float, low: float, high: float = math.inf, *, low_open: bool = False
) -> None:
    """Raise ``ValueError`` unless ``low <= value <= high`` (``low < value`` if ``low_open``).

    A value that is not a number is a ``TypeError``.

    >>> check_range("gamma", -1.0, 0)
    Traceback (most recent call last):
    ValueError: gamma must be at least 0, got -1.0.
    """
    try:
        if (value > low if low_open else value >= low) and value <= high:
            return
    except TypeError:
        raise TypeError(f"{name} must be a number, got {shortened(value)}.") from None
    if high == math.inf:
        condition = f"greater than {low}" if low_open else f"at least {low}"
    else:
        condition = f"in {'(' if low_open else '['}{low}, {high}]"
    got = shortened(value) if isinstance(value, int) else value
    raise ValueError(f"{name} must be {condition}, got {got}.")


def check_integer(name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is an integer; a bool is not.

    >>> check_integer("num_classes", "80")
    Traceback (most recent call last):
    TypeError: num_classes must be an integer, got '80'.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {shortened(value)}.")


def is_number(value: object) -> bool:
    """Return whether ``value`` is a real number of Python or NumPy; a bool is not."""
    if type(value) in (float, int):  # faster than asking the abstract class
        return True
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_number(name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a real number; a bool, an array or a tensor is not.

    >>> check_number("gamma", "2")
    Traceback (most recent call last):
    TypeError: gamma must be a number, got '2'.
    """
    if not is_number(value):
        remedy = ""
        if isinstance(value, torch.Tensor) or type(value).__name__ == "ndarray":
            remedy = " Convert an array or tensor of one number with .item()."
        raise TypeError(f"{name} must be a number, got {shortened(value)}.{remedy}")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``.

    >>> check_choice("reduction", "avg", ("none", "mean", "sum"))
    Traceback (most recent call last):
    ValueError: Unknown reduction 'avg'; choose 'none', 'mean' or 'sum'.
    """
    choices = tuple(choices)
    if value in choices:
        return
    *others, last = map(repr, choices)
    listed = f"{', '.join(others)} or {last}" if others else last
    raise ValueError(f"Unknown {name} {shortened(value)}; choose {listed}.")


def check_size(name: str, size: Sequence[float]) -> None:
    """Raise ``ValueError`` unless the ``(height, width)`` of an image are both above 0.

    >>> check_size("old_size", (480, 0))
    Traceback (most recent call last):
    ValueError: old_size must be a (height, width) above 0, got (480, 0).
    """
    if len(size) != 2 or not (size[0] > 0 and size[1] > 0):
        raise ValueError(f"{name} must be a (height, width) above 0, got {tuple(size)}.")


def check_names(name: str, names: object) -> tuple[str, ...]:
    """Return names as a tuple, or raise ``TypeError`` unless they are a sequence of strings.

    >>> check_names("class_names", "cat")
    Traceback (most recent call last):
    TypeError: class_names must be a sequence of names, got 'cat'. Pass one name as ('cat',).
    """
    if isinstance(names, str):
        got = shortened(names)
        raise TypeError(
            f"{name} must be a sequence of names, got {got}. Pass one name as ({got},)."
        )
    if not isinstance(names, Iterable):
        raise TypeError(f"{name} must be a sequence of names, got {shortened(names)}.")
    names = tuple(names)
    for i, entry in enumerate(names):
        if not isinstance(entry, str):
            raise TypeError(f"{name}[{i}] must be a string, got {shortened(entry)}.")
    return names


def existing_file(name: str, path: str | os.PathLike[str]) -> Path:
    """Return ``path``, or raise ``FileNotFoundError`` if it is not a file."""
    path = Path(path)
    if not path.is_file():
        what = "This is a folder, not a file" if path.is_dir() else "No such file"
        raise FileNotFoundError(f"{what}: {str(path)!r} ({name}).")
    return path


def existing_folder(name: str, path: str | os.PathLike[str]) -> Path:
    """Return ``path``, or raise ``FileNotFoundError`` if it is not a folder."""
    path = Path(path)
    if not path.is_dir():
        what = "This is a file, not a folder" if path.is_file() else "No such folder"
        raise FileNotFoundError(f"{what}: {str(path)!r} ({name}).")
    return path


def printable(text: str) -> str:
    r"""Return a text whose control characters and other unprintable characters are escaped.

    A name in a file could otherwise send commands to the terminal, or imitate other lines.

    >>> printable("a\x1b[2J.png")
    'a\\x1b[2J.png'
    """
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def shortened(value: object, length: int = 200) -> str:
    """Return the ``repr`` of a value for a message, cut to ``length`` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits, or deep nesting
        text = f"<{type(value).__name__}>"
    return text if len(text) <= length else text[: length - 1] + "…"


def check_boxes(name: str, boxes: Tensor) -> None:
    """Raise unless ``boxes`` is a floating-point tensor of shape ``[N, 4]``."""
    if not isinstance(boxes, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(boxes).__name__}.")
    if not boxes.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {boxes.dtype}.")
    if boxes.ndim != 2 or boxes.shape[-1] != 4:
        raise ValueError(
            f"{name} must have shape [N, 4] (x1, y1, x2, y2), got {list(boxes.shape)}."
        )


def check_maps(name: str, maps: object) -> None:
    """Raise ``TypeError`` if ``maps`` is a tensor, whose images would be taken for maps."""
    if isinstance(maps, torch.Tensor):
        raise TypeError(
            f"{name} must be a list with one map per level, got a tensor of shape {list(maps.shape)}. A "
            "custom backbone returns a list, even of one map."
        )


def check_levels(
    logits: Sequence[Tensor], box_deltas: Sequence[Tensor], anchors: Sequence[Tensor]
) -> None:
    """Raise ``ValueError`` unless the maps of the head and the anchors fit each other at each level."""
    if not logits:
        raise ValueError("logits is empty; pass one tensor per level.")
    if not len(logits) == len(box_deltas) == len(anchors):
        raise ValueError(
            "logits, box_deltas and anchors must each have one tensor per level, got "
            f"{len(logits)}, {len(box_deltas)} and {len(anchors)}."
        )
    first = logits[0].shape
    for level, (scores, deltas, boxes) in enumerate(zip(logits, box_deltas, anchors, strict=True)):
        height, width = scores.shape[-2:]
        num_anchors = len(boxes) // max(1, height * width)
        if (
            num_anchors == 0
            or len(boxes) != height * width * num_anchors
            or scores.shape[:1] != first[:1]
            or scores.shape[1] % num_anchors
            or scores.shape[1] == 0
            or deltas.shape != (first[0], 4 * num_anchors, height, width)
        ):
            raise ValueError(
                f"Level {level} must have logits [B, A * K, H, W], box_deltas [B, A * 4, H, W] and "
                f"anchors [H * W * A, 4] with at least one cell, got {list(scores.shape)}, "
                f"{list(deltas.shape)} and {list(boxes.shape)}."
            )


def check_image(
    name: str,
    image: Tensor,
    *,
    channels: int | None = 3,
    values: bool = True,
) -> None:
    """Raise unless ``image`` is a ``[channels, H, W]`` tensor, uint8 or floating-point in [0, 1].

    Args:
        name: What the message calls the image.
        image: The image to check.
        channels: The number of channels. None accepts any.
        values: Whether to check the values of a floating-point image, which synchronises a GPU.
    """
    if not isinstance(image, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(image).__name__}.")
    if not image.is_floating_point() and image.dtype != torch.uint8:
        raise TypeError(
            f"{name} must be uint8 or floating-point in [0, 1], got {image.dtype}. Convert values from 0 "
            "to 255 with image.to(torch.uint8)."
        )
    shape = list(image.shape)
    if image.ndim != 3 or channels not in (None, shape[0]):
        wanted = "C" if channels is None else channels
        remedy = _shape_remedy(shape, channels)
        raise ValueError(f"{name} must have shape [{wanted}, H, W], got {shape}.{remedy}")
    if 0 in shape:
        raise ValueError(f"{name} has no pixels: its shape is {shape}.")
    if values and image.is_floating_point():
        _check_extremes(name, *_extremes(image).tolist())


def _shape_remedy(shape: list[int], channels: int | None) -> str:
    if len(shape) == 4:
        return " Pass the images of a batch one by one, as list(batch)."
    if channels == 3 and (len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)):
        return " Repeat a greyscale channel with .expand(3, -1, -1)."
    if channels == 1 and len(shape) == 2:
        return " Add the channel with image[None]."
    if len(shape) == 3 and shape[-1] == channels:
        return " Put the channels first with .permute(2, 0, 1)."
    if len(shape) == 3 and channels == 3 and shape[0] > 3:
        return " Keep the red, green and blue channels with image[:3]."
    return ""


def check_image_values(name: str, images: Sequence[Tensor]) -> None:
    """Raise unless the values of floating-point images are in [0, 1], with one wait for a GPU."""
    checked = {i: image for i, image in enumerate(images) if image.is_floating_point()}
    if not checked:
        return
    extremes = [_extremes(image) for image in checked.values()]
    device = extremes[0].device
    rows = torch.stack([each.to(device) for each in extremes]).tolist()
    for i, (low, high) in zip(checked, rows, strict=True):
        _check_extremes(f"{name}[{i}]", low, high)


def _extremes(image: Tensor) -> Tensor:
    """Return the lowest and highest value of an image, ``[2]``."""
    return torch.stack(torch.aminmax(image.detach())).float()


def _check_extremes(name: str, low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name} contains NaN or infinity.")
    if low < -_OVERSHOOT:
        remedy = "The model normalises images itself, so pass them before subtracting a mean."
    elif high > 1 + _OVERSHOOT:
        remedy = "Divide values from 0 to 255 by 255, or convert them to uint8."
    else:
        return
    raise ValueError(
        f"A floating-point image must be in [0, 1], but {name} has values from {low:g} to {high:g}. "
        f"{remedy}"
    )
