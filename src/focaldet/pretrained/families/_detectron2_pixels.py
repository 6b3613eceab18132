"""The pixel values that Detectron2's networks take."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, NamedTuple

from focaldet._checks import shortened
from focaldet.errors import CheckpointError

if TYPE_CHECKING:
    from focaldet.pretrained._checkpoint import CheckpointFile
    from focaldet.pretrained.families._settings import Settings

__all__ = ["Pixels", "pixels_of"]

_logger = logging.getLogger(__name__)

_BGR_MEAN = (103.53, 116.28, 123.675)
_RGB_MEAN = _BGR_MEAN[::-1]
_STDS = {"resnext101_32x8d": (57.375, 57.12, 58.395)}  # blue, green, red; others are not divided


class Pixels(NamedTuple):
    """How a network's images are normalised: ``(value - mean) / std``, for values in [0, 255].

    Attributes:
        mean: The mean of red, green and blue, whatever the network's own order.
        std: The standard deviation of red, green and blue.
        is_rgb: Whether the network takes red, green and blue in this order, not blue first.
        said: Whether the file or its settings give mean and std.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    is_rgb: bool
    said: bool


def pixels_of(file: CheckpointFile, settings: Settings, backbone: str) -> Pixels:
    """Return the pixel values, as the tensors or else the settings say, or as in the model zoo.

    Raises:
        CheckpointError: If the values are unusable, or tensors and settings contradict each other.
    """
    mean = _three(file, settings, "pixel_mean", "MODEL.PIXEL_MEAN")
    std = _three(file, settings, "pixel_std", "MODEL.PIXEL_STD")
    said = mean is not None and std is not None
    order = settings.text("INPUT.FORMAT")
    usual_rgb = order == "RGB"
    if mean is None:
        mean = _RGB_MEAN if usual_rgb else _BGR_MEAN
    if std is None:
        std = _STDS.get(backbone, (1.0, 1.0, 1.0))
        std = std[::-1] if usual_rgb else std
    if order is None:
        order = "RGB" if _close(mean, _RGB_MEAN) else "BGR"
        if not _close(mean, _RGB_MEAN) and not _close(mean, _BGR_MEAN):
            _logger.warning(
                "%s has pixel_mean %s, and no config.yaml gives INPUT.FORMAT; BGR images are assumed.",
                file.name or "The file",
                [round(value, 3) for value in mean],
            )
    step = 1 if order == "RGB" else -1
    return Pixels(mean[::step], std[::step], order == "RGB", said)


def _three(
    file: CheckpointFile, settings: Settings, key: str, name: str
) -> tuple[float, ...] | None:
    """Return the mean or standard deviation of the pixels, from the tensors or else the settings."""
    written = settings.numbers(name, 3)
    if key not in file.tensors:
        values = written
    else:
        values = tuple(file.tensors[key].detach().cpu().double().flatten().tolist())
        if written is not None and not _close(values, written):
            raise CheckpointError(
                f"{key} is {list(values)}, but {name} in {settings.source} is {list(written)}. Keep "
                "only the settings of this model beside it."
            )
    if values is None:
        return None
    if len(values) != 3 or not all(map(math.isfinite, values)):
        raise CheckpointError(
            f"{key} is {shortened(list(values))}, but must be three numbers, one per colour."
        )
    if key == "pixel_std" and min(values) <= 0:
        raise CheckpointError(f"{key} is {list(values)}, but must be above 0.")
    return values


def _close(values: tuple[float, ...], others: tuple[float, ...]) -> bool:
    return len(values) == len(others) and all(
        math.isclose(a, b, rel_tol=0, abs_tol=1e-2) for a, b in zip(values, others, strict=True)
    )
