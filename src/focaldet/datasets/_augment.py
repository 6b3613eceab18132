"""What training does to images and their boxes, made of torchvision's transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from focaldet._checks import check_range, must_be
from focaldet.datasets._tensors import v2

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["train_transform"]

_MEAN_COLOR = (124, 116, 104)  # what is black after the model's normalisation


def train_transform(
    *,
    min_sizes: Sequence[int] = range(640, 801, 32),
    max_size: int = 1333,
    horizontal_flip: float = 0.5,
    color: bool = False,
    large_scale_jitter: int | None = None,
    scale_range: tuple[float, float] = (0.1, 2.0),
    antialias: bool = False,
) -> Any:
    """Return a ``torchvision.transforms.v2.Compose`` for :class:`~focaldet.datasets.DetectionDataset`.

    It ends with images of the size at which they are to be trained, so the model must not resize
    them again: ``model(images, targets, resize=False)``.

    Args:
        min_sizes: the short side, in pixels, is brought to one of these, drawn for each image. One
            number alone is training at one scale.
        max_size: greatest length of the long side.
        horizontal_flip: how often an image is mirrored, 0 to 1.
        color: distort brightness, contrast, saturation, hue and the order of channels, each in half
            of the images.
        large_scale_jitter: side of a square, in pixels, often 1024. Instead of ``min_sizes`` and
            ``max_size``, an image is brought to the size at which it fits the square times a number
            drawn from ``scale_range``, then a square is cut at random, filled up with the mean
            colour where the image is smaller.
        scale_range: of large-scale jitter.
        antialias: of resizing; as in the config of the model, so that it sees the same in training
            and after.

    Boxes are clipped to the image; those under one pixel high or wide there are left out, with their
    labels.

    Raises:
        ValueError: a number out of its range.

    References:
        Lin et al., Focal Loss for Dense Object Detection (flip; scales of 640 to 800 for the longer
        schedule). arXiv:1708.02002. Ghiasi et al., Simple Copy-Paste (large-scale jitter).
        arXiv:2012.07177.

    >>> transform = train_transform(min_sizes=[320], max_size=512, horizontal_flip=0)
    >>> [type(step).__name__ for step in transform.transforms]
    ['RandomShortestSize', 'ClampBoundingBoxes', 'SanitizeBoundingBoxes']
    """
    check_range("horizontal_flip", horizontal_flip, 0, 1)
    steps: list[Any] = []
    if horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(horizontal_flip))
    if color:
        steps.append(v2.RandomPhotometricDistort())
    if large_scale_jitter is None:
        steps.append(_shortest_size(min_sizes, max_size, antialias=antialias))
    else:
        steps += _large_scale_jitter(large_scale_jitter, scale_range, antialias=antialias)
    return v2.Compose([*steps, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])


def _shortest_size(min_sizes: Sequence[int], max_size: int, *, antialias: bool) -> Any:
    if not min_sizes or min(min_sizes) < 1 or max(min_sizes) > max_size:
        got = list(min_sizes)
        raise ValueError(must_be("min_sizes", f"between 1 and max_size ({max_size})", got))
    return v2.RandomShortestSize(list(min_sizes), max_size, antialias=antialias)


def _large_scale_jitter(
    side: int, scale_range: tuple[float, float], *, antialias: bool
) -> list[Any]:
    check_range("large_scale_jitter", side, 1)
    low, high = scale_range
    if not 0 < low <= high:
        raise ValueError(must_be("scale_range", "two numbers, 0 < low <= high", scale_range))
    return [
        v2.ScaleJitter((side, side), scale_range, antialias=antialias),
        v2.RandomCrop((side, side), pad_if_needed=True, fill=_MEAN_COLOR),
    ]
