"""Soft-NMS gives what a plain implementation with Python numbers gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from focaldet.postprocess import soft_nms


def iou_of(one: list[float], two: list[float]) -> float:
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return shared / (sum(areas) - shared)


def plain_soft_nms(
    rows: list[tuple[list[float], float, int]], method: str, floor: float
) -> list[tuple[int, float]]:
    """Lower the scores of one class after another, and sort at the end."""
    found = []
    for label in {row[2] for row in rows}:
        scores = {i: row[1] for i, row in enumerate(rows) if row[2] == label}
        while scores:
            best = max(scores, key=lambda i: scores[i])
            score = scores.pop(best)
            if score > floor:
                found.append((best, score))
            for i in scores:
                iou = iou_of(rows[best][0], rows[i][0])
                if method == "gaussian":
                    scores[i] *= math.exp(-iou * iou / 0.5)
                elif iou > 0.3:
                    scores[i] *= 1 - iou
    return sorted(found, key=lambda one: -one[1])


def crowd(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 40
    sides = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 30 + 5
    scores = torch.rand(count, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return torch.cat((corners, corners + sides), dim=1), scores, labels


@pytest.mark.parametrize("method", ["linear", "gaussian"])
@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_scores_and_order_are_those_of_a_plain_implementation(method: Any, floor: float) -> None:
    boxes, scores, labels = crowd(80)
    rows = list(zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True))
    expected = plain_soft_nms(rows, method, floor)
    kept, lowered = soft_nms(boxes, scores, labels, method=method, score_threshold=floor)
    assert kept.tolist() == [index for index, _ in expected]
    assert_close(lowered, torch.tensor([score for _, score in expected], dtype=torch.float64))
    assert len(kept) > 10
    first, first_scores = soft_nms(
        boxes, scores, labels, method=method, score_threshold=floor, max_detections=5
    )
    assert torch.equal(first, kept[:5])
    assert torch.equal(first_scores, lowered[:5])


def test_boxes_without_overlap_and_other_classes_keep_their_scores() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4], [9, 9, 12, 12]])
    kept, lowered = soft_nms(boxes, torch.tensor([0.5, 0.9, 0.7]), torch.tensor([0, 1, 0]))
    assert kept.tolist() == [1, 2, 0]
    assert_close(lowered, torch.tensor([0.9, 0.7, 0.5]))


def test_no_boxes_give_none() -> None:
    kept, lowered = soft_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long())
    assert kept.dtype == torch.int64
    assert len(kept) == len(lowered) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "hard"}, "Unknown method 'hard'"),
        ({"sigma": 0.0}, "sigma must be above 0|sigma must be greater than 0"),
        ({"iou_threshold": 2.0}, "iou_threshold must be .*, got 2.0"),
        ({"score_threshold": -1.0}, "score_threshold must be .*, got -1.0"),
        ({"max_detections": 0}, "max_detections must be at least 1, got 0"),
    ],
)
def test_invalid_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soft_nms(*crowd(3), **options)
    with pytest.raises(ValueError, match=r"labels must have shape \[3\]"):
        soft_nms(*crowd(3)[:2], torch.zeros(2).long())
