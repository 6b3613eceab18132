"""How far maps are from the float model's, in the units of detections: scores and boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from focaldet.boxes import box_iou

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet.retinanet import RetinaNet

__all__ = ["MapError", "map_error", "mean_error"]

_CANDIDATES = 100  # per image and side


class MapError(NamedTuple):
    """Mean differences of candidates, weighted by their scores.

    Attributes:
        scores: Mean absolute difference of scores.
        boxes: Mean of 1 - IoU.
    """

    scores: float
    boxes: float

    @property
    def worst(self) -> float:
        """The larger of the two."""
        return max(self)


def mean_error(errors: Sequence[MapError]) -> MapError:
    """Return the mean over images."""
    scores, boxes = zip(*errors, strict=True)
    return MapError(sum(scores) / len(errors), sum(boxes) / len(errors))


def map_error(
    model: RetinaNet,
    expected: Sequence[Tensor],
    found: Sequence[Tensor],
    image_size: tuple[int, int],
) -> MapError:
    """Compare maps at the candidates that either side would turn into detections.

    The candidates are the pairs of anchor and class with the highest logits on either side, 100 of each.
    Each counts by the higher of its two scores, so that objects weigh more than background.

    Args:
        model: The model, whose anchors and box coder are used.
        expected: The float model's maps of one image: the logits of all levels, then their box deltas.
        found: The maps to compare.
        image_size: ``(height, width)`` of the padded image.
    """
    levels = len(expected) // 2
    num_classes = model.head.num_classes
    logits, other_logits = (
        torch.cat([_rows(level[:1], num_classes) for level in maps[:levels]])
        for maps in (expected, found)
    )
    deltas, other_deltas = (
        torch.cat([_rows(level[:1], 4) for level in maps[levels:]]) for maps in (expected, found)
    )
    sizes = [(level.shape[2], level.shape[3]) for level in expected[:levels]]
    anchors = torch.cat(model.anchor_generator(sizes, image_size))
    count = min(_CANDIDATES, logits.numel())
    best = torch.cat([side.flatten().topk(count).indices for side in (logits, other_logits)])
    best = torch.tensor(sorted(set(best.tolist())))
    scores, other_scores = (side.flatten()[best].sigmoid() for side in (logits, other_logits))
    weights = torch.maximum(scores, other_scores)
    weights = weights / weights.sum().clamp(min=1e-12)
    anchor = best // num_classes
    decode = model.postprocess.box_coder.decode
    ious = box_iou(
        decode(deltas[anchor], anchors[anchor]), decode(other_deltas[anchor], anchors[anchor])
    ).diagonal()
    return MapError(
        float((weights * (scores - other_scores).abs()).sum()),
        float((weights * (1 - ious)).sum()),
    )


def _rows(level: Tensor, width: int) -> Tensor:
    """Return ``[1, A * width, H, W]`` as ``[H * W * A, width]``, in the order of the anchors."""
    _, channels, height, across = level.shape
    return (
        level.view(channels // width, width, height, across).permute(2, 3, 0, 1).reshape(-1, width)
    )
