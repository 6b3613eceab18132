"""What kind of error costs how much average precision."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from focaldet._checks import check_range, printable
from focaldet.evaluation._confusion import ConfusionMatrix, count_confusions
from focaldet.evaluation._distributed import gather_and_compute
from focaldet.evaluation._inputs import join_shares, reader
from focaldet.evaluation._matching import (
    BACKGROUND,
    BOTH,
    CLASSIFICATION,
    DUPLICATE,
    HIT,
    IGNORED,
    LOCALISATION,
    Matches,
    average_precisions,
    match,
)
from focaldet.evaluation._worst import ImageErrors, find_worst

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Iterable, Mapping, Sequence

    import matplotlib.figure
    import numpy.typing as npt

    from focaldet.detections import Detections
    from focaldet.evaluation._detections import DetectionTable
    from focaldet.evaluation._ground_truth import GroundTruth, SupportsToCoco

__all__ = ["ClassErrors", "ErrorAnalysis", "ErrorKind", "analyse_errors"]

_MISSED = 5
_KINDS = {
    CLASSIFICATION: "classification",
    LOCALISATION: "localisation",
    BOTH: "both",
    DUPLICATE: "duplicate",
    BACKGROUND: "background",
    _MISSED: "missed",
}


@dataclass(frozen=True, kw_only=True)
class ErrorKind:
    """A kind of error.

    Attributes:
        name: "classification", "localisation", "both", "duplicate", "background" or "missed";
            or "false positive" or "false negative", which are sums over kinds.
        count: Number of detections, or for "missed" and "false negative" of objects.
        gain: How much AP rises if errors of this kind alone are fixed (TIDE's dAP).
        share: Mean rise of AP when this kind is fixed, over all orders of fixing the six kinds one
            after the other (its Shapley value). The shares of the six kinds sum to 1 - AP. NaN for
            the two sums.
    """

    name: str
    count: int
    gain: float
    share: float = math.nan


@dataclass(frozen=True, kw_only=True)
class ClassErrors:
    """The errors of one class.

    Attributes:
        id: Category id in the annotations.
        name: Category name.
        ap: AP at the IoU threshold. NaN if the class has no objects.
        objects: Number of objects, without crowds.
        hits: Number of true positives.
        counts: Number of errors by the name of the kind: of detections of this class, and for
            "missed" of objects of this class.
        gains: How much the AP of this class rises if one kind of error is fixed in all classes. NaN
            if the class has no objects.
        threshold: The score threshold of the highest F1; detections that score above it count. It is
            halfway to the next lower score. NaN if there are no hits.
        f1: The highest F1. NaN if there are no hits.
        precision: Precision at this threshold. NaN if there are no hits.
        recall: Recall at this threshold. NaN if there are no hits.
    """

    id: int
    name: str
    ap: float
    objects: int
    hits: int
    counts: Mapping[str, int]
    gains: Mapping[str, float]
    threshold: float
    f1: float
    precision: float
    recall: float


@dataclass(frozen=True, eq=False, kw_only=True)
class ErrorAnalysis:
    """What the errors of a detector are, and what they cost.

    Three things add up. Each detection is a hit, ignored (inside a crowd) or a false positive of
    exactly one kind. Each object is found by a hit, the target of a classification or localisation
    error (`near_misses`), or missed. And the AP with all kinds fixed is 1, so the shares of the six
    kinds sum to 1 - AP.

    Attributes:
        ap: AP at ``iou_threshold``, as `evaluate_coco` computes it. NaN if there are no objects.
        kinds: The six kinds of errors.
        false_positives: All false positives. Its gain is that of removing them.
        false_negatives: All objects that are not found. Its gain is that of not counting them.
        classes: The errors of each class, in ascending order of category ids.
        objects: Number of objects, without crowds.
        hits: Number of true positives.
        near_misses: Number of objects without a hit that are the target of a classification or
            localisation error.
        ignored: Number of detections inside crowds, which count neither way.
        iou_threshold: IoU from which a detection hits an object.
        background_iou: IoU below which a detection has nothing to do with an object.
        max_detections: Maximum number of detections that count per image and class.
        num_images: Number of images.

    .. versionadded:: 0.3.0
    """

    ap: float
    kinds: tuple[ErrorKind, ...]
    false_positives: ErrorKind
    false_negatives: ErrorKind
    classes: tuple[ClassErrors, ...]
    objects: int
    hits: int
    near_misses: int
    ignored: int
    iou_threshold: float
    background_iou: float
    max_detections: int
    num_images: int
    _matches: Any = field(repr=False)  # Matches, which is private

    def kind(self, name: str) -> ErrorKind:
        """Return one of the six kinds of errors.

        Raises:
            ValueError: If there is no such kind.
        """
        for one in self.kinds:
            if one.name == name:
                return one
        known = ", ".join(repr(one.name) for one in self.kinds)
        raise ValueError(f"Unknown kind of error {name!r}; choose one of: {known}.")

    def confusion_matrix(self, score_threshold: float | None = None) -> ConfusionMatrix:
        """Count which classes are taken for which, with the background.

        Args:
            score_threshold: Count detections that score above this. None uses the threshold of the
                highest F1 of each class.

        Returns:
            The matrix at the IoU threshold of this analysis.
        """
        return count_confusions(
            self._matches, self._thresholds(score_threshold), self.iou_threshold
        )

    def worst_images(
        self, count: int = 12, *, score_threshold: float | None = None
    ) -> tuple[ImageErrors, ...]:
        """Return the images with the most false alarms and misses together, the worst first.

        Args:
            count: Maximum number of images. Images without errors are left out.
            score_threshold: Count detections that score above this. None uses the threshold of the
                highest F1 of each class.

        Raises:
            ValueError: If ``count`` is below 1.
        """
        check_range("count", count, 1)
        return find_worst(self._matches, self._thresholds(score_threshold), count)

    def plot(self, path: str | os.PathLike[str] | None = None) -> matplotlib.figure.Figure:
        """Plot the cost and the number of each kind of error (extra ``plot``).

        Args:
            path: File to save the plot to, in the format of its suffix. None saves nothing.

        Returns:
            The matplotlib figure.

        Raises:
            FileNotFoundError: If the folder of ``path`` does not exist.
            ImportError: If matplotlib is not installed.
            ValueError: If matplotlib cannot write the format.
        """
        from focaldet.evaluation._plot import plot_errors

        title = f"AP {self.ap:.3f} at IoU {self.iou_threshold:g}, {self.num_images:,} images"
        rows = [(one.name, one.count, one.gain, one.share) for one in self.kinds]
        return plot_errors(rows, title, path)

    def table(self) -> str:
        """Return a printable table of the kinds of errors."""
        rows = [f"{'error':14}  {'count':>7}   gain  share"]
        rows += [
            f"{one.name:14}  {one.count:7d}  {_shown(one.gain)}  {_shown(one.share)}"
            for one in (*self.kinds, self.false_positives, self.false_negatives)
        ]
        return "\n".join(rows)

    def class_table(self) -> str:
        """Return a printable table of the classes: the gain of each kind, and the best threshold."""
        names = [printable(one.name) for one in self.classes]
        width = max([len("class"), *map(len, names)])
        heads = "".join(f"  {name[:5]:>5}" for name in _KINDS.values())
        rows = [f"{'class':{width}}  objects     AP{heads}     F1  threshold"]
        rows += [
            f"{name:{width}}  {one.objects:7d}  {_shown(one.ap)}"
            + "".join(f"  {_shown(gain)}" for gain in one.gains.values())
            + f"  {_shown(one.f1)}      {_shown(one.threshold)}"
            for name, one in zip(names, self.classes, strict=True)
        ]
        return "\n".join(rows)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for ``json.dump``; None where there are no objects or no hits."""

        def kind(one: ErrorKind) -> dict[str, Any]:
            both = {"gain": _or_none(one.gain), "share": _or_none(one.share)}
            return {"name": one.name, "count": one.count, **both}

        return {
            "ap": _or_none(self.ap),
            "iou_threshold": self.iou_threshold,
            "background_iou": self.background_iou,
            "max_detections": self.max_detections,
            "num_images": self.num_images,
            "objects": self.objects,
            "hits": self.hits,
            "near_misses": self.near_misses,
            "ignored": self.ignored,
            "kinds": [kind(one) for one in self.kinds],
            "false_positives": kind(self.false_positives),
            "false_negatives": kind(self.false_negatives),
            "classes": [
                {
                    "id": one.id,
                    "name": one.name,
                    "ap": _or_none(one.ap),
                    "objects": one.objects,
                    "hits": one.hits,
                    "counts": dict(one.counts),
                    "gains": {name: _or_none(gain) for name, gain in one.gains.items()},
                    "threshold": _or_none(one.threshold),
                    "f1": _or_none(one.f1),
                    "precision": _or_none(one.precision),
                    "recall": _or_none(one.recall),
                }
                for one in self.classes
            ],
        }

    def to_json(self) -> str:
        """Return the content of `to_dict` as JSON."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8", "backslashreplace").decode()  # lone surrogates cannot be UTF-8

    def __str__(self) -> str:
        listed = "  ".join(f"{one.name} {_shown(one.gain)}" for one in self.kinds)
        return f"AP {_shown(self.ap)} at IoU {self.iou_threshold:g}; gain if fixed: {listed}"

    def _thresholds(self, score_threshold: float | None) -> npt.NDArray[np.float64]:
        """Return the score threshold of each class. Without hits, no detection of it counts."""
        if score_threshold is not None:
            return np.full(len(self.classes), float(score_threshold))
        values = np.array([one.threshold for one in self.classes], np.float64)
        return np.where(np.isnan(values), np.inf, values)


def analyse_errors(
    annotations: str | os.PathLike[str] | Mapping[str, Any] | SupportsToCoco,
    results: str | os.PathLike[str] | Mapping[int, Detections] | Sequence[Mapping[str, Any]],
    *,
    iou_threshold: float = 0.5,
    background_iou: float = 0.1,
    image_ids: Iterable[int] | None = None,
    category_ids: Sequence[int] | None = None,
    max_detections: int = 100,
) -> ErrorAnalysis:
    """Find out what kind of error costs how much average precision.

    Detections are matched with objects as in COCO's evaluation at one IoU threshold. Every false
    positive is of one kind, the first that applies:

    - duplicate: it hits an object of its class that a detection with a higher score has found;
    - classification: it hits an object of a different class;
    - localisation: its IoU with an object of its class is at least ``background_iou``;
    - both: its IoU with an object of a different class is at least ``background_iou``;
    - background: none of these.

    An object is missed if no detection hits it and no classification or localisation error has it
    as its target, which is the object with the highest IoU.

    The gain of a kind is the rise of AP when it alone is fixed: a classification error gets the class
    of its target, a localisation error its box, and if this makes two detections of an object, that
    with the lower score is removed; errors of the kinds both, duplicate and background are removed;
    missed objects are not counted. Gains do not sum to 1 - AP, because one error hides another.
    The shares do.

    Convention:
        The order of the kinds is not in the paper. Here a detection that hits an object is never a
        localisation error, even if it overlaps an object of its class a little.

    On several ranks, all of them must call this, as :func:`evaluate_coco`.

    Args:
        annotations: Ground truth, as in :func:`evaluate_coco`.
        results: Detections, as in :func:`evaluate_coco`.
        iou_threshold: IoU from which a detection hits an object, in (0, 1].
        background_iou: IoU below which a detection is background, in (0, ``iou_threshold``].
        image_ids: Ids of the images to analyse. None analyses all.
        category_ids: Category id of each label of ``Detections``, as in :func:`evaluate_coco`.
        max_detections: Maximum number of detections that count per image and class; at least 100.

    Raises:
        FileNotFoundError: If a file does not exist.
        TypeError: If an argument has an unsupported type.
        ValueError: If a threshold is out of range, or for the reasons given in :func:`evaluate_coco`.

    References:
        Bolya et al., TIDE: A General Toolbox for Identifying Object Detection Errors. ECCV 2020.
        arXiv:2008.08115.

    .. versionadded:: 0.3.0

    >>> image = {"id": 7, "height": 50, "width": 50}
    >>> box = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [5, 5, 40, 40]}
    >>> kinds = [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}]
    >>> truth = {"images": [image], "annotations": [box], "categories": kinds}
    >>> dog = {"image_id": 7, "category_id": 4, "bbox": [5, 5, 40, 40], "score": 0.9}
    >>> errors = analyse_errors(truth, [dog])
    >>> errors.ap, round(errors.kind("classification").gain, 3)
    (0.0, 1.0)
    """
    return gather_and_compute(
        reader(
            annotations,
            results,
            image_ids=image_ids,
            category_ids=category_ids,
            max_detections=max_detections,
            checks=lambda: _check_thresholds(iou_threshold, background_iou),
        ),
        lambda shares: _analyse(
            *join_shares(shares),
            iou_threshold=iou_threshold,
            background_iou=background_iou,
            max_detections=max_detections,
        ),
    )


def _check_thresholds(iou_threshold: float, background_iou: float) -> None:
    check_range("iou_threshold", iou_threshold, 0, 1, low_open=True)
    check_range("background_iou", background_iou, 0, iou_threshold, low_open=True)


def _analyse(
    truth: GroundTruth,
    detections: DetectionTable,
    *,
    iou_threshold: float,
    background_iou: float,
    max_detections: int,
) -> ErrorAnalysis:
    matches = match(
        truth,
        detections,
        iou_threshold=iou_threshold,
        background_iou=background_iou,
        max_detections=max_detections,
    )
    costs = _Costs(matches)
    subsets = [frozenset(one) for n in range(7) for one in itertools.combinations(tuple(_KINDS), n)]
    fixed = {subset: costs.fixed(subset) for subset in subsets}
    base = fixed[frozenset()]
    means = {subset: _mean(ap) for subset, ap in fixed.items()}
    ap = means[frozenset()]
    hit = matches.kinds == HIT
    false = matches.kinds >= 0
    counts = {kind: int((matches.kinds == kind).sum()) for kind in _KINDS}
    counts[_MISSED] = int(costs.missed.sum())
    objects = int(costs.objects.sum())
    return ErrorAnalysis(
        ap=ap,
        kinds=tuple(
            ErrorKind(
                name=name,
                count=counts[kind],
                gain=means[frozenset([kind])] - ap,
                share=_share(kind, means),
            )
            for kind, name in _KINDS.items()
        ),
        false_positives=ErrorKind(
            name="false positive", count=int(false.sum()), gain=_mean(costs.only_hits()) - ap
        ),
        false_negatives=ErrorKind(
            name="false negative",
            count=objects - int(hit.sum()),
            gain=_mean(costs.only_found()) - ap,
        ),
        classes=tuple(
            ClassErrors(
                id=int(category),
                name=name,
                ap=float(base[k]),
                objects=int(costs.objects[k]),
                hits=int((hit & (matches.categories == k)).sum()),
                counts={
                    _KINDS[kind]: int(
                        costs.missed[k]
                        if kind == _MISSED
                        else ((matches.kinds == kind) & (matches.categories == k)).sum()
                    )
                    for kind in _KINDS
                },
                gains={
                    _KINDS[kind]: float(fixed[frozenset([kind])][k] - base[k]) for kind in _KINDS
                },
                **_best_threshold(matches, k, int(costs.objects[k])),
            )
            for k, (category, name) in enumerate(
                zip(truth.category_ids, truth.category_names, strict=True)
            )
        ),
        objects=objects,
        hits=int(hit.sum()),
        near_misses=objects - int(hit.sum()) - counts[_MISSED],
        ignored=int((matches.kinds == IGNORED).sum()),
        iou_threshold=iou_threshold,
        background_iou=background_iou,
        max_detections=max_detections,
        num_images=len(truth.image_ids),
        _matches=matches,
    )


class _Costs:
    """The AP of each class when some errors are fixed."""

    def __init__(self, matches: Matches) -> None:
        truth, kinds = matches.truth, matches.kinds
        count = len(truth.category_ids)
        self._matches = matches
        self.objects = np.bincount(truth.categories[~truth.crowd], minlength=count)
        self._found = np.bincount(matches.categories[kinds == HIT], minlength=count)
        reached = np.isin(kinds, (HIT, CLASSIFICATION, LOCALISATION))
        missed = ~truth.crowd
        missed[matches.objects[reached]] = False
        self.missed = np.bincount(truth.categories[missed], minlength=count)

    def fixed(self, fixed: Collection[int]) -> npt.NDArray[np.float64]:
        """Return the AP of each class with the errors of some kinds fixed."""
        matches = self._matches
        kinds = matches.kinds
        right = kinds == HIT
        for kind in (CLASSIFICATION, LOCALISATION):
            if kind in fixed:
                right |= kinds == kind
        rows = np.flatnonzero(right)
        first = np.unique(matches.objects[rows], return_index=True)[1]  # the highest score
        kept = (kinds >= 0) & ~np.isin(kinds, list(fixed))
        kept[rows[first]] = True
        categories = matches.categories.copy()
        categories[rows] = matches.truth.categories[matches.objects[rows]]
        objects = self.objects - self.missed if _MISSED in fixed else self.objects
        return average_precisions(categories[kept], right[kept], objects, self.objects > 0)

    def only_hits(self) -> npt.NDArray[np.float64]:
        """Return the AP of each class without false positives."""
        hit = self._matches.kinds == HIT
        return average_precisions(
            self._matches.categories[hit], hit[hit], self.objects, self.objects > 0
        )

    def only_found(self) -> npt.NDArray[np.float64]:
        """Return the AP of each class if only the objects that are found count."""
        kept = self._matches.kinds != IGNORED
        hit = self._matches.kinds[kept] == HIT
        return average_precisions(
            self._matches.categories[kept], hit, self._found, self.objects > 0
        )


def _share(kind: int, means: Mapping[frozenset[int], float]) -> float:
    """Return the Shapley value of a kind of error."""
    total, n = 0.0, len(_KINDS)
    for subset, mean in means.items():
        if kind not in subset:
            weight = 1 / (n * math.comb(n - 1, len(subset)))
            total += weight * (means[subset | {kind}] - mean)
    return total


def _best_threshold(matches: Matches, category: int, objects: int) -> dict[str, float]:
    """Return the score threshold of the highest F1, and F1, precision and recall there."""
    rows = (matches.categories == category) & (matches.kinds != IGNORED)
    scores = matches.scores[rows]
    hits = np.cumsum(matches.kinds[rows] == HIT)
    if not len(hits) or not hits[-1]:
        return dict.fromkeys(("threshold", "f1", "precision", "recall"), math.nan)
    ends = np.flatnonzero(np.append(scores[1:] < scores[:-1], True))
    found, kept = hits[ends], ends + 1
    f1 = 2 * found / (kept + objects)
    best = int(f1.argmax())
    score = float(scores[ends[best]])
    if best + 1 < len(ends):
        lower = float(scores[ends[best] + 1])
    else:
        lower = 0.0 if score > 0 else score - 1
    middle = (score + lower) / 2
    return {
        "threshold": middle if middle < score else lower,
        "f1": float(f1[best]),
        "precision": float(found[best] / kept[best]),
        "recall": float(found[best] / objects),
    }


def _mean(ap: npt.NDArray[np.float64]) -> float:
    evaluated = ap[~np.isnan(ap)]
    return float(evaluated.mean()) if len(evaluated) else math.nan


def _shown(value: float) -> str:
    return "    -" if math.isnan(value) else f"{value:5.3f}"


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
