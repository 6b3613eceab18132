"""Operations on axis-aligned boxes.

Boxes are ``(x1, y1, x2, y2)`` in pixels, continuous and half-open: a box that covers only the first
pixel is ``(0, 0, 1, 1)``, and the width of a box is ``x2 - x1`` (no "+1"). All functions are
differentiable and accept any floating-point dtype.

torchvision's ``tv_tensors.BoundingBoxes`` state their own format. All functions of focaldet that take
boxes convert them by it with :func:`as_xyxy` and return plain tensors.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from focaldet._checks import check_boxes, check_size

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "as_xyxy",
    "box_area",
    "box_iou",
    "clip_boxes",
    "complete_box_iou",
    "cxcywh_to_xyxy",
    "distance_box_iou",
    "generalized_box_iou",
    "paired_box_iou",
    "scale_boxes",
    "xywh_to_xyxy",
    "xyxy_to_cxcywh",
    "xyxy_to_xywh",
]

_EPSILON = 1e-7  # added to denominators


def as_xyxy(boxes: Tensor, name: str = "boxes") -> Tensor:
    """Return boxes as a plain xyxy tensor, converted if they state a different format.

    Args:
        boxes: ``[..., 4]``, xyxy, or ``tv_tensors.BoundingBoxes`` in the format XYXY, XYWH or CXCYWH.
        name: What an error calls the boxes.

    Returns:
        ``[..., 4]``, xyxy. A plain tensor is returned as it is.

    Raises:
        TypeError: If boxes are not a tensor.
        ValueError: If the last dimension is not 4, or the boxes are rotated.

    .. versionadded:: 0.3.0

    >>> from torchvision.tv_tensors import BoundingBoxes
    >>> box = BoundingBoxes([[5, 5, 30, 30]], format="XYWH", canvas_size=(48, 64))
    >>> as_xyxy(box)
    tensor([[ 5,  5, 35, 35]])
    """
    return _to_xyxy(name, boxes, "XYXY")


def _to_xyxy(name: str, boxes: Tensor, assumed: str) -> Tensor:
    """Convert boxes by the format that they state, or by ``assumed`` if they are a plain tensor."""
    if not isinstance(boxes, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(boxes).__name__}.")
    box_format = getattr(boxes, "format", None)
    if box_format is not None:
        assumed = str(getattr(box_format, "value", box_format))
        if assumed not in _FORMATS:
            raise ValueError(
                f"{name} has the format {assumed}, but only XYXY, XYWH and CXCYWH are supported. "
                "Enclose rotated boxes in upright ones first."
            )
        boxes = boxes.as_subclass(torch.Tensor)
    if boxes.ndim == 0 or boxes.shape[-1] != 4:
        wanted = "[N, 4]" if boxes.ndim == 2 else "[..., 4]"
        raise ValueError(
            f"{name} must have shape {wanted} ({_FORMATS[assumed]}), got {list(boxes.shape)}."
        )
    if assumed == "XYXY":
        return boxes
    if assumed == "XYWH":
        return torch.cat((boxes[..., :2], boxes[..., :2] + boxes[..., 2:]), dim=-1)
    half = boxes[..., 2:] / 2
    return torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), dim=-1)


_FORMATS = {
    "XYXY": "x1, y1, x2, y2",
    "XYWH": "x1, y1, width, height",
    "CXCYWH": "centre x, centre y, width, height",
}


def at_least_float32(values: Tensor) -> Tensor:
    """Return floating-point values in a dtype that is precise enough for geometry."""
    if values.dtype in (torch.float32, torch.float64):
        return values  # without an operation in a traced graph
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _widened(boxes: Tensor) -> Tensor:
    """Return boxes in a dtype that holds their areas: float32 at least, or int64."""
    return at_least_float32(boxes) if boxes.is_floating_point() else boxes.long()


def box_area(boxes: Tensor) -> Tensor:
    """Compute the areas of boxes.

    Args:
        boxes: ``[..., 4]``, xyxy.

    Returns:
        ``[...]``, in squared pixels; negative where ``x2 < x1`` or ``y2 < y1`` (not both). Areas of
        half-precision boxes are float32, and those of integer boxes int64, because 256x256 pixels
        already overflow float16.

    .. versionchanged:: 0.3.0
        Areas of half-precision and small integer boxes no longer overflow.

    >>> box_area(torch.tensor([[0.0, 0.0, 2.0, 3.0]]))
    tensor([6.])
    """
    return _area(_widened(as_xyxy(boxes)))


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Compute the intersection over union of all pairs of boxes.

    Args:
        boxes1: ``[N, 4]``, xyxy.
        boxes2: ``[M, 4]``, xyxy.

    Returns:
        ``[N, M]`` in [0, 1], in the dtype of the boxes but computed in float32 at least; 0 (not NaN)
        for two boxes without area.

    Raises:
        ValueError: If a shape is not ``[N, 4]``.
        TypeError: If boxes are not floating-point.

    >>> box_iou(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]]))
    tensor([[0.3333]])
    """
    boxes1, boxes2 = as_xyxy(boxes1, "boxes1"), as_xyxy(boxes2, "boxes2")
    check_boxes("boxes1", boxes1)
    check_boxes("boxes2", boxes2)
    return paired_box_iou(boxes1[:, None], boxes2[None])


