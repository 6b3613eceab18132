"""Which classes a detector takes for which others, and for the background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from focaldet._checks import printable
from focaldet.evaluation._matching import HIT, IGNORED, box_iou, rows_by_image

if TYPE_CHECKING:
    import os

    import matplotlib.figure
    import numpy.typing as npt

    from focaldet.evaluation._matching import Matches

__all__ = ["ConfusionMatrix"]


@dataclass(frozen=True, eq=False, kw_only=True)
class ConfusionMatrix:
    """Objects by their class (rows) and the class they were detected as (columns).

    The last row and column are the background: ``counts[k, -1]`` objects of class ``k`` were missed,
    and ``counts[-1, k]`` detections of class ``k`` are false alarms. The row of a class sums to its
    objects, and its column to its detections above the score threshold, except those in crowds.
    ``counts[-1, -1]`` is 0.

    Objects are first matched with detections of their class, as in COCO's evaluation. Each of the
    remaining detections, by descending score, is then matched with the remaining object that it
    overlaps the most.

    Attributes:
        counts: ``[K + 1, K + 1]``, integers.
        class_names: Names of the K classes, in ascending order of category ids.
        iou_threshold: IoU from which detections and objects are matched.
        score_thresholds: Detections of each class that score above this count. Infinity if none do.

    .. versionadded:: 0.3.0
    """

    counts: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    iou_threshold: float
    score_thresholds: tuple[float, ...]

    def plot(self, path: str | os.PathLike[str] | None = None) -> matplotlib.figure.Figure:
        """Plot the matrix; colours are fractions of the row (extra ``plot``).

        With more than 30 classes, those that are confused the most are drawn.

        Args:
            path: File to save the plot to, in the format of its suffix. None saves nothing.

        Returns:
            The matplotlib figure.

        Raises:
            FileNotFoundError: If the folder of ``path`` does not exist.
            ImportError: If matplotlib is not installed.
            ValueError: If matplotlib cannot write the format.
        """
        from focaldet.evaluation._plot import plot_confusion

        return plot_confusion(self.counts, self.class_names, self.iou_threshold, path)

    def most_confused(self, count: int = 10) -> list[tuple[str, str, int]]:
        """Return the pairs of different classes with the highest counts.

        Args:
            count: Maximum number of pairs.

        Returns:
            Name of the objects' class, name of the detections' class, and the count.
        """
        k = len(self.class_names)
        inner = self.counts[:k, :k].copy()
        np.fill_diagonal(inner, 0)
        order = np.argsort(-inner, axis=None, kind="stable")[:count]
        pairs = [(*divmod(int(i), k), int(inner.flat[i])) for i in order if inner.flat[i]]
        return [(self.class_names[i], self.class_names[j], n) for i, j, n in pairs]

    def table(self) -> str:
        """Return a printable table: objects in rows, detections in columns."""
        names = [printable(name) for name in (*self.class_names, "background")]
        width = max(map(len, names))
        cells = [max(len(name), len(str(int(self.counts.max())))) for name in names]
        head = "".join(f"  {name:>{cell}}" for name, cell in zip(names, cells, strict=True))
        rows = [
            f"{name:{width}}"
            + "".join(f"  {n:>{cell}}" for n, cell in zip(row, cells, strict=True))
            for name, row in zip(names, self.counts.tolist(), strict=True)
        ]
        return "\n".join([f"{'':{width}}{head}", *rows])

    def to_dict(self) -> dict[str, Any]:
        """Return the matrix for ``json.dump``; None for a threshold that no detection passes."""
        return {
            "class_names": list(self.class_names),
            "counts": self.counts.tolist(),
            "iou_threshold": self.iou_threshold,
            "score_thresholds": [
                one if np.isfinite(one) else None for one in self.score_thresholds
            ],
        }


def count_confusions(
    matches: Matches, thresholds: npt.NDArray[np.float64], iou_threshold: float
) -> ConfusionMatrix:
    """Count the pairs of classes, for detections above the score threshold of their class."""
    truth = matches.truth
    k = len(truth.category_ids)
    counts = np.zeros((k + 1, k + 1), np.int64)
    above = matches.scores > thresholds[matches.categories]
    hit = above & (matches.kinds == HIT)
    np.add.at(counts, (matches.categories[hit], matches.categories[hit]), 1)
    free = ~truth.crowd
    free[matches.objects[hit]] = False
    rest = above & ~hit & (matches.kinds != IGNORED)
    for rows, objects in rows_by_image(matches.images, truth):
        wrong, left = rows[rest[rows]], objects[free[objects]]
        if len(wrong) and len(left):
            iou = box_iou(matches.boxes[wrong], truth.boxes[left], truth.crowd[left])
            iou[matches.categories[wrong][:, None] == truth.categories[left]] = -1.0
            for i, row in enumerate(wrong.tolist()):
                best = int(iou[i].argmax())
                if iou[i, best] >= min(iou_threshold, 1 - 1e-10):
                    counts[truth.categories[left[best]], matches.categories[row]] += 1
                    iou[:, best] = -1.0
                    rest[row] = free[left[best]] = False
    counts[k] += np.bincount(matches.categories[rest], minlength=k + 1)
    counts[:, k] += np.bincount(truth.categories[free], minlength=k + 1)
    return ConfusionMatrix(
        counts=counts,
        class_names=truth.category_names,
        iou_threshold=iou_threshold,
        score_thresholds=tuple(thresholds.tolist()),
    )
