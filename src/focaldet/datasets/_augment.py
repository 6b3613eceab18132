"""Augmentation of images and their boxes for training, built from torchvision's transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from focaldet._checks import check_range, shortened
from focaldet.datasets._mosaic import MosaicTransform
from focaldet.datasets._tensors import tv_tensors, v2
from focaldet.transforms import resized_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet.config import RetinaNetConfig

__all__ = ["train_transform"]

_PAPER_SIZES = range(640, 801, 32)
_DEFAULT_MIN_SCALE = 0.8  # of the paper's 800 pixels, these are its 640
_MEAN_COLOR = (124, 116, 104)  # zero after the model's normalisation


def train_transform(
    config: RetinaNetConfig | None = None,
    *,
    min_scale: float | None = None,
    min_sizes: Sequence[int] | None = None,
    max_size: int | None = None,
    keep_ratio: bool | None = None,
    horizontal_flip: float = 0.5,
    vertical_flip: float = 0.0,
    color: bool = False,
    large_scale_jitter: int | None = None,
    scale_range: tuple[float, float] = (0.1, 2.0),
    mosaic: float = 0.0,
    antialias: bool | None = None,
) -> Any:
    """Build a transform for :class:`~focaldet.datasets.DetectionDataset`.

    It is a ``torchvision.transforms.v2.Compose``, unless there are mosaics, for which it needs other
    images of the dataset.

    The transform resizes images to the size for training, so the model must not resize them again:
    ``model(images, targets, resize=False)``. Boxes are clipped to the image. Boxes that are then less
    than one pixel high or wide are removed together with their labels.

    Args:
        config: The config of the model that is trained. The sizes and the way of resizing are taken
            from it, so that training and prediction cannot differ. None takes them from the arguments.

            .. versionadded:: 0.3.0
        min_scale: Smallest length of the short side as a fraction of ``config.min_size``, in (0, 1].
            One of up to six lengths from there to ``config.min_size`` is drawn for each image. 1 means
            training at one scale. None means 0.8. Only with ``config``.

            .. versionadded:: 0.3.0
        min_sizes: Lengths for the short side, in pixels. One is drawn for each image. A single length
            means training at one scale. None means 640, 672, ..., 800. Only without ``config``.
        max_size: Maximum length of the long side, in pixels. None means 1333. Only without ``config``.
        keep_ratio: Whether to keep the aspect ratio. If False, both sides get the length that is drawn
            from ``min_sizes``, and ``max_size`` has no effect. None means True. Only without
            ``config``.

            .. versionadded:: 0.3.0
        horizontal_flip: Probability of mirroring an image left to right.
        vertical_flip: Probability of mirroring an image top to bottom, for photos without an upright
            direction, such as those from a microscope or a satellite.

            .. versionadded:: 0.3.0
        color: Whether to distort brightness, contrast, saturation, hue and the order of channels, each
            in half of the images.
        large_scale_jitter: Side of a square in pixels, often 1024. If given, it replaces ``min_sizes``
            and ``max_size``: an image is resized to fit the square, times a factor drawn from
            ``scale_range``, and a random crop of the square's size is taken. Where the image is
            smaller, the crop is filled with the mean colour.
        scale_range: Minimum and maximum factor for large-scale jitter.
        mosaic: Probability of showing four images in one, for datasets of a few hundred images. The
            mosaic has the size that the image would have alone. The image and three others, drawn
            with replacement from the dataset, fill the rectangles around a point that is drawn at
            least a quarter of each side away from the border. Each shows a random part of its image,
            at a scale drawn between the one at which the image just fills its rectangle and the one
            it would have alone, so that nothing is padded. Boxes are clipped to their rectangle; those
            with less than a tenth of their area left, or less than a pixel wide or high, are
            removed. Mirrors and colours are drawn for each of the four images. The target has the
            ``image_id`` of the first. A mosaic reads four images, so it takes the workers up to four
            times as long. With ``large_scale_jitter`` it is a square of that side.

            .. versionadded:: 0.3.0
        antialias: Whether to antialias when resizing. None means False. Only without ``config``.

    Raises:
        ValueError: If a number is out of range.
        TypeError: If sizes are given both by ``config`` and by an argument, or ``min_scale`` without
            ``config``.

    References:
        Lin et al., Focal Loss for Dense Object Detection (flip; scales of 640 to 800 for the longer
        schedule). arXiv:1708.02002. Ghiasi et al., Simple Copy-Paste (large-scale jitter).
        arXiv:2012.07177. Bochkovskiy et al., YOLOv4 (mosaic; its geometry here is ours).
        arXiv:2004.10934.

    .. versionchanged:: 0.3.0
        Added ``config`` with ``min_scale``, ``keep_ratio`` and ``vertical_flip``.

    >>> from focaldet import RetinaNetConfig
    >>> transform = train_transform(RetinaNetConfig(num_classes=2, min_size=320, max_size=512))
    >>> [type(step).__name__ for step in transform.transforms]
    ['RandomHorizontalFlip', 'RandomShortestSize', 'ClampAndSanitizeBoundingBoxes']
    >>> transform.transforms[1].min_size
    [256, 269, 282, 294, 307, 320]
    """
    check_range("horizontal_flip", horizontal_flip, 0, 1)
    check_range("vertical_flip", vertical_flip, 0, 1)
    check_range("mosaic", mosaic, 0, 1)
    given = {
        name: value
        for name, value in (
            ("min_sizes", min_sizes),
            ("max_size", max_size),
            ("keep_ratio", keep_ratio),
            ("antialias", antialias),
        )
        if value is not None
    }
    sizes = _sizes_of(config, min_scale, given)
    each: list[Any] = []
    if horizontal_flip:
        each.append(v2.RandomHorizontalFlip(horizontal_flip))
    if vertical_flip:
        each.append(v2.RandomVerticalFlip(vertical_flip))
    if color:
        each.append(v2.RandomPhotometricDistort())
    if large_scale_jitter is None:
        if config is None:
            _check_min_sizes(sizes.min_sizes, sizes.max_size if sizes.keep_ratio else None)
        resize = [sizes.resize()]
    else:
        resize = _large_scale_jitter(large_scale_jitter, scale_range, antialias=sizes.antialias)
        sizes = sizes._replace(square=large_scale_jitter)
    single = v2.Compose([*each, *resize, ClampAndSanitizeBoundingBoxes()])
    if not mosaic:
        return single
    return MosaicTransform(
        mosaic,
        each=v2.Compose(each) if each else v2.Identity(),
        sizes=sizes,
        single=single,
        antialias=sizes.antialias,
    )


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


class _Sizes(NamedTuple):
    """The sizes that images are resized to, and how.

    Attributes:
        min_sizes, max_size, keep_ratio, antialias: As in `train_transform`.
        square: Side of the square of large-scale jitter, which replaces the other sizes, or None.
    """

    min_sizes: Sequence[int] = _PAPER_SIZES
    max_size: int = 1333
    keep_ratio: bool = True
    antialias: bool = False
    square: int | None = None

    def draw(self) -> int:
        """Draw one of the lengths."""
        if self.square is not None:
            return self.square
        return self.min_sizes[int(torch.randint(len(self.min_sizes), ()))]

    def resized(self, size: tuple[int, int], length: int) -> tuple[int, int]:
        """Return the size of an image, ``(height, width)``, after it is resized to a length."""
        longest = self.max_size if self.square is None else self.square
        keep_ratio = self.keep_ratio or self.square is not None
        return resized_size(size, length, longest, keep_ratio=keep_ratio)

    def canvas(self, size: tuple[int, int], length: int) -> tuple[int, int]:
        """Return the size of what the model sees of such an image."""
        return self.resized(size, length) if self.square is None else (self.square, self.square)

    def resize(self) -> Any:
        """Build the step that resizes images."""
        if self.keep_ratio:
            return v2.RandomShortestSize(
                list(self.min_sizes), self.max_size, antialias=self.antialias
            )
        return v2.RandomChoice(
            [v2.Resize((side, side), antialias=self.antialias) for side in self.min_sizes]
        )


def _sizes_of(
    config: RetinaNetConfig | None, min_scale: float | None, given: dict[str, Any]
) -> _Sizes:
    """Return the sizes that a config describes, or that were given as arguments."""
    if config is None:
        if min_scale is not None:
            raise TypeError(
                f"min_scale={min_scale} is relative to the min_size of a config, so config is required. "
                "Without one, give min_sizes in pixels."
            )
        return _Sizes(**given)
    if given:
        verb = "was" if len(given) == 1 else "were"
        raise TypeError(
            f"{' and '.join(given)} {verb} given together with config, which says the sizes. Change the "
            "config with config.replace(...), or leave it out."
        )
    scale = _DEFAULT_MIN_SCALE if min_scale is None else min_scale
    check_range("min_scale", scale, 0, 1, low_open=True)
    return _Sizes(
        _lengths(config.min_size, scale), config.max_size, config.keep_ratio, config.antialias
    )


def _lengths(longest: int, scale: float) -> list[int]:
    """Return up to six lengths, evenly spaced from a fraction of the longest one to it."""
    steps = len(_PAPER_SIZES) - 1
    factors = [scale + (1 - scale) * step / steps for step in range(steps + 1)]
    return sorted({max(1, round(longest * factor)) for factor in factors})


def _check_min_sizes(min_sizes: Sequence[int], max_size: int | None) -> None:
    if not min_sizes or min(min_sizes) < 1 or (max_size is not None and max(min_sizes) > max_size):
        limit = "" if max_size is None else f" to max_size={max_size}"
        raise ValueError(
            f"min_sizes must be at least one number from 1{limit}, got {shortened(list(min_sizes))}."
        )


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