def paired_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Compute the intersection over union of corresponding boxes.

    Args:
        boxes1: ``[..., 4]``, xyxy.
        boxes2: ``[..., 4]``, xyxy, in a shape that broadcasts with that of ``boxes1``.

    Returns:
        ``[...]`` in [0, 1], in the dtype of the boxes but computed in float32 at least; 0 (not NaN)
        for two boxes without area.

    >>> paired_box_iou(torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 3.0, 2.0]))
    tensor(0.3333)
    """
    boxes1, boxes2 = as_xyxy(boxes1, "boxes1"), as_xyxy(boxes2, "boxes2")
    dtype = torch.promote_types(boxes1.dtype, boxes2.dtype)
    boxes1, boxes2 = _widened(boxes1), _widened(boxes2)
    left1, top1, right1, bottom1 = boxes1.unbind(-1)  # twice as fast as by corners
    left2, top2, right2, bottom2 = boxes2.unbind(-1)
    width = (torch.minimum(right1, right2) - torch.maximum(left1, left2)).clamp(min=0)
    height = (torch.minimum(bottom1, bottom2) - torch.maximum(top1, top2)).clamp(min=0)
    intersection = width * height
    union = _area(boxes1) + _area(boxes2) - intersection
    iou = torch.where(union > 0, intersection / union, 0.0)
    return iou.to(dtype) if dtype.is_floating_point else iou


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Compute the generalised IoU of corresponding boxes.

    ``GIoU = IoU - (|C| - |union|) / |C|``, where C is the smallest box that encloses both.

    Args:
        boxes1: ``[N, 4]``, xyxy, with ``x2 >= x1`` and ``y2 >= y1``.
        boxes2: ``[N, 4]``, xyxy, with ``x2 >= x1`` and ``y2 >= y1``.

    Returns:
        ``[N]`` in [-1, 1], in the dtype of the boxes but computed in float32 at least. As in
        torchvision, 1e-7 is added to denominators, so that boxes without area give finite values and
        gradients.

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
    boxes1, boxes2, dtype = _corresponding(boxes1, boxes2)
    intersection, union, outer = _overlap(boxes1, boxes2)
    enclosing = outer.prod(-1)
    giou = intersection / (union + _EPSILON) - (enclosing - union) / (enclosing + _EPSILON)
    return giou.to(dtype)


def distance_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Compute the distance IoU of corresponding boxes.

    ``DIoU = IoU - d^2 / c^2``, where d is the distance between the centres and c the diagonal of the
    smallest box that encloses both.

    Args:
        boxes1: ``[N, 4]``, xyxy, with ``x2 >= x1`` and ``y2 >= y1``.
        boxes2: ``[N, 4]``, xyxy, with ``x2 >= x1`` and ``y2 >= y1``.

    Returns:
        ``[N]`` in [-1, 1], with the dtype and precision of :func:`generalized_box_iou`.

    Raises:
        ValueError: If shapes differ or are not ``[N, 4]``.
        TypeError: If boxes are not floating-point.

    References:
        Zheng et al., Distance-IoU Loss, equation 7. AAAI 2020. arXiv:1911.08287.

    .. versionadded:: 0.3.0

    >>> a = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    >>> distance_box_iou(a, a + 1.0)  # no overlap; the centres are half the diagonal apart
    tensor([-0.2500])
    """
    boxes1, boxes2, dtype = _corresponding(boxes1, boxes2)
    return _distance_iou(boxes1, boxes2)[0].to(dtype)


