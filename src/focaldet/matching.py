"""Matcher: which anchors learn which ground truth, which are background, which sit out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from focaldet._checks import check_boxes, check_range, must_be
from focaldet.anchor_grid import AnchorGrid
from focaldet.boxes import box_iou, paired_box_iou

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BACKGROUND", "BETWEEN", "Matcher"]

BACKGROUND = -1
"""Match of an anchor that overlaps no object enough: it learns "nothing here"."""

BETWEEN = -2
"""Match of an anchor that is neither clearly an object nor clearly none: it learns nothing."""

_IOUS_AT_ONCE = 2**22  # of box_iou; 16 MiB of float32, and a few such blocks are alive at once
_IOUS_IN_CACHE = 2**16
_PAIRS_AT_ONCE = 2**18  # of box and anchor in a window; some 100 bytes each
_WINDOWS_PAY = 6  # a pair from a window costs as much time as so many pairs of box_iou
# Fewer pairs than this are compared outright, which takes less time than finding windows. On a GPU
# that is reckoned from the number of kernels (about 100 either way), not measured.
_FEW_PAIRS = 2**16
_FEW_PAIRS_ON_A_GPU = 2**25


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
    def __call__(self, boxes: Tensor, anchors: Tensor | AnchorGrid) -> Tensor:
        """Return the match of every anchor.

        A grid of anchors is searched only in the cells within reach of each box. The result is that
        of comparing every pair, to the bit. The IoU matrix is never held whole: 1,000 boxes in an
        image of 201,600 anchors need less than 100 MB either way, instead of 7 GB.

        Args:
            boxes: ``[G, 4]`` ground truths, xyxy; G may be 0.
            anchors: ``[R, 4]``, xyxy, R > 0, or the :class:`AnchorGrid` of such.

        Returns:
            ``matched_idxs``: ``[R]`` int64, an index into ``boxes``, ``BACKGROUND`` or ``BETWEEN``.

        Raises:
            ValueError: shapes that are not ``[N, 4]``, or no anchors.
        """
        check_boxes("boxes", boxes)
        grid = anchors if isinstance(anchors, AnchorGrid) else None
        rows = anchors.anchors if isinstance(anchors, AnchorGrid) else anchors
        check_boxes("anchors", rows)
        if not len(rows):
            raise ValueError(must_be("anchors", "not empty", list(rows.shape)))
        few = _FEW_PAIRS if rows.device.type == "cpu" else _FEW_PAIRS_ON_A_GPU
        if grid is not None and len(boxes) * len(rows) > few:
            matched_idxs = self._match_within_reach(boxes, grid)
            if matched_idxs is not None:
                return matched_idxs
        return self._match_all(boxes, rows)

    def _match_all(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """Compare every pair, some boxes at a time."""
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

    def _match_within_reach(self, boxes: Tensor, grid: AnchorGrid) -> Tensor | None:
        """Compare each box with the anchors in its windows alone, some boxes at a time.

        Every anchor that matters to a box is there: one above ``negative_threshold``, and one that
        attains the box's best IoU, since that is no less than the IoU with any anchor at hand.
        None is returned if the windows hold so much that comparing all is cheaper.
        """
        anchors, floor = grid.anchors, self.force_match_floor
        reach_G = boxes.new_full((len(boxes),), self.negative_threshold)
        if floor is not None:
            at_hand_GN = paired_box_iou(boxes[:, None], anchors[grid.nearest(boxes)])
            reach_G = at_hand_GN.amax(dim=1).clamp_(max=self.negative_threshold)
        windows = grid.windows(boxes, reach_G)
        ends_G = windows.num_anchors().cumsum(0)
        if int(ends_G[-1]) * _WINDOWS_PAY > len(boxes) * len(anchors):
            return None

        dtype = torch.promote_types(boxes.dtype, anchors.dtype)
        best_iou = torch.zeros(len(anchors), dtype=dtype, device=anchors.device)
        best_box = torch.empty(len(anchors), dtype=torch.int64, device=anchors.device)
        unmatched = BETWEEN if self.negative_threshold == 0 else BACKGROUND
        matched_idxs = torch.full_like(best_box, unmatched)
        forced = []
        start = 0
        blocks = torch.unique_consecutive(ends_G // _PAIRS_AT_ONCE, return_counts=True)[1]
        for count in blocks.tolist():
            box_P, anchor_P = windows.pairs(start, start + count)
            start += count
            iou_P = paired_box_iou(boxes.index_select(0, box_P), anchors.index_select(0, anchor_P))
            if floor is not None:
                top_G = iou_P.new_zeros(len(boxes)).scatter_reduce_(0, box_P, iou_P, "amax")
                forced.append(anchor_P[(iou_P == top_G[box_P]) & (iou_P > floor)])
            # Strict: an earlier block holds earlier boxes, and the first of equals stays.
            better = (iou_P >= self.negative_threshold) & (iou_P > best_iou[anchor_P])
            box_P, anchor_P, iou_P = box_P[better], anchor_P[better], iou_P[better]
            best_iou.scatter_reduce_(0, anchor_P, iou_P, "amax")
            best = iou_P == best_iou[anchor_P]
            box_P, anchor_P, iou_P = box_P[best], anchor_P[best], iou_P[best]
            best_box[anchor_P] = len(boxes)
            best_box.scatter_reduce_(0, anchor_P, box_P, "amin")
            positive = iou_P >= self.positive_threshold
            matched_idxs[anchor_P] = torch.where(positive, best_box[anchor_P], BETWEEN)
        if floor is not None:
            forced_F = torch.unique(torch.cat(forced))
            # Below the threshold, an anchor may overlap most a box in whose windows it is not.
            weak_F = forced_F[best_iou[forced_F] < self.negative_threshold]
            for some in torch.split(weak_F, max(1, _IOUS_IN_CACHE // len(boxes))):
                best_box[some] = paired_box_iou(boxes[:, None], anchors[some]).max(dim=0).indices
            matched_idxs[forced_F] = best_box[forced_F]
        return matched_idxs

    def __repr__(self) -> str:
        return (
            f"Matcher(positive_threshold={self.positive_threshold}, "
            f"negative_threshold={self.negative_threshold}, "
            f"force_match_floor={self.force_match_floor})"
        )
