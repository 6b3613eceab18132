"""Test-time augmentation: several views of an image, and the merging of what is found in them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from focaldet._torchvision import torchvision
from focaldet.boxes import box_iou, clip_boxes
from focaldet.detections import Detections

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

__all__ = ["NUM_VIEWS", "iter_views", "merge_views"]

NUM_VIEWS = 3
_CANVAS = 1.25  # side of the view that is zoomed out, relative to that of the image

Pixels = Tensor | np.ndarray[Any, Any]


def iter_views(image: Pixels, mean: Sequence[float]) -> Iterator[Pixels]:
    """Yield an image, its mirror image, and the image in the upper left of a larger canvas.

    The network resizes the canvas to the same size as the image, so that objects appear at 0.8 times
    their size. This works with every kind of preprocessing and exported file.

    Args:
        image: An ``[H, W, C]`` uint8 array, or a ``[C, H, W]`` tensor.
        mean: The mean of each channel in [0, 1], which fills the canvas.
    """
    yield image
    if isinstance(image, Tensor):
        yield image.flip(-1)
        yield _on_canvas_tensor(image, mean)
    else:
        yield image[:, ::-1]
        yield _on_canvas(image, mean)


def _on_canvas_tensor(image: Tensor, mean: Sequence[float]) -> Tensor:
    height, width = image.shape[1:]
    fill = image.new_tensor(mean) if image.is_floating_point() else _levels(mean).to(image)
    canvas = F.pad(image, (0, _margin(width), 0, _margin(height)))
    canvas[:, height:] = fill[:, None, None]
    canvas[:, :, width:] = fill[:, None, None]
    return canvas


def _on_canvas(image: npt.NDArray[Any], mean: Sequence[float]) -> npt.NDArray[Any]:
    height, width, channels = image.shape
    canvas = np.empty((height + _margin(height), width + _margin(width), channels), image.dtype)
    canvas[:] = _levels(mean).numpy()
    canvas[:height, :width] = image
    return canvas


def _levels(mean: Sequence[float]) -> Tensor:
    return (torch.tensor(mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _margin(side: int) -> int:
    return math.ceil(side * _CANVAS) - side


def merge_views(
    views: Sequence[Detections], *, nms_threshold: float, class_agnostic: bool = False
) -> Detections:
    """Merge the detections in the views of :func:`iter_views` by non-maximum suppression and voting.

    Each box that suppression keeps is replaced with the average of all boxes of its class that
    overlap it by more than the threshold, weighted by their scores. It keeps its own score, which is
    the highest of them.

    Args:
        views: The detections in each view, in pixels of the view.
        nms_threshold: Threshold of the suppression, in [0, 1].
        class_agnostic: Whether suppression ignores the class.

    References:
        Gidaris and Komodakis, Object detection via a multi-region & semantic segmentation-aware CNN
        model, section 5 "Bounding box voting". ICCV 2015. arXiv:1505.01749.
    """
    plain, mirrored, small = views
    size = plain.image_size
    x1, y1, x2, y2 = mirrored.boxes.unbind(dim=1)
    mirrored = replace(mirrored, boxes=torch.stack((size[1] - x2, y1, size[1] - x1, y2), dim=1))
    small = replace(small, boxes=clip_boxes(small.boxes, size), image_size=size)
    small = small[(small.boxes[:, 2:] > small.boxes[:, :2]).all(dim=1)]
    found = Detections.merge([plain, mirrored, small])
    groups = torch.zeros_like(found.labels) if class_agnostic else found.labels
    kept = found[torchvision.ops.batched_nms(found.boxes, found.scores, groups, nms_threshold)]
    weights = (box_iou(kept.boxes, found.boxes) > nms_threshold).to(found.scores)
    weights *= kept.labels[:, None] == found.labels[None]
    weights *= found.scores
    total = weights.sum(dim=1, keepdim=True)
    voted = (weights @ found.boxes) / total
    return replace(kept, boxes=torch.where(total > 0, voted, kept.boxes))
