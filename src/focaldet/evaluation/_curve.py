"""A precision-recall curve."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["PrecisionRecall"]


class PrecisionRecall(NamedTuple):
    """A precision-recall curve at COCO's 101 recall points.

    Attributes:
        recall: ``[101]``, from 0 to 1 in steps of 0.01.
        precision: ``[101]``, the highest precision at this recall or a higher one; 0 at recalls that
            are not reached. Its mean is the average precision. NaN if there are no objects.
        scores: ``[101]``, the score threshold that reaches this recall; 0 where it is not reached.
            NaN if there are no objects, and for the mean over classes.
    """

    recall: npt.NDArray[np.float64]
    precision: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
