"""Matcher: which anchors learn which ground truth, which are background, which sit out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from focaldet._checks import check_boxes, check_range, must_be
from focaldet.boxes import box_iou

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BACKGROUND", "BETWEEN", "Matcher"]

BACKGROUND = -1
"""Match of an anchor that overlaps no object enough: it learns "nothing here"."""

BETWEEN = -2
"""Match of an anchor that is neither clearly an object nor clearly none: it learns nothing."""

_IOUS_AT_ONCE = 2**22  # 16 MiB of float32; a few such blocks are alive at once


class Matcher:
    """Assign anchors to ground truths by their overlap.

    An anchor is positive from ``positive_threshold`` up, ``BETWEEN`` from ``negative_threshold``
    up, and ``BACKGROUND`` below. It is matched to the ground truth that it overlaps most (the first
    of equals). Beyond this, the anchors that overlap a ground truth best (all of equals) are
    positive whatever their IoU, if it is above ``force_match_floor``: so every object that some
    anchor touches has someone to learn it. A forced anchor keeps the ground truth that itself
    overlaps most, which may be another, as in torchvision.

    Args:
        positive_threshold: IoU in (0, 1].
        negative_threshold: IoU in [0, positive_threshold].
        force_match_floor: IoU in [0, 1] that a forced match must exceed; None forces none.

    Deviation: torchvision, Detectron2 and MMDetection force-match at any IoU, so that one box which
    no anchor overlaps makes every anchor of the image positive. Even a floor of 0 excludes that.

    References:
        Lin et al., Focal Loss for Dense Object Detection, section 4 "Anchors". arXiv:1708.02002.
        Ren et al., Faster R-CNN, section 3.1.2 (the best-anchor rule). arXiv:1506.01497.

    >>> anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 4.5], [50.0, 0, 60, 10]])
    >>> Matcher()(torch.tensor([[0.0, 0.0, 10.0, 10.0]]), anchors)
    tensor([ 0, -2, -1])
    """

    def __init__(
        self,
        positive_threshold: float = 0.5,
        negative_threshold: float = 0.4,
        *,
        force_match_floor: float | None = 0.0,
    ) -> None:
        check_range("positive_threshold", positive_threshold, 0, 1, low_open=True)
        check_range("negative_threshold", negative_threshold, 0, positive_threshold)
        if force_match_floor is not None:
            check_range("force_match_floor", force_match_floor, 0, 1)
        self.positive_threshold = positive_threshold
        self.negative_threshold = negative_threshold
        self.force_match_floor = force_match_floor

    @torch.no_grad()
    def __call__(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Return the match of every anchor.

        The IoU matrix is made in blocks of ground truths and never held whole: 1,000 boxes in an
        image of 201,600 anchors need some 100 MB instead of 7 GB.

        Args:
            boxes: ``[G, 4]`` ground truths, xyxy; G may be 0.
            anchors: ``[R, 4]``, xyxy, R > 0.

        Returns:
            ``matched_idxs``: ``[R]`` int64, an index into ``boxes``, ``BACKGROUND`` or ``BETWEEN``.

        Raises:
            ValueError: shapes that are not ``[N, 4]``, or no anchors.
        """
        check_boxes("boxes", boxes)
        check_boxes("anchors", anchors)
        if not len(anchors):
            raise ValueError(must_be("anchors", "not empty", list(anchors.shape)))
        best_iou = anchors.new_full((len(anchors),), -1.0)
        best_box = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
        forced = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
        step = max(1, _IOUS_AT_ONCE // len(anchors))
        for start in range(0, len(boxes), step):
            iou_GR = box_iou(boxes[start : start + step], anchors)
            iou_R, box_R = iou_GR.max(dim=0)
            better = iou_R > best_iou  # strict: the first of equals stays
            best_iou = torch.where(better, iou_R, best_iou)
            best_box = torch.where(better, box_R + start, best_box)
            if self.force_match_floor is not None:
                top_G1 = iou_GR.amax(dim=1, keepdim=True)
                forced |= ((iou_GR == top_G1) & (top_G1 > self.force_match_floor)).any(dim=0)
        matched_idxs = torch.where(best_iou < self.positive_threshold, BETWEEN, best_box)
        matched_idxs[best_iou < self.negative_threshold] = BACKGROUND
        return torch.where(forced, best_box, matched_idxs)

    def __repr__(self) -> str:
        return (
            f"Matcher(positive_threshold={self.positive_threshold}, "
            f"negative_threshold={self.negative_threshold}, "
            f"force_match_floor={self.force_match_floor})"
        )
