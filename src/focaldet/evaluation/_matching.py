"""Match detections with objects as COCO does, and name the kind of each false positive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from focaldet.evaluation._detections import DetectionTable
    from focaldet.evaluation._ground_truth import GroundTruth

# The kinds of false positives, by their number in `Matches.kinds`.
CLASSIFICATION, LOCALISATION, BOTH, DUPLICATE, BACKGROUND = range(5)
HIT, IGNORED = -1, -2

_RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, eq=False, kw_only=True)
class Matches:
    """M detections, by descending score, with what each of them is; N objects, crowds included.

    Attributes:
        truth: The ground truth.
        images: ``[M]``, index of each detection's image.
        categories: ``[M]``, index of each detection's category.
        boxes: ``[M, 4]``, x, y, width, height.
        scores: ``[M]``.
        kinds: ``[M]``, HIT, IGNORED (inside a crowd) or the number of a kind of false positive.
        objects: ``[M]``, index of the object that the detection found or overlaps the most; -1 for
            the background and for ignored detections.
    """

    truth: GroundTruth
    images: npt.NDArray[np.int64]
    categories: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    kinds: npt.NDArray[np.int8]
    objects: npt.NDArray[np.int64]


def match(
    truth: GroundTruth,
    detections: DetectionTable,
    *,
    iou_threshold: float,
    background_iou: float,
    max_detections: int,
) -> Matches:
    """Match the detections of each image and class, in descending order of scores.

    Of the objects that no better detection has found, each takes the one with the highest IoU, the
    last of equal ones, as in pycocotools.
    """
    images = np.searchsorted(truth.image_ids, detections.image_ids)
    categories = np.searchsorted(truth.category_ids, detections.category_ids)
    order = np.lexsort((images, -detections.scores))  # ties by image, as in pycocotools
    order = order[
        _rank_in_group((images * len(truth.category_ids) + categories)[order]) < max_detections
    ]
    images, categories = images[order], categories[order]
    boxes = detections.boxes[order]
    kinds = np.full(len(order), BACKGROUND, np.int8)
    objects = np.full(len(order), -1)
    for rows, present in rows_by_image(images, truth):
        if len(rows) and len(present):
            kinds[rows], found = _match_image(
                box_iou(boxes[rows], truth.boxes[present], truth.crowd[present]),
                categories[rows][:, None] == truth.categories[present],
                truth.crowd[present],
                iou_threshold,
                background_iou,
            )
            objects[rows] = np.where(found < 0, -1, present[found])
    return Matches(
        truth=truth,
        images=images,
        categories=categories,
        boxes=boxes,
        scores=detections.scores[order],
        kinds=kinds,
        objects=objects,
    )


def rows_by_image(
    images: npt.NDArray[np.int64], truth: GroundTruth
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Return the rows of detections and of objects for each image, both in their order."""
    edges = np.arange(1, len(truth.image_ids))
    halves = []
    for one in (images, truth.images):
        order = np.argsort(one, kind="stable")
        halves.append(np.split(order, np.searchsorted(one[order], edges)))
    return list(zip(*halves, strict=True)) if len(truth.image_ids) else []


def box_iou(
    boxes: npt.NDArray[np.float64],
    others: npt.NDArray[np.float64],
    crowd: npt.NDArray[np.bool_],
) -> npt.NDArray[np.float64]:
    """Return the IoU of ``[D, 4]`` and ``[G, 4]`` boxes; of a crowd, the part of the box inside it.

    The operations are pycocotools', in its order, so that an IoU equal to a threshold stays equal.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        ends = np.minimum(
            (boxes[:, :2] + boxes[:, 2:])[:, None], (others[:, :2] + others[:, 2:])[None]
        )
        sides = (ends - np.maximum(boxes[:, None, :2], others[None, :, :2])).clip(min=0)
        inside = sides[..., 0] * sides[..., 1]
        areas = (boxes[:, 2] * boxes[:, 3])[:, None]
        other_areas = (others[:, 2] * others[:, 3])[None]
        union = np.where(crowd[None], areas, areas + other_areas - inside)
        return np.where(inside > 0, inside / union, 0.0)


def average_precisions(
    categories: npt.NDArray[np.int64],
    hits: npt.NDArray[np.bool_],
    objects: npt.NDArray[np.int64],
    evaluated: npt.NDArray[np.bool_],
) -> npt.NDArray[np.float64]:
    """Return COCO's AP of each class, NaN for a class that is not evaluated.

    A class with nothing to find has the AP 1 without false positives, and 0 with them.

    Args:
        categories: ``[M]``, category of each detection, by descending score.
        hits: ``[M]``, whether it is a true positive.
        objects: ``[K]``, number of objects.
        evaluated: ``[K]``, whether the class had objects before any error was fixed.
    """
    order = np.argsort(categories, kind="stable")
    parts = np.split(hits[order], np.searchsorted(categories[order], np.arange(1, len(objects))))
    ap = np.full(len(objects), np.nan)
    for k in np.flatnonzero(evaluated):
        true = np.cumsum(parts[k], dtype=np.float64)
        if not objects[k]:
            ap[k] = not len(true)
            continue
        precision = true / (np.arange(1, len(true) + 1) + np.spacing(1))
        precision = np.maximum.accumulate(precision[::-1])[::-1]
        at = np.searchsorted(true / objects[k], _RECALLS, side="left")
        ap[k] = precision[at[at < len(true)]].sum() / len(_RECALLS)
    return ap


def _rank_in_group(groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return for each entry how many earlier ones belong to the same group."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return ranks


def _match_image(
    iou: npt.NDArray[np.float64],
    same: npt.NDArray[np.bool_],
    crowd: npt.NDArray[np.bool_],
    iou_threshold: float,
    background_iou: float,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int64]]:
    """Return the kind of each detection of an image, and the object it is about, or -1."""
    threshold = min(iou_threshold, 1 - 1e-10)
    own = np.where(same & ~crowd, iou, -1.0)
    other = np.where(~same & ~crowd, iou, -1.0)
    kinds = np.full(len(iou), BACKGROUND, np.int8)
    objects = np.full(len(iou), -1)
    # From the weakest claim to the strongest, so that the last assignment holds.
    for kind, overlap, least in (
        (BOTH, other, background_iou),
        (LOCALISATION, own, background_iou),
        (CLASSIFICATION, other, threshold),
        (DUPLICATE, own, threshold),
    ):
        best = overlap.max(axis=1)
        rows = best >= least
        kinds[rows] = kind
        objects[rows] = overlap[rows].argmax(axis=1)
    in_crowd: npt.NDArray[np.bool_] = np.any(same & crowd & (iou >= threshold), axis=1)
    free = own.copy()
    last = free.shape[1] - 1
    for row in np.flatnonzero((own.max(axis=1) >= threshold) | in_crowd):
        best = last - int(free[row, ::-1].argmax())  # the last of equal ones
        if free[row, best] >= threshold:
            kinds[row], objects[row] = HIT, best
            free[:, best] = -1.0
        elif in_crowd[row]:
            kinds[row], objects[row] = IGNORED, -1
    return kinds, objects
