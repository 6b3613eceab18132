"""Assigners: which anchors learn which object, which learn background, and which are ignored.

An :class:`Assigner` is what :class:`focaldet.criterion.RetinaNetCriterion` takes. :class:`Matcher` is
RetinaNet's own, by fixed IoU thresholds; :class:`ATSSAssigner` adapts the threshold to each object.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from typing_extensions import TypeIs

from focaldet._checks import check_boxes, check_integer, check_range
from focaldet.anchor_grid import AnchorGrid
from focaldet.boxes import as_xyxy, at_least_float32, paired_box_iou

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BACKGROUND", "BETWEEN", "ATSSAssigner", "Assigner", "BatchAssigner", "Matcher"]

BACKGROUND = -1
"""Match of an anchor that overlaps no object enough and learns background."""

BETWEEN = -2
"""Match of an anchor that is neither clearly an object nor clearly background and is ignored."""

_IOUS_AT_ONCE = 2**22  # of box_iou; 16 MiB of float32, and a few such blocks are alive at once
_IOUS_IN_CACHE = 2**16
_PAIRS_AT_ONCE = 2**18  # of box and anchor in a window; some 100 bytes each
_WINDOWS_PAY = 6  # a pair from a window takes as long as this many pairs of box_iou
# Below this number of pairs, comparing all of them is faster than finding windows.
_FEW_PAIRS = 2**16


class Assigner(Protocol):
    """Assigns each anchor of an image to an object, to background, or to neither.

    Any callable with this signature is an assigner.

    .. versionadded:: 0.3.0
    """

    def __call__(self, boxes: Tensor, anchors: AnchorGrid, /) -> Tensor:
        """Return the match of every anchor.

        Args:
            boxes: ``[G, 4]`` ground truths of one image, xyxy, in pixels of the batch. G may be 0.
            anchors: The anchors of all levels, with the size of each level.

        Returns:
            ``matched_idxs``: ``[R]`` int64, an index into ``boxes``, ``BACKGROUND`` or ``BETWEEN``.
        """


class BatchAssigner(Assigner, Protocol):
    """An assigner that can also match all images of a batch at once.

    On a GPU, :class:`~focaldet.criterion.RetinaNetCriterion` calls :meth:`match_batch` instead of calling
    the assigner once per image. A subclass that overrides ``__call__`` alone is still called per image.

    .. versionadded:: 0.3.0
    """

    def match_batch(self, boxes: Tensor, valid: Tensor, anchors: AnchorGrid, /) -> Tensor:
        """Return the match of every anchor of every image, without reading a value on the host.

        Args:
            boxes: ``[B, G, 4]`` ground truths, xyxy, padded to the largest number in the batch, which is
                at least 1.
            valid: ``[B, G]`` bool, False for padding.
            anchors: The anchors of all levels.

        Returns:
            ``matched_idxs``: ``[B, R]`` int64, an index into the ``boxes`` of the image, ``BACKGROUND`` or
            ``BETWEEN``, as the assigner returns it for each image.
        """


def matches_batches(assigner: object) -> TypeIs[BatchAssigner]:
    """Return whether an assigner's ``match_batch`` is as recent as its ``__call__``.

    A subclass that overrides ``__call__`` or ``forward`` alone inherits a ``match_batch`` that does
    something else.
    """
    for kind in type(assigner).__mro__:
        if "match_batch" in vars(kind):
            return True
        if "__call__" in vars(kind) or "forward" in vars(kind):
            return False
    return False


def runs_on_cpu(tensor: Tensor) -> bool:
    """Return whether values can be read without waiting: on a CPU, but not in a compiled graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


