"""Operations on axis-aligned boxes.

Boxes are ``(x1, y1, x2, y2)`` in pixels, continuous and half-open: a box that covers only the first
pixel is ``(0, 0, 1, 1)``, and the width of a box is ``x2 - x1`` (no "+1"). All functions are
differentiable and accept any floating-point dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from focaldet._checks import check_boxes

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "box_area",
    "box_iou",
    "clip_boxes",
    "cxcywh_to_xyxy",
    "generalized_box_iou",
    "paired_box_iou",
    "scale_boxes",
    "xywh_to_xyxy",
    "xyxy_to_cxcywh",
    "xyxy_to_xywh",
]


def box_area(boxes: Tensor) -> Tensor:
    """Compute the areas of boxes.

    Args:
        boxes: ``[..., 4]``, xyxy.

    Returns:
        ``[...]``, in squared pixels; negative where ``x2 < x1`` or ``y2 < y1`` (not both).

    >>> box_area(torch.tensor([[0.0, 0.0, 2.0, 3.0]]))
    tensor([6.])
    """
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Compute the intersection over union of all pairs of boxes.

    Args:
        boxes1: ``[N, 4]``, xyxy.
        boxes2: ``[M, 4]``, xyxy.

    Returns:
        ``[N, M]`` in [0, 1]; 0 (not NaN) for two boxes without area.

    Raises:
        ValueError: If a shape is not ``[N, 4]``.
        TypeError: If boxes are not floating-point.

    >>> box_iou(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]]))
    tensor([[0.3333]])
    """
    check_boxes("boxes1", boxes1)
    check_boxes("boxes2", boxes2)
    return paired_box_iou(boxes1[:, None], boxes2[None])


def paired_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Compute the intersection over union of corresponding boxes.

    Args:
        boxes1: ``[..., 4]``, xyxy.
        boxes2: ``[..., 4]``, xyxy, in a shape that broadcasts with that of ``boxes1``.

    Returns:
        ``[...]`` in [0, 1]; 0 (not NaN) for two boxes without area.

    >>> paired_box_iou(torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 3.0, 2.0]))
    tensor(0.3333)
    """
    left1, top1, right1, bottom1 = boxes1.unbind(-1)  # twice as fast as by corners
    left2, top2, right2, bottom2 = boxes2.unbind(-1)
    width = (torch.minimum(right1, right2) - torch.maximum(left1, left2)).clamp(min=0)
    height = (torch.minimum(bottom1, bottom2) - torch.maximum(top1, top2)).clamp(min=0)
    intersection = width * height
    union = box_area(boxes1) + box_area(boxes2) - intersection
    return torch.where(union > 0, intersection / union, 0.0)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Compute the generalised IoU of corresponding boxes.

    ``GIoU = IoU - (|C| - |union|) / |C|``, where C is the smallest box that encloses both.

    Args:
        boxes1: ``[N, 4]``, xyxy, with ``x2 >= x1`` and ``y2 >= y1``.
        boxes2: ``[N, 4]``, xyxy, with ``x2 >= x1`` and ``y2 >= y1``.

    Returns:
        ``[N]`` in [-1, 1]. As in torchvision, 1e-7 is added to denominators, so that boxes without
        area give finite values and gradients.

    Raises:
        ValueError: If shapes differ or are not ``[N, 4]``.
        TypeError: If boxes are not floating-point.

    References:
        Rezatofighi et al., Generalized Intersection over Union. CVPR 2019, algorithm 1.
        arXiv:1902.09630.

    >>> a = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    >>> generalized_box_iou(a, a + 1.0)  # no overlap; the enclosing box is half empty
    tensor([-0.5000])
    """
    check_boxes("boxes1", boxes1)
    check_boxes("boxes2", boxes2)
    if boxes1.shape != boxes2.shape:
        raise ValueError(
            f"boxes1 and boxes2 must have the same shape, got {list(boxes1.shape)} and "
            f"{list(boxes2.shape)}."
        )
    epsilon = 1e-7
    inner = torch.minimum(boxes1[:, 2:], boxes2[:, 2:]) - torch.maximum(
        boxes1[:, :2], boxes2[:, :2]
    )
    outer = torch.maximum(boxes1[:, 2:], boxes2[:, 2:]) - torch.minimum(
        boxes1[:, :2], boxes2[:, :2]
    )
    intersection = inner.clamp(min=0).prod(-1)
    enclosing = outer.prod(-1)
    union = box_area(boxes1) + box_area(boxes2) - intersection
    return intersection / (union + epsilon) - (enclosing - union) / (enclosing + epsilon)


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Clip boxes to the area of an image.

    Args:
        boxes: ``[..., 4]``, xyxy.
        size: ``(height, width)`` of the image.

    Returns:
        Boxes in the same shape, with ``0 <= x <= width`` and ``0 <= y <= height``.

    >>> clip_boxes(torch.tensor([[-1.0, 2.0, 9.0, 4.0]]), size=(3, 8))
    tensor([[0., 2., 8., 3.]])
    """
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(
        (x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)), dim=-1
    )


def scale_boxes(boxes: Tensor, old_size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Scale boxes of an image to the resized image.

    Args:
        boxes: ``[..., 4]``, xyxy, in pixels of the original image.
        old_size: ``(height, width)`` of the original image.
        new_size: ``(height, width)`` of the resized image.

    Returns:
        Boxes in the same shape, in pixels of the resized image.

    >>> scale_boxes(torch.tensor([[1.0, 1.0, 2.0, 2.0]]), (10, 10), (20, 30))
    tensor([[3., 2., 6., 4.]])
    """
    y, x = new_size[0] / old_size[0], new_size[1] / old_size[1]
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((x1 * x, y1 * y, x2 * x, y2 * y), dim=-1)


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert ``(x1, y1, width, height)``, the COCO format, to ``(x1, y1, x2, y2)``.

    >>> xywh_to_xyxy(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([1., 2., 4., 6.])
    """
    return torch.cat((boxes[..., :2], boxes[..., :2] + boxes[..., 2:]), dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """Convert ``(x1, y1, x2, y2)`` to ``(x1, y1, width, height)``, the COCO format.

    >>> xyxy_to_xywh(torch.tensor([1.0, 2.0, 4.0, 6.0]))
    tensor([1., 2., 3., 4.])
    """
    return torch.cat((boxes[..., :2], boxes[..., 2:] - boxes[..., :2]), dim=-1)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert ``(centre x, centre y, width, height)`` to ``(x1, y1, x2, y2)``.

    >>> cxcywh_to_xyxy(torch.tensor([2.5, 4.0, 3.0, 4.0]))
    tensor([1., 2., 4., 6.])
    """
    half = boxes[..., 2:] / 2
    return torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert ``(x1, y1, x2, y2)`` to ``(centre x, centre y, width, height)``.

    >>> xyxy_to_cxcywh(torch.tensor([1.0, 2.0, 4.0, 6.0]))
    tensor([2.5000, 4.0000, 3.0000, 4.0000])
    """
    size = boxes[..., 2:] - boxes[..., :2]
    return torch.cat((boxes[..., :2] + size / 2, size), dim=-1)
