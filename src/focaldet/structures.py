"""The inputs of the detector: targets and batches of images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import ReadOnly, TypedDict

from focaldet._checks import check_boxes, shortened
from focaldet._uploads import upload
from focaldet.boxes import as_xyxy, scale_boxes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["ImageBatch", "Target", "check_targets"]

_PADDING = -(2**63)  # a label that no class has


class Target(TypedDict):
    """The objects in one image, as a dictionary in torchvision's format. Other keys are ignored.

    ``boxes`` is ``[G, 4]``, xyxy in pixels of the input image, and ``[0, 4]`` for an image without
    objects. ``tv_tensors.BoundingBoxes`` may also be in the format XYWH or CXCYWH. ``labels`` is ``[G]``, int64 in ``0 .. num_classes - 1`` (there is no background class).
    """

    boxes: ReadOnly[Tensor]
    labels: ReadOnly[Tensor]


class ImageBatch(NamedTuple):
    """A batch of images, resized, normalised and padded to one size.

    Attributes:
        tensor: ``[B, C, H, W]``. The padding to the right of and below an image is zero.
        sizes: ``(height, width)`` of each image in the tensor, without the padding.
        original_sizes: ``(height, width)`` of each input image.
    """

    tensor: Tensor
    sizes: list[tuple[int, int]]
    original_sizes: list[tuple[int, int]]

    def scale_targets(self, targets: Sequence[Target]) -> list[Target]:
        """Return targets whose boxes are in pixels of the batch.

        Args:
            targets: One target per image, with boxes in pixels of the input image. They are not
                modified.
        """
        return [
            Target(boxes=scale_boxes(target["boxes"], original_size, size), labels=target["labels"])
            for target, original_size, size in zip(
                targets, self.original_sizes, self.sizes, strict=True
            )
        ]


class PaddedTargets(NamedTuple):
    """The targets of a batch in one tensor each, for devices that compute all images at once.

    Attributes:
        boxes: ``[B, G, 4]``, xyxy, padded with zeros. G is at least 1.
        labels: ``[B, G]`` int64.
        valid: ``[B, G]`` bool, False for padding.
        counts: The number of objects in each image.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor
    counts: list[int]


def pad_targets(targets: Sequence[Target], like: Tensor) -> PaddedTargets:
    """Pad the targets of a batch to the same number of objects, without reading a value.

    Targets on the host are copied to an accelerator in one piece, without waiting.

    Args:
        targets: One :class:`Target` per image.
        like: A tensor whose floating-point dtype and device the result has.
    """
    boxes = [as_xyxy(target["boxes"]).to(like.dtype) for target in targets]
    labels = [target["labels"].long() for target in targets]
    on_host = all(part.device.type == "cpu" for part in (*boxes, *labels))
    if not on_host:
        boxes = [part.to(like.device, non_blocking=True) for part in boxes]
        labels = [part.to(like.device, non_blocking=True) for part in labels]
    counts = [len(part) for part in boxes]
    boxes_BG4 = pad_sequence(boxes, batch_first=True)
    labels_BG = pad_sequence(labels, batch_first=True, padding_value=_PADDING)
    if not max(counts):
        boxes_BG4, labels_BG = (
            F.pad(boxes_BG4, (0, 0, 0, 1)),
            F.pad(labels_BG, (0, 1), value=_PADDING),
        )
    if on_host and like.device.type != "cpu":
        # The bits of a label are one or two floating-point numbers.
        packed = torch.cat((boxes_BG4, labels_BG[..., None].view(like.dtype)), dim=-1)
        packed = upload(packed, like.device)
        boxes_BG4, labels_BG = packed[..., :4], packed[..., 4:].view(torch.int64)[..., 0]
    return PaddedTargets(boxes_BG4, labels_BG, labels_BG != _PADDING, counts)


