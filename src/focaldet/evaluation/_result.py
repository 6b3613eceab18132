"""The result of an evaluation: the twelve numbers, the numbers of each class, and the curves."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from focaldet._checks import check_choice, printable, shortened
from focaldet.evaluation._curve import PrecisionRecall

if TYPE_CHECKING:
    import os

    import matplotlib.figure
    import numpy.typing as npt

__all__ = ["ClassResult", "CocoResult", "PrecisionRecall"]

Area: TypeAlias = Literal["all", "small", "medium", "large"]

_STATS = (
    *("AP", "AP50", "AP75", "AP small", "AP medium", "AP large"),
    *("AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large"),
)
_AREAS: tuple[Area, ...] = ("all", "small", "medium", "large")
_IOU_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
_RECALLS = 101


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """The numbers of one class; AP and AR are NaN if it has no objects.

    Attributes:
        id: Category id in the annotations.
        name: Category name, or the id as text if it has none.
        ap: AP over IoU .50:.95.
        ap50: AP at IoU .50.
        ap75: AP at IoU .75.
        ar100: Average recall over IoU .50:.95 with 100 detections per image.
        ar_max: Average recall over IoU .50:.95 with `CocoResult.max_detections` per image.

            .. versionadded:: 0.3.0
        objects: Number of objects in the annotations, without crowds.
        detections: Number of detections in the results.
    """

    id: int
    name: str
    ap: float
    ap50: float
    ap75: float
    ar100: float
    ar_max: float
    objects: int
    detections: int


@dataclass(frozen=True, eq=False, kw_only=True)
class CocoResult:
    """COCO's twelve numbers, the numbers of each class, and the curves they are averaged from.

    The arrays have pycocotools' layout: T = 10 IoU thresholds (.50, .55 ... .95); R = 101 recalls
    (0, .01 ... 1); K categories in ascending order of ids; A = 4 area ranges (all; small, up to 32²
    pixels; medium; large, from 96²); M = 3 limits on the detections per image and category (1, 10,
    100), and with a higher ``max_detections`` it is the fourth. They are -1 where there are no objects.

    Attributes:
        stats: The twelve numbers in pycocotools' order: AP over IoU .50:.95, AP50, AP75, AP of
            small, medium and large objects, average recall with 1, 10 and 100 detections per image,
            and average recall of small, medium and large objects. -1 where there are no objects. All but
            those with 1 and 10 are with ``max_detections``, and so are COCO's if it is 100.
        precision: ``[T, R, K, A, M]``.
        recall: ``[T, K, A, M]``, the highest recall reached.
        scores: ``[T, R, K, A, M]``, the score at which each recall is reached.
        classes: The numbers of each category, in ascending order of ids. Categories without objects
            are included.
        num_images: Number of images evaluated.
        backend: The backend that computed the numbers.
        max_detections: Maximum number of detections that count per image and class.

            .. versionadded:: 0.3.0
    """

    stats: tuple[float, ...]
    precision: npt.NDArray[np.float64]
    recall: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    classes: tuple[ClassResult, ...]
    num_images: int
    backend: str
    max_detections: int = 100

    @property
    def ap(self) -> float:
        """AP over IoU .50:.95."""
        return self.stats[0]

    @property
    def ap50(self) -> float:
        """AP at IoU .50."""
        return self.stats[1]

    @property
    def ap75(self) -> float:
        """AP at IoU .75."""
        return self.stats[2]

    @property
    def ap_small(self) -> float:
        """AP of objects of up to 32² pixels."""
        return self.stats[3]

    @property
    def ap_medium(self) -> float:
        """AP of objects of 32² to 96² pixels."""
        return self.stats[4]

    @property
    def ap_large(self) -> float:
        """AP of objects of 96² pixels and more."""
        return self.stats[5]

    @property
    def ar100(self) -> float:
        """Average recall over IoU .50:.95 with 100 detections per image."""
        if self.max_detections == 100:
            return self.stats[8]
        values = self.recall[:, :, 0, 2]
        return float(values[values > -1].mean()) if (values > -1).any() else -1.0

    @property
    def ar_max(self) -> float:
        """Average recall over IoU .50:.95 with `max_detections` per image.

        .. versionadded:: 0.3.0
        """
        return self.stats[8]

    @property
    def ap_by_class(self) -> dict[str, float]:
        """AP over IoU .50:.95 by class name; NaN for a class without objects, which no mean counts.

        If several categories share a name, this has the last of them; `classes` has all.
        """
        return {one.name: one.ap for one in self.classes}

    def of_class(self, category: str | int) -> ClassResult:
        """Return the numbers of one class.

        Args:
            category: Name of the class, or its id in the annotations.

        Raises:
            ValueError: If there is no such class, or several have this name.
        """
        return self.classes[self._index(category)]

    def precision_recall(
        self,
        category: str | int | None = None,
        *,
        iou_threshold: float = 0.5,
        area: Area = "all",
    ) -> PrecisionRecall:
        """Return a precision-recall curve, with `max_detections` per image.

        Args:
            category: Name of the class, or its id in the annotations. None averages the precision
                over all classes that have objects.
            iou_threshold: IoU threshold: .5, .55 ... or .95.
            area: Size of the objects: "all", "small", "medium" or "large".

        Raises:
            ValueError: If the threshold or the area was not evaluated, or there is no such class.
        """
        check_choice("iou_threshold", round(iou_threshold, 6), _IOU_THRESHOLDS)
        check_choice("area", area, _AREAS)
        t, a = _IOU_THRESHOLDS.index(round(iou_threshold, 6)), _AREAS.index(area)
        precision, scores = self.precision[t, :, :, a, -1], self.scores[t, :, :, a, -1]
        none = np.full(_RECALLS, np.nan)
        recall = np.linspace(0, 1, _RECALLS)
        if category is None:
            some = precision[:, (precision >= 0).all(axis=0)]
            return PrecisionRecall(recall, some.mean(axis=1) if some.size else none, none)
        k = self._index(category)
        if (precision[:, k] < 0).any():
            return PrecisionRecall(recall, none, none)
        return PrecisionRecall(recall, precision[:, k].copy(), scores[:, k].copy())

    def plot_precision_recall(
        self, path: str | os.PathLike[str] | None = None, *, category: str | int | None = None
    ) -> matplotlib.figure.Figure:
        """Plot the precision-recall curves at all IoU thresholds (extra ``plot``).

        Args:
            path: File to save the plot to, in the format of its suffix. None saves nothing.
            category: Name or id of one class. None plots the mean over classes.

        Returns:
            The matplotlib figure.

        Raises:
            FileNotFoundError: If the folder of ``path`` does not exist.
            ImportError: If matplotlib is not installed.
            ValueError: If there is no such class, or matplotlib cannot write the format.
        """
        from focaldet.evaluation._plot import plot_precision_recall

        curves = {
            threshold: self.precision_recall(category, iou_threshold=threshold)
            for threshold in _IOU_THRESHOLDS
        }
        if category is None:
            title = f"Mean of classes, {self.num_images} images"
        else:
            one = self.of_class(category)
            title = f"{one.name}: {one.objects} objects, {self.num_images} images"
        return plot_precision_recall(curves, title, path)

    def table(self) -> str:
        """Return a printable table with a row per class and one for all classes."""
        names = [printable(one.name) for one in self.classes]
        width = max(len("class"), *map(len, names)) if names else len("class")
        head = f"{'class':{width}}  objects  detections     AP   AP50   AP75  {f'AR{self.max_detections}':>5}"
        objects = sum(one.objects for one in self.classes)
        detections = sum(one.detections for one in self.classes)
        rows = [
            (name, one.objects, one.detections, (one.ap, one.ap50, one.ap75, one.ar_max))
            for name, one in zip(names, self.classes, strict=True)
        ]
        rows.append(("all", objects, detections, (self.ap, self.ap50, self.ap75, self.ar_max)))
        return "\n".join(
            [head]
            + [
                f"{name:{width}}  {objects:7d}  {detections:10d}  "
                + "  ".join(f"{_shown(value):>5}" for value in values)
                for name, objects, detections, values in rows
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, without the curves, for ``json.dump``; None where there are no objects."""
        return {
            "backend": self.backend,
            "num_images": self.num_images,
            "max_detections": self.max_detections,
            "stats": {
                name: _or_none(value) for name, value in zip(self._names(), self.stats, strict=True)
            },
            "classes": [
                {name: _or_none(value) for name, value in dataclasses.asdict(one).items()}
                for one in self.classes
            ],
        }

    def to_json(self) -> str:
        """Return the content of `to_dict` as JSON."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8", "backslashreplace").decode()  # lone surrogates cannot be UTF-8

    def __str__(self) -> str:
        return "  ".join(
            f"{name} {_shown(value)}" for name, value in zip(self._names(), self.stats, strict=True)
        )

    def __repr__(self) -> str:
        return f"CocoResult({len(self.classes)} classes, {self.num_images} images: {self})"

    def _names(self) -> tuple[str, ...]:
        return (*_STATS[:8], f"AR {self.max_detections}", *_STATS[9:])

    def _index(self, category: str | int) -> int:
        key = "name" if isinstance(category, str) else "id"
        indices = [k for k, one in enumerate(self.classes) if getattr(one, key) == category]
        if not indices:
            known = [getattr(one, key) for one in self.classes]
            raise ValueError(
                f"No category has the {key} {category!r}. There are: {shortened(known)[1:-1]}."
            )
        if len(indices) > 1:
            ids = ", ".join(str(self.classes[k].id) for k in indices)
            raise ValueError(
                f"{len(indices)} categories have the name {category!r}; choose one by its id: {ids}."
            )
        return indices[0]


def _shown(value: float) -> str:
    return f"{value:.3f}" if value >= 0 else "-"


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and (math.isnan(value) or value < 0) else value