class Matcher:
    """Assign anchors to ground truths by IoU thresholds, as RetinaNet does.

    An anchor is positive if its IoU with some ground truth is at least ``positive_threshold``,
    ``BETWEEN`` if it is at least ``negative_threshold``, and ``BACKGROUND`` otherwise. A positive
    anchor is matched to the ground truth that it overlaps most, or to the first of several that it
    overlaps equally.

    In addition, the anchor that overlaps a ground truth best, or each of several that overlap it
    equally, is positive whatever the IoU, if that is above ``force_match_floor``, so that every object
    that touches an anchor is learned. A forced anchor is matched to the ground truth that it overlaps most, which may be a
    different one, as in torchvision.

    Args:
        positive_threshold: IoU in (0, 1].
        negative_threshold: IoU in [0, positive_threshold].
        force_match_floor: IoU in [0, 1] that a forced match must exceed. None disables forced
            matches.

    Deviation: torchvision, Detectron2 and MMDetection force matches at any IoU, so a single box that
    overlaps no anchor makes every anchor of the image positive. Even a floor of 0 prevents that.

    Raises:
        ValueError: If a threshold is out of range.

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

        With an :class:`AnchorGrid` on a CPU, only the cells within reach of each box are searched; the
        result is bitwise identical to comparing all pairs. The full IoU matrix is never in memory: 1,000
        boxes in an image of 201,600 anchors need less than 100 MB either way, instead of 7 GB.

        Args:
            boxes: ``[G, 4]`` ground truths, xyxy. G may be 0.
            anchors: ``[R, 4]``, xyxy, R > 0, or the :class:`AnchorGrid` of these.

        Returns:
            ``matched_idxs``: ``[R]`` int64, an index into ``boxes``, ``BACKGROUND`` or ``BETWEEN``.

        Raises:
            ValueError: If a shape is not ``[N, 4]``, or there are no anchors.
            TypeError: If boxes or anchors are not floating-point.
        """
        boxes = as_xyxy(boxes)
        check_boxes("boxes", boxes)
        grid = anchors if isinstance(anchors, AnchorGrid) else None
        rows = anchors.anchors if isinstance(anchors, AnchorGrid) else as_xyxy(anchors, "anchors")
        check_boxes("anchors", rows)
        boxes, rows = at_least_float32(boxes), at_least_float32(rows)
        if not len(rows):
            raise ValueError("anchors is empty; pass at least one anchor.")
        if runs_on_cpu(rows) and grid is not None and len(boxes) * len(rows) > _FEW_PAIRS:
            matched_idxs = self._match_within_reach(boxes, grid)
            if matched_idxs is not None:
                return matched_idxs
        return self._match_all(boxes[None], None, rows)[0]

    @torch.no_grad()
    def match_batch(self, boxes: Tensor, valid: Tensor, anchors: AnchorGrid) -> Tensor:
        """Return the match of every anchor of every image; see :class:`BatchAssigner`.

        All pairs are compared, in blocks of boxes, so no value is read on the host. With 201,600 anchors,
        this takes less than 130 MB for 2 images and 180 MB for 16, for any number of boxes.

        .. versionadded:: 0.3.0
        """
        return self._match_all(
            at_least_float32(as_xyxy(boxes)), valid, at_least_float32(anchors.anchors)
        )

    def _match_all(self, boxes: Tensor, valid: Tensor | None, anchors: Tensor) -> Tensor:
        """Compare all pairs of each image, a block of boxes at a time. Returns ``[B, R]``."""
        B, G, R = *boxes.shape[:2], len(anchors)
        best_iou = anchors.new_full((B, R), -1.0)
        best_box = torch.zeros(B, R, dtype=torch.int64, device=anchors.device)
        forced = torch.zeros(B, R, dtype=torch.bool, device=anchors.device)
        step = max(1, _IOUS_AT_ONCE // (B * R))
        for start in range(0, G, step):
            block = slice(start, start + step)
            iou_BGR = paired_box_iou(boxes[:, block, None], anchors)
            if valid is not None:
                iou_BGR.masked_fill_(~valid[:, block, None], -1.0)
            if self.force_match_floor is not None:
                top_BG1 = iou_BGR.amax(dim=2, keepdim=True)
                forced |= ((iou_BGR == top_BG1) & (top_BG1 > self.force_match_floor)).any(dim=1)
            iou_BR, box_BR = iou_BGR.max(dim=1)
            del iou_BGR  # before the next block is computed
            better = iou_BR > best_iou  # strict: the first of equals stays
            best_iou = torch.where(better, iou_BR, best_iou)
            best_box = torch.where(better, box_BR.add_(start), best_box)
        matched_idxs = torch.where(best_iou < self.positive_threshold, BETWEEN, best_box)
        matched_idxs.masked_fill_(best_iou < self.negative_threshold, BACKGROUND)
        return torch.where(forced, best_box, matched_idxs)

    def _match_within_reach(self, boxes: Tensor, grid: AnchorGrid) -> Tensor | None:
        """Compare each box with the anchors in its windows only, a block of boxes at a time.

        The windows contain every anchor that can change the result: those above
        ``negative_threshold``, and those with the best IoU of the box, which is at least the IoU with
        the nearest anchors. Returns None if the windows are so large that comparing all pairs is
        cheaper.
        """
        anchors, floor = at_least_float32(grid.anchors), self.force_match_floor
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
            # Strict: earlier blocks hold earlier boxes, and the first of equals is kept.
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
            # Below the threshold, the box that an anchor overlaps most may not have it in its windows.
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


class ATSSAssigner:
    """Assign anchors to ground truths by adaptive training sample selection (ATSS).

    The candidates of a ground truth are the anchors of the ``top_k`` cells of each level whose
    centres are nearest to its own. A candidate is positive if its centre is inside the ground truth
    and its IoU is at least the mean plus the standard deviation of the candidates' IoUs. A candidate
    of several ground truths is matched to the one that it overlaps most, or to the first of several
    that it overlaps equally. All other anchors are ``BACKGROUND``; none is ``BETWEEN``.

    A ground truth has no positive anchor if no candidate above its threshold has its centre inside,
    which happens for objects that are smaller than a cell.

    Args:
        top_k: Number of cells per level, at least 1.

    Convention: the nearest of equally distant cells is the first in row order, and the centre of an
    anchor is inside a box if ``x1 <= x < x2`` and ``y1 <= y < y2``.

    Deviation: the paper counts anchors and has one per cell. With A anchors per cell, ``top_k`` counts
    cells, so that all sizes and shapes of a cell are candidates. The standard deviation is that of a
    sample (divided by n - 1), as in the authors' code.

    Raises:
        TypeError: If ``top_k`` is not an integer.
        ValueError: If ``top_k`` is below 1.

    References:
        Zhang et al., Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive
        Training Sample Selection, section 4 and algorithm 1. CVPR 2020. arXiv:1912.02424.

    .. versionadded:: 0.3.0

    >>> anchors = torch.tensor([[8.0 * x, 0, 8.0 * x + 8, 8] for x in range(4)])
    >>> grid = AnchorGrid([anchors], [(1, 4)])
    >>> ATSSAssigner(top_k=3)(torch.tensor([[6.0, 0.0, 18.0, 8.0]]), grid)  # IoUs: 1/9, 2/3, 1/9
    tensor([-1,  0, -1, -1])
    """

    def __init__(self, top_k: int = 9) -> None:
        check_integer("top_k", top_k)
        check_range("top_k", top_k, 1)
        self.top_k = top_k

    @torch.no_grad()
    def __call__(self, boxes: Tensor, anchors: AnchorGrid) -> Tensor:
        """Return the match of every anchor.

        Args:
            boxes: ``[G, 4]`` ground truths, xyxy. G may be 0.
            anchors: The anchors of all levels. Those of a cell should share their centre.

        Returns:
            ``matched_idxs``: ``[R]`` int64, an index into ``boxes`` or ``BACKGROUND``.

        Raises:
            TypeError: If ``anchors`` is not an :class:`AnchorGrid`, or boxes are not floating-point.
            ValueError: If the shape of the boxes is not ``[G, 4]``.
        """
        if not isinstance(anchors, AnchorGrid):
            raise TypeError(
                f"ATSS chooses anchors level by level, so anchors must be an AnchorGrid, got "
                f"{type(anchors).__name__}."
            )
        boxes = as_xyxy(boxes)
        check_boxes("boxes", boxes)
        boxes, rows = at_least_float32(boxes), at_least_float32(anchors.anchors)
        if not len(boxes):
            return torch.full((len(rows),), BACKGROUND, device=rows.device)
        candidates_GC = self._candidates(boxes, anchors)
        candidate_GC4 = rows[candidates_GC]
        iou_GC = paired_box_iou(boxes[:, None], candidate_GC4)
        # One candidate has no deviation from its mean.
        deviation_G1 = iou_GC.std(dim=1, keepdim=True, correction=min(1, iou_GC.shape[1] - 1))
        enough_GC = (iou_GC >= iou_GC.mean(dim=1, keepdim=True) + deviation_G1) & (iou_GC > 0)
        centre_GC2 = (candidate_GC4[..., :2] + candidate_GC4[..., 2:]) / 2
        inside_GC = ((centre_GC2 >= boxes[:, None, :2]) & (centre_GC2 < boxes[:, None, 2:])).all(-1)
        # Candidates that are not positive have the IoU -1, and the index of a box that does not exist.
        iou_GC = torch.where(enough_GC & inside_GC, iou_GC, -1.0)
        best_iou = iou_GC.new_zeros(len(rows))
        best_iou.scatter_reduce_(0, candidates_GC.flatten(), iou_GC.flatten(), "amax")
        box_G1 = torch.arange(len(boxes), device=rows.device)[:, None]
        box_GC = torch.where(iou_GC == best_iou[candidates_GC], box_G1, len(boxes))
        matched_idxs = torch.full((len(rows),), len(boxes), device=rows.device)
        matched_idxs.scatter_reduce_(0, candidates_GC.flatten(), box_GC.flatten(), "amin")
        return matched_idxs.masked_fill_(matched_idxs == len(boxes), BACKGROUND)

    def _candidates(self, boxes: Tensor, grid: AnchorGrid) -> Tensor:
        """Return the candidate anchors of each box, ``[G, C]`` indices, level by level."""
        of_levels: list[Tensor] = []
        first = 0
        for level in torch.split(at_least_float32(grid.anchors), list(grid.num_anchors)):
            height, width = grid.grid_sizes[len(of_levels)]
            per_cell = len(level) // (height * width)
            centres = ((level[:, :2] + level[:, 2:]) / 2).view(-1, per_cell, 2).mean(dim=1)
            step = max(1, _IOUS_AT_ONCE // len(centres))
            cells_GK = torch.cat(
                [self._nearest(some, centres) for some in torch.split(boxes, step)]
            )
            anchors_GKA = (cells_GK * per_cell)[..., None] + torch.arange(
                first, first + per_cell, device=level.device
            )
            of_levels.append(anchors_GKA.flatten(1))
            first += len(level)
        return torch.cat(of_levels, dim=1)

    def _nearest(self, boxes: Tensor, centres: Tensor) -> Tensor:
        """Return the cells nearest to each box, ``[G, K]``, in row order."""
        count = min(self.top_k, len(centres))
        centre_G2 = (boxes[:, :2] + boxes[:, 2:]) / 2
        distance_GN = (centre_G2[:, None] - centres).square().sum(dim=-1)
        distance_GN = distance_GN.nan_to_num_(nan=torch.inf, posinf=torch.inf)
        # Many cells are equally distant from a box at whole pixels, and topk may take any of them.
        last_G1 = distance_GN.topk(count, dim=1, largest=False).values.amax(dim=1, keepdim=True)
        nearer_GN, equal_GN = distance_GN < last_G1, distance_GN == last_G1
        missing_G1 = count - nearer_GN.sum(dim=1, keepdim=True)
        chosen_GN = nearer_GN | (equal_GN & (equal_GN.cumsum(dim=1) <= missing_G1))
        if runs_on_cpu(boxes):
            return chosen_GN.nonzero()[:, 1].view(len(boxes), count)
        # Each row has `count` chosen cells. Their numbers go to places 0 to count - 1, others to the end.
        place_GN = torch.where(chosen_GN, chosen_GN.cumsum(dim=1) - 1, count)
        cell_GN = torch.arange(len(centres), device=boxes.device).expand_as(place_GN)
        nearest_GK = cell_GN.new_empty(len(boxes), count + 1).scatter_(1, place_GN, cell_GN)
        return nearest_GK[:, :count]

    def __repr__(self) -> str:
        return f"ATSSAssigner(top_k={self.top_k})"
