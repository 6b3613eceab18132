"""A detector without a network: it finds bright rectangles, exactly and only where it can see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from focaldet import Detections, RetinaNetConfig
from focaldet._prediction import Predictor
from focaldet.box_coder import BoxCoder
from focaldet.boxes import scale_boxes
from focaldet.postprocess import PostProcess
from focaldet.transforms import Preprocess

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from focaldet.structures import ImageBatch

__all__ = ["Box", "ShapeFinder", "draw_shapes"]

Box = tuple[int, int, int, int]

_SMALLEST = 6  # pixels of the resized image; what is smaller is not found
_COLORS = {0: (255, 0, 0), 1: (0, 255, 0)}


def draw_shapes(
    size: tuple[int, int], boxes: Sequence[Box], labels: Sequence[int] | None = None
) -> npt.NDArray[np.uint8]:
    """Draw rectangles, red for label 0 and green for label 1, on black."""
    image = np.zeros((*size, 3), np.uint8)
    for (x1, y1, x2, y2), label in zip(boxes, labels or [0] * len(boxes), strict=True):
        image[y1:y2, x1:x2] = _COLORS[label]
    return image


class _Model:
    """A detection model whose maps are the pixels."""

    config = RetinaNetConfig(num_classes=2, class_names=("red", "green"))

    def __init__(self, side: int, max_detections: int | None) -> None:
        self.preprocess = Preprocess(
            min_size=side, max_size=side, mean=(0.0,) * 3, std=(1.0,) * 3, size_divisor=1
        )
        self.postprocess = PostProcess(BoxCoder(), max_detections=max_detections)
        self.batches: list[int] = []

    def __call__(self, batch: ImageBatch, /) -> ImageBatch:
        self.batches.append(len(batch.tensor))
        return batch

    def detections(
        self,
        output: ImageBatch,
        *,
        score_threshold: float | None = None,
        labels: Sequence[int] | None = None,
        max_detections: int | None = None,
    ) -> list[Detections]:
        del score_threshold
        limit = self.postprocess.max_detections if max_detections is None else max_detections
        found = []
        for image, size, original_size in zip(*output, strict=True):
            parts = [
                (box, label)
                for label in (0, 1)
                for box in _rectangles(image[label, : size[0], : size[1]] > 0.5)
            ]
            boxes = torch.tensor([box for box, _ in parts], dtype=torch.float32).view(-1, 4)
            # The larger a rectangle, the higher its score.
            scores = 1 - 1 / (2 + (boxes[:, 2:] - boxes[:, :2]).prod(dim=1))
            one = Detections(
                scale_boxes(boxes, size, original_size),
                scores,
                torch.tensor([label for _, label in parts], dtype=torch.int64),
                original_size,
                class_names=self.config.class_names,
            )
            one = one[one.scores.argsort(descending=True, stable=True)]
            found.append(one.filter(labels=labels)[:limit])
        return found


class ShapeFinder(Predictor):
    """Finds rectangles that are at least 6 pixels wide and high after resizing.

    Args:
        side: The long side of an image after resizing.
        max_detections: Number of rectangles to find per image.
    """

    def __init__(self, side: int = 256, max_detections: int | None = 100) -> None:
        self.model = _Model(side, max_detections)

    def _choose_model(
        self,
        batch_size: int | None,
        score_threshold: float | None,
        max_detections: int | None,
    ) -> tuple[Any, int]:
        del score_threshold, max_detections
        return self.model, batch_size or 1


def _rectangles(mask: torch.Tensor) -> list[tuple[float, float, float, float]]:
    """Return the bounds of the separate areas of a mask, from top to bottom."""
    left = np.pad(mask.numpy(), 1)  # so that every area ends before the edge
    found = []
    for y, x in np.argwhere(left):
        if left[y, x]:
            x1, y1, x2, y2 = _grown(left, x, y)
            left[y1:y2, x1:x2] = False
            if min(x2 - x1, y2 - y1) >= _SMALLEST:
                found.append((x1 - 1.0, y1 - 1.0, x2 - 1.0, y2 - 1.0))
    return found


def _grown(mask: npt.NDArray[np.bool_], x: int, y: int) -> Box:
    """Return the bounds of the area that a pixel belongs to."""
    x1, y1, x2, y2 = x, y, x + 1, y + 1
    while True:
        before = x1, y1, x2, y2
        x1 -= int(mask[y1:y2, x1 - 1].any())
        y1 -= int(mask[y1 - 1, x1:x2].any())
        x2 += int(mask[y1:y2, x2].any())
        y2 += int(mask[y2, x1:x2].any())
        if before == (x1, y1, x2, y2):
            return before
