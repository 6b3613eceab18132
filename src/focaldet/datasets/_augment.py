"""Augmentation of images and their boxes for training, built from torchvision's transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from focaldet._checks import check_range, shortened
from focaldet.datasets._tensors import tv_tensors, v2

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["train_transform"]

_MEAN_COLOR = (124, 116, 104)  # zero after the model's normalisation


def train_transform(
    *,
    min_sizes: Sequence[int] = range(640, 801, 32),
    max_size: int = 1333,
    keep_ratio: bool = True,
    horizontal_flip: float = 0.5,
    color: bool = False,
    large_scale_jitter: int | None = None,
    scale_range: tuple[float, float] = (0.1, 2.0),
    antialias: bool = False,
) -> Any:
    """Build a ``torchvision.transforms.v2.Compose`` for :class:`~focaldet.datasets.DetectionDataset`.

    The transform resizes images to the size for training, so the model must not resize them again:
    ``model(images, targets, resize=False)``. Boxes are clipped to the image. Boxes that are then less
    than one pixel high or wide are removed together with their labels.

    Args:
        min_sizes: Lengths for the short side, in pixels. One is drawn for each image. A single length
            means training at one scale.
        max_size: Maximum length of the long side, in pixels.
        keep_ratio: Whether to keep the aspect ratio. If False, both sides get the length that is drawn
            from ``min_sizes``, and ``max_size`` has no effect. Use the value in the config of the
            model.

            .. versionadded:: 0.3.0
        horizontal_flip: Probability of mirroring an image.
        color: Whether to distort brightness, contrast, saturation, hue and the order of channels, each
            in half of the images.
        large_scale_jitter: Side of a square in pixels, often 1024. If given, it replaces ``min_sizes``
            and ``max_size``: an image is resized to fit the square, times a factor drawn from
            ``scale_range``, and a random crop of the square's size is taken. Where the image is
            smaller, the crop is filled with the mean colour.
        scale_range: Minimum and maximum factor for large-scale jitter.
        antialias: Whether to antialias when resizing. Use the value in the config of the model, so
            that training and prediction resize alike.

    Raises:
        ValueError: If a number is out of range.

    References:
        Lin et al., Focal Loss for Dense Object Detection (flip; scales of 640 to 800 for the longer
        schedule). arXiv:1708.02002. Ghiasi et al., Simple Copy-Paste (large-scale jitter).
        arXiv:2012.07177.

    >>> transform = train_transform(min_sizes=[320], max_size=512, horizontal_flip=0)
    >>> [type(step).__name__ for step in transform.transforms]
    ['RandomShortestSize', 'ClampAndSanitizeBoundingBoxes']
    """
    check_range("horizontal_flip", horizontal_flip, 0, 1)
    steps: list[Any] = []
    if horizontal_flip:
        steps.append(v2.RandomHorizontalFlip(horizontal_flip))
    if color:
        steps.append(v2.RandomPhotometricDistort())
    if large_scale_jitter is None:
        longest = max_size if keep_ratio else None
        steps.append(_resize(min_sizes, longest, antialias=antialias))
    else:
        steps += _large_scale_jitter(large_scale_jitter, scale_range, antialias=antialias)
    return v2.Compose([*steps, ClampAndSanitizeBoundingBoxes()])


class ClampAndSanitizeBoundingBoxes(v2.SanitizeBoundingBoxes):  # type: ignore[misc]  # untyped
    """``v2.ClampBoundingBoxes`` and ``v2.SanitizeBoundingBoxes`` in one step.

    For an image and a target with boxes and labels, it calls their functions directly. The two steps
    search everything that is passed for boxes, which takes several times as long.
    """

    def forward(self, *inputs: Any) -> Any:
        """Return the inputs with clamped boxes, without those that are too small."""
        if not _is_image_and_plain_target(inputs):
            return super().forward(v2.ClampBoundingBoxes()(*inputs))
        image, target = inputs
        boxes = v2.functional.clamp_bounding_boxes(target["boxes"])
        kept, valid = v2.functional.sanitize_bounding_boxes(
            boxes.as_subclass(Tensor),  # each operation on the subclass takes longer
            format=boxes.format,
            canvas_size=boxes.canvas_size,
            min_size=self.min_size,
            min_area=self.min_area,
        )
        boxes = tv_tensors.wrap(kept, like=boxes)
        return image, {**target, "boxes": boxes, "labels": target["labels"][valid]}


def _is_image_and_plain_target(inputs: tuple[Any, ...]) -> bool:
    """Return whether inputs are an image and a target whose only tensors are boxes and labels."""
    if len(inputs) != 2 or type(inputs[0]) is not tv_tensors.Image or type(inputs[1]) is not dict:
        return False
    others = dict(inputs[1])
    boxes, labels = others.pop("boxes", None), others.pop("labels", None)
    return (
        isinstance(boxes, tv_tensors.BoundingBoxes)
        and type(labels) is Tensor
        and labels.shape[:1] == boxes.shape[:1]
        and all(isinstance(value, int | float | str | None) for value in others.values())
    )


def _resize(min_sizes: Sequence[int], max_size: int | None, *, antialias: bool) -> Any:
    """Build the step that resizes images, to squares if ``max_size`` is None."""
    if not min_sizes or min(min_sizes) < 1 or (max_size is not None and max(min_sizes) > max_size):
        limit = "" if max_size is None else f" to max_size={max_size}"
        raise ValueError(
            f"min_sizes must be at least one number from 1{limit}, got {shortened(list(min_sizes))}."
        )
    if max_size is None:
        return v2.RandomChoice([v2.Resize((side, side), antialias=antialias) for side in min_sizes])
    return v2.RandomShortestSize(list(min_sizes), max_size, antialias=antialias)


def _large_scale_jitter(
    side: int, scale_range: tuple[float, float], *, antialias: bool
) -> list[Any]:
    check_range("large_scale_jitter", side, 1)
    low, high = scale_range
    if not 0 < low <= high:
        raise ValueError(
            "scale_range must be two positive numbers, the smaller one first, "
            f"got {shortened(scale_range)}."
        )
    return [
        v2.ScaleJitter((side, side), scale_range, antialias=antialias),
        v2.RandomCrop((side, side), pad_if_needed=True, fill=_MEAN_COLOR),
    ]