def complete_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Compute the complete IoU of corresponding boxes.

    ``CIoU = DIoU - alpha * v``, where v compares the aspect ratios and alpha is a weight that has no
    gradient.

    Args:
        boxes1: ``[N, 4]``, xyxy, with ``x2 >= x1`` and ``y2 > y1``.
        boxes2: ``[N, 4]``, xyxy, with ``x2 >= x1`` and ``y2 > y1``.

    Returns:
        ``[N]``, at most 1, with the dtype and precision of :func:`generalized_box_iou`.

    Raises:
        ValueError: If shapes differ or are not ``[N, 4]``.
        TypeError: If boxes are not floating-point.

    References:
        Zheng et al., Distance-IoU Loss, equations 8 to 11. AAAI 2020. arXiv:1911.08287.

    .. versionadded:: 0.3.0

    >>> wide, high = torch.tensor([[0.0, 1.0, 4.0, 3.0]]), torch.tensor([[1.0, 0.0, 3.0, 4.0]])
    >>> complete_box_iou(wide, high) < distance_box_iou(wide, high)
    tensor([True])
    """
    boxes1, boxes2, dtype = _corresponding(boxes1, boxes2)
    diou, iou = _distance_iou(boxes1, boxes2)
    angle1, angle2 = (
        torch.atan((boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1]))
        for boxes in (boxes1, boxes2)
    )
    v = 4 / math.pi**2 * (angle2 - angle1) ** 2
    with torch.no_grad():
        alpha = v / (1 - iou + v + _EPSILON)
    return (diou - alpha * v).to(dtype)


def _corresponding(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Check pairs of boxes, and return them in float32 at least, with the dtype of the result."""
    boxes1, boxes2 = as_xyxy(boxes1, "boxes1"), as_xyxy(boxes2, "boxes2")
    check_boxes("boxes1", boxes1)
    check_boxes("boxes2", boxes2)
    if boxes1.shape != boxes2.shape:
        raise ValueError(
            f"boxes1 and boxes2 must have the same shape, got {list(boxes1.shape)} and "
            f"{list(boxes2.shape)}."
        )
    return _widened(boxes1), _widened(boxes2), torch.promote_types(boxes1.dtype, boxes2.dtype)


def _overlap(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the areas of the intersections and unions, ``[N]``, and the enclosing sizes ``[N, 2]``."""
    inner = torch.minimum(boxes1[:, 2:], boxes2[:, 2:]) - torch.maximum(
        boxes1[:, :2], boxes2[:, :2]
    )
    outer = torch.maximum(boxes1[:, 2:], boxes2[:, 2:]) - torch.minimum(
        boxes1[:, :2], boxes2[:, :2]
    )
    intersection = inner.clamp(min=0).prod(-1)
    return intersection, _area(boxes1) + _area(boxes2) - intersection, outer


def _distance_iou(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance IoU and the IoU of corresponding boxes."""
    intersection, union, outer = _overlap(boxes1, boxes2)
    iou = intersection / (union + _EPSILON)
    offset = (boxes1[:, :2] + boxes1[:, 2:] - boxes2[:, :2] - boxes2[:, 2:]) / 2
    return iou - (offset**2).sum(-1) / ((outer**2).sum(-1) + _EPSILON), iou


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
    x1, y1, x2, y2 = as_xyxy(boxes).unbind(-1)
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

    Raises:
        ValueError: If a side of the original image is not above 0.

    >>> scale_boxes(torch.tensor([[1.0, 1.0, 2.0, 2.0]]), (10, 10), (20, 30))
    tensor([[3., 2., 6., 4.]])
    """
    check_size("old_size", old_size)
    y, x = new_size[0] / old_size[0], new_size[1] / old_size[1]
    x1, y1, x2, y2 = as_xyxy(boxes).unbind(-1)
    return torch.stack((x1 * x, y1 * y, x2 * x, y2 * y), dim=-1)


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert ``(x1, y1, width, height)``, the COCO format, to ``(x1, y1, x2, y2)``.

    >>> xywh_to_xyxy(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([1., 2., 4., 6.])
    """
    return _to_xyxy("boxes", boxes, "XYWH")


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """Convert ``(x1, y1, x2, y2)`` to ``(x1, y1, width, height)``, the COCO format.

    >>> xyxy_to_xywh(torch.tensor([1.0, 2.0, 4.0, 6.0]))
    tensor([1., 2., 3., 4.])
    """
    boxes = as_xyxy(boxes)
    return torch.cat((boxes[..., :2], boxes[..., 2:] - boxes[..., :2]), dim=-1)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert ``(centre x, centre y, width, height)`` to ``(x1, y1, x2, y2)``.

    >>> cxcywh_to_xyxy(torch.tensor([2.5, 4.0, 3.0, 4.0]))
    tensor([1., 2., 4., 6.])
    """
    return _to_xyxy("boxes", boxes, "CXCYWH")


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Convert ``(x1, y1, x2, y2)`` to ``(centre x, centre y, width, height)``.

    >>> xyxy_to_cxcywh(torch.tensor([1.0, 2.0, 4.0, 6.0]))
    tensor([2.5000, 4.0000, 3.0000, 4.0000])
    """
    boxes = as_xyxy(boxes)
    size = boxes[..., 2:] - boxes[..., :2]
    return torch.cat((boxes[..., :2] + size / 2, size), dim=-1)
