"""Small ground truths and detections for tests of the evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from focaldet import Detections

if TYPE_CHECKING:
    from collections.abc import Sequence

IMAGES = [{"id": 4, "height": 100, "width": 100}, {"id": 9, "height": 100, "width": 100}]
CATEGORIES = [{"id": 30, "name": "dog"}, {"id": 7, "name": "cat"}]


def truth(*boxes: tuple[int, int, Sequence[float]]) -> dict[str, Any]:
    """Build annotations of images 4 and 9 from (image id, category id, x y width height)."""
    annotations = [
        {
            "id": i + 1,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for i, (image, category, box) in enumerate(boxes)
    ]
    return {"images": IMAGES, "annotations": annotations, "categories": CATEGORIES}


def found(boxes: Sequence[Sequence[float]], scores: list[float], labels: list[int]) -> Detections:
    """Build the detections of a 100x100 image."""
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(scores),
        torch.tensor(labels, dtype=torch.int64),
        (100, 100),
    )
