"""How well a file of reduced precision finds what its model finds, and how much is enough."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from focaldet._checks import check_number, check_range
from focaldet.boxes import box_iou

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet.detections import Detections
    from focaldet.postprocess import PostProcess

__all__ = ["DEFAULT_TOLERANCES", "Agreement", "Tolerances", "agreement_of"]

_SAME_OBJECT = 0.5  # IoU


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """How far a file of reduced precision may be from its model.

    Attributes:
        unmatched: Maximum share of detections that only one side finds, weighted by their scores.
        scores: Maximum mean difference of the scores of matched detections.
        boxes: Maximum mean of 1 - IoU of matched detections.
        average_precision: Maximum loss of AP on annotations, from 0 to 1.

    Raises:
        TypeError: If a tolerance is not a number.
        ValueError: If a tolerance is not in [0, 1].

    .. versionadded:: 0.3.0

    >>> Tolerances(scores=0.1).boxes
    0.1
    """

    unmatched: float = 0.15
    scores: float = 0.05
    boxes: float = 0.1
    average_precision: float = 0.015

    def __post_init__(self) -> None:
        for name in ("unmatched", "scores", "boxes", "average_precision"):
            check_number(f"tolerances.{name}", getattr(self, name))
            check_range(f"tolerances.{name}", getattr(self, name), 0, 1)


DEFAULT_TOLERANCES = {
    "int8": Tolerances(),
    "float16": Tolerances(unmatched=0.03, scores=0.005, boxes=0.01, average_precision=0.005),
}


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How the detections of a file of reduced precision compare with its model's.

    Detections of the two sides match if they have the same class and an IoU of at least 0.5. Each
    detection counts by its score, so that likely objects weigh more than unlikely ones. One without a
    match counts by how far it is above the score from which the other side would have kept it.

    Attributes:
        images: Number of images.
        detections: Number of the model's detections.
        unmatched: Share of detections that only one side finds, by their scores.
        scores: Mean difference of the scores of matched detections.
        boxes: Mean of 1 - IoU of matched detections.

    .. versionadded:: 0.3.0
    """

    images: int
    detections: int
    unmatched: float
    scores: float
    boxes: float

    def within(self, tolerances: Tolerances) -> bool:
        """Return whether all differences are within the tolerances."""
        return (
            self.unmatched <= tolerances.unmatched
            and self.scores <= tolerances.scores
            and self.boxes <= tolerances.boxes
        )

    def worse(self, other: Agreement) -> Agreement:
        """Return the larger of each difference, for the same images in another runtime."""
        return replace(
            self,
            unmatched=max(self.unmatched, other.unmatched),
            scores=max(self.scores, other.scores),
            boxes=max(self.boxes, other.boxes),
        )

    def __str__(self) -> str:
        images = "1 image" if self.images == 1 else f"{self.images} images"
        if not self.detections and not self.unmatched:
            return f"{images}: no detections to compare; pass photos with objects as check_image"
        return (
            f"{images}: {self.detections} detections, {self.unmatched:.1%} without a match, scores off "
            f"by {self.scores:.4f} and boxes by {self.boxes:.4f} (1 - IoU) on average"
        )


def agreement_of(
    expected: Sequence[Detections], found: Sequence[Detections], postprocess: PostProcess
) -> Agreement:
    """Compare the detections of a model and of its file in the same images.

    Args:
        expected: The model's detections.
        found: The file's detections.
        postprocess: Tells how many detections are kept, and above which score.

    >>> from focaldet.box_coder import BoxCoder
    >>> from focaldet.postprocess import PostProcess
    >>> import torch
    >>> from focaldet import Detections
    >>> box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    >>> one, other = (
    ...     Detections(box, torch.tensor([score]), torch.tensor([0]), (20, 20))
    ...     for score in (0.9, 0.8)
    ... )
    >>> round(agreement_of([one], [other], PostProcess(BoxCoder())).scores, 3)
    0.1
    """
    lone = total = matched = scores = boxes = 0.0
    for ours, theirs in zip(expected, found, strict=True):
        total += float(ours.scores.sum()) + float(theirs.scores.sum())
        pairs = _pairs(ours, theirs)
        for row, other, iou in pairs:
            first, second = float(ours.scores[row]), float(theirs.scores[other])
            weight = max(first, second)
            matched += weight
            scores += weight * abs(first - second)
            boxes += weight * (1 - iou)
        lone += _lone(ours, [row for row, _, _ in pairs], theirs, postprocess)
        lone += _lone(theirs, [row for _, row, _ in pairs], ours, postprocess)
    return Agreement(
        images=len(expected),
        detections=sum(map(len, expected)),
        unmatched=lone / total if total else 0.0,
        scores=scores / matched if matched else 0.0,
        boxes=boxes / matched if matched else 0.0,
    )


def _lone(
    side: Detections, matched: list[int], other: Detections, postprocess: PostProcess
) -> float:
    """Sum how far detections without a match are above what the other side would have kept."""
    lowest = postprocess.score_threshold
    if len(other) and len(other) == postprocess.max_detections:
        lowest = float(other.scores.min())
    above = (side.scores - lowest).clamp(min=0)
    above[matched] = 0
    return float(above.sum())


def _pairs(ours: Detections, theirs: Detections) -> list[tuple[int, int, float]]:
    """Return matching rows and their IoU. Each row is used once, those with the best IoU first."""
    ious = box_iou(ours.boxes, theirs.boxes)
    ious = ious * (ours.labels[:, None] == theirs.labels)
    pairs = []
    while ious.numel() and float(ious.max()) >= _SAME_OBJECT:
        row, other = divmod(int(ious.argmax()), ious.shape[1])
        pairs.append((row, other, float(ious[row, other])))
        ious[row], ious[:, other] = -1, -1
    return pairs
