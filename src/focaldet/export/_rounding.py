"""Detections that differ between a file and its model only because rounding decides between them.

Suppression keeps the better of two overlapping boxes. If their scores are equal up to rounding, either
may be kept, and if their IoU is the threshold up to rounding, the worse one may be kept or not. The box
that is kept then decides about others that it overlaps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from focaldet.boxes import box_iou

if TYPE_CHECKING:
    from torch import Tensor

    from focaldet.postprocess import PostProcess

__all__ = ["Rows", "count_decided_by_rounding"]

_IOU_TOLERANCE = 1e-4


class Rows(NamedTuple):
    """Detections of one image: ``[D, 4]`` boxes, ``[D]`` scores and ``[D]`` labels."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def take(self, indices: list[int]) -> Rows:
        """Return some of them."""
        return Rows(self.boxes[indices], self.scores[indices], self.labels[indices])


def count_decided_by_rounding(
    postprocess: PostProcess,
    sides: tuple[Rows, Rows],
    lone: tuple[Rows, Rows],
    score_tolerance: float,
) -> int:
    """Count the detections of only one side that are missing on the other because of rounding.

    Args:
        postprocess: How the model suppresses boxes.
        sides: All detections of the model and of the file.
        lone: Those that only the model and only the file has.
        score_tolerance: Difference of scores up to which either can be the better one.
    """
    threshold = postprocess.nms_threshold - _IOU_TOLERANCE
    ious = _ious(postprocess, *lone)
    lead = lone[0].scores[:, None] - lone[1].scores
    overlap = ious >= threshold
    swapped = overlap & (lead.abs() <= score_tolerance)
    first = swapped.any(dim=1) | _at_threshold(postprocess, lone[0], sides[1], score_tolerance)
    second = swapped.any(dim=0) | _at_threshold(postprocess, lone[1], sides[0], score_tolerance)
    # Each round adds the boxes that the boxes found before have suppressed on the other side.
    beaten_first, beaten_second = (
        overlap & (lead <= score_tolerance),
        overlap & (lead >= -score_tolerance),
    )
    for _ in range(len(first) + len(second)):
        more_first = first | (beaten_first & second).any(dim=1)
        more_second = second | (beaten_second & more_first[:, None]).any(dim=0)
        if torch.equal(more_first, first) and torch.equal(more_second, second):
            break
        first, second = more_first, more_second
    return int(first.sum() + second.sum())


def _at_threshold(
    postprocess: PostProcess, lone: Rows, others: Rows, score_tolerance: float
) -> Tensor:
    """Return which detections overlap a better one of the other side by exactly the threshold."""
    at_threshold = (_ious(postprocess, lone, others) - postprocess.nms_threshold).abs()
    better = others.scores >= lone.scores[:, None] - score_tolerance
    return ((at_threshold <= _IOU_TOLERANCE) & better).any(dim=1)


def _ious(postprocess: PostProcess, first: Rows, second: Rows) -> Tensor:
    """Return the IoU of all pairs of boxes, 0 where they don't suppress each other."""
    ious = box_iou(first.boxes, second.boxes)
    if postprocess.class_agnostic_nms:
        return ious
    return ious * (first.labels[:, None] == second.labels)
