"""What goes into the detector: targets and batches of images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from typing_extensions import ReadOnly, TypedDict

from focaldet._checks import check_boxes, must_be
from focaldet.boxes import scale_boxes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["ImageBatch", "Target", "check_targets"]


class Target(TypedDict):
    """The objects in one image, as a dictionary; torchvision's targets fit, other keys are ignored.

    ``boxes`` is ``[G, 4]``, xyxy in pixels of the image as given, ``[0, 4]`` for an image without
    objects. ``labels`` is ``[G]``, int64 in ``0 .. num_classes - 1`` (there is no background class).
    """

    boxes: ReadOnly[Tensor]
    labels: ReadOnly[Tensor]


class ImageBatch(NamedTuple):
    """Images of one batch, resized, normalised and padded to one size.

    Attributes:
        tensor: ``[B, 3, H, W]``; what lies right of and below an image is zero.
        sizes: ``(height, width)`` of each image in the tensor, without the padding.
        original_sizes: ``(height, width)`` of each image as the caller gave it.
    """

    tensor: Tensor
    sizes: list[tuple[int, int]]
    original_sizes: list[tuple[int, int]]

    def scale_targets(self, targets: Sequence[Target]) -> list[Target]:
        """Return targets whose boxes are in pixels of the batch.

        Args:
            targets: one an image, boxes in pixels of the image as given; unchanged.
        """
        return [
            Target(boxes=scale_boxes(target["boxes"], original_size, size), labels=target["labels"])
            for target, original_size, size in zip(
                targets, self.original_sizes, self.sizes, strict=True
            )
        ]


def check_targets(
    targets: Sequence[Target], sizes: Sequence[tuple[int, int]], num_classes: int
) -> None:
    """Raise unless there is one valid target an image.

    Args:
        targets: one :class:`Target` an image.
        sizes: ``(height, width)`` of each image, in whose pixels its boxes are.
        num_classes: labels must lie in ``0 .. num_classes - 1``.

    Raises:
        TypeError: a target that is not a dictionary of tensors, boxes that are not floating-point,
            labels that are not int64.
        ValueError: more or fewer targets than images, wrong shapes, NaN or infinity, boxes without
            area or outside the image, labels out of range. The message names the image and the box.

    >>> check_targets([{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}], [(5, 5)], 3)
    """
    if len(targets) != len(sizes):
        raise ValueError(
            must_be("targets", f"one per image ({len(sizes)} images)", f"{len(targets)} targets")
        )
    for index, (target, size) in enumerate(zip(targets, sizes, strict=True)):
        name = f"targets[{index}]"
        _check_target_form(name, target)
        _check_target_boxes(f"{name}['boxes']", target["boxes"], size)
        labels = target["labels"]
        wrong = (labels < 0) | (labels >= num_classes)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(
                must_be(
                    f"{name}['labels']",
                    f"in 0..{num_classes - 1} (num_classes={num_classes})",
                    f"{int(labels[i])} at index {i}",
                    "Labels count from 0 and there is no background class.",
                )
            )


def _check_target_form(name: str, target: Any) -> None:
    if not {"boxes", "labels"} <= set(target if isinstance(target, dict) else ()):
        got = sorted(target) if isinstance(target, dict) else type(target).__name__
        raise TypeError(must_be(name, "a dictionary with 'boxes' and 'labels'", got))
    boxes, labels = target["boxes"], target["labels"]
    for key, value in (("boxes", boxes), ("labels", labels)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(must_be(f"{name}['{key}']", "a tensor", type(value).__name__))
    check_boxes(f"{name}['boxes']", boxes)
    if labels.dtype != torch.int64:
        raise TypeError(must_be(f"{name}['labels']", "of dtype torch.int64", labels.dtype))
    if labels.shape != boxes.shape[:1]:
        raise ValueError(
            must_be(f"{name}['labels']", f"of shape [{len(boxes)}], one a box", list(labels.shape))
        )


def _check_target_boxes(name: str, boxes: Tensor, size: tuple[int, int]) -> None:
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    outside = (x1 < 0) | (y1 < 0) | (x2 > width) | (y2 > height)
    for wrong, condition, remedy in (
        (~boxes.isfinite().all(-1), "finite", ""),
        (
            (x2 <= x1) | (y2 <= y1),
            "boxes with x2 > x1 and y2 > y1",
            "Boxes are (x1, y1, x2, y2), not (x, y, width, height).",
        ),
        (
            outside,
            f"inside the image, 0 <= x <= {width} and 0 <= y <= {height}",
            "focaldet.boxes.clip_boxes clips them.",
        ),
    ):
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(must_be(name, condition, f"{boxes[i].tolist()} at index {i}", remedy))