def check_targets(
    targets: Sequence[Target], sizes: Sequence[tuple[int, int]], num_classes: int
) -> None:
    """Raise unless there is one valid target per image.

    Args:
        targets: One :class:`Target` per image.
        sizes: ``(height, width)`` of each image, in the pixels of its boxes.
        num_classes: The number of classes. Labels must be in ``0 .. num_classes - 1``.

    Raises:
        TypeError: If a target is not a dictionary of tensors, boxes are not floating-point, or labels
            are not int64.
        ValueError: If the number of targets is not that of the images, a shape is wrong, a box has no
            area, is not finite or is outside the image, or a label is out of range. The message
            names the image and the box.

    >>> check_targets([{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}], [(5, 5)], 3)
    """
    if len(targets) != len(sizes):
        raise ValueError(
            f"There must be one target per image, but targets has {len(targets)} for {len(sizes)} "
            f"{'image' if len(sizes) == 1 else 'images'}."
        )
    for index, target in enumerate(targets):
        _check_target_types(f"targets[{index}]", target)
    if not all(target["boxes"].device.type == "cpu" for target in targets):
        faults = [_any_fault(*pair, num_classes) for pair in zip(targets, sizes, strict=True)]
        if not bool(torch.stack([fault.to(faults[0].device) for fault in faults]).any()):
            return  # after one wait
    for index, (target, size) in enumerate(zip(targets, sizes, strict=True)):
        name = f"targets[{index}]"
        _check_target_boxes(f"{name}['boxes']", as_xyxy(target["boxes"]), size)
        labels = target["labels"]
        wrong = (labels < 0) | (labels >= num_classes)
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(
                f"{name}['labels'][{i}] is {int(labels[i])}, but num_classes is {num_classes}. Labels "
                "start at 0, and there is no background class."
            )


def _check_target_types(name: str, target: Any) -> None:
    if not isinstance(target, dict):
        got = type(target).__name__
        raise TypeError(f"{name} must be a dictionary with 'boxes' and 'labels', got a {got}.")
    missing = [key for key in ("boxes", "labels") if key not in target]
    if missing:
        raise TypeError(f"{name} has no {missing[0]!r}, only {shortened(list(target))}.")
    boxes, labels = target["boxes"], target["labels"]
    for key, value in (("boxes", boxes), ("labels", labels)):
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name}['{key}'] must be a tensor, got a {type(value).__name__}.")
    check_boxes(f"{name}['boxes']", as_xyxy(boxes, f"{name}['boxes']"))
    if labels.dtype != torch.int64:
        raise TypeError(f"{name}['labels'] must have dtype torch.int64, got {labels.dtype}.")
    if labels.shape != boxes.shape[:1]:
        raise ValueError(
            f"{name}['labels'] must have shape [{len(boxes)}], one label per box, got "
            f"{list(labels.shape)}."
        )


def _any_fault(target: Target, size: tuple[int, int], num_classes: int) -> Tensor:
    """Return whether :func:`check_targets` would raise for the values of a target, a bool scalar."""
    boxes = as_xyxy(target["boxes"])
    x1, y1, x2, y2 = boxes.unbind(-1)
    inside = (x1 >= 0) & (y1 >= 0) & (x2 <= size[1]) & (y2 <= size[0])
    boxes_right = (inside & (x1 < x2) & (y1 < y2) & boxes.isfinite().all(-1)).all()
    labels = target["labels"].to(boxes.device)
    return ~(boxes_right & ((labels >= 0) & (labels < num_classes)).all())


def _check_target_boxes(name: str, boxes: Tensor, size: tuple[int, int]) -> None:
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    outside = (x1 < 0) | (y1 < 0) | (x2 > width) | (y2 > height)
    no_area = "has no area, or its corners are swapped. Boxes are (x1, y1, x2, y2), not (x, y, width, height)"
    not_inside = (
        f"is not inside the image, which is {height} pixels high and {width} wide. Clip it with "
        "focaldet.boxes.clip_boxes"
    )
    for wrong, fault in (
        (~boxes.isfinite().all(-1), "contains NaN or infinity"),
        ((x2 <= x1) | (y2 <= y1), no_area),
        (outside, not_inside),
    ):
        if wrong.any():
            i = int(wrong.nonzero()[0])
            raise ValueError(f"{name}[{i}] = {boxes[i].tolist()} {fault}.")
