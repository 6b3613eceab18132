"""What formats cannot hold is taken out of a table, and counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from focaldet.datasets._table import not_finite_or_negative

if TYPE_CHECKING:
    from collections import Counter

    import numpy.typing as npt

    from focaldet.datasets._table import AnnotationTable

__all__ = ["leave_out_crowds", "leave_out_unusable", "lose_outlines"]

_RELATIVE, _ABSOLUTE = 1e-3, 0.5  # areas in files may be rounded to whole pixels


def leave_out_unusable(table: AnnotationTable, losses: Counter[str]) -> AnnotationTable:
    """Leave out boxes that no format can hold, as :meth:`AnnotationTable.to_coco` does."""
    unusable = not_finite_or_negative(table.boxes)
    undeclared = ~unusable & (table.labels < 0)
    _count(losses, "boxes left out that are not finite or have a negative size", unusable)
    _count(losses, "boxes of an undeclared category left out", undeclared)
    return table.take_boxes(~unusable & ~undeclared)


def leave_out_crowds(table: AnnotationTable, losses: Counter[str]) -> AnnotationTable:
    """Leave out crowds, because they would become single objects."""
    _count(losses, "crowds or difficult objects left out", table.crowd)
    return table.take_boxes(~table.crowd)


def lose_outlines(table: AnnotationTable, losses: Counter[str]) -> AnnotationTable:
    """Count the areas that are not those of the boxes, and return the table."""
    of_boxes = (table.boxes[:, 2:] - table.boxes[:, :2]).prod(axis=1)
    known = table.areas >= 0  # False for NaN
    differs = ~np.isclose(table.areas, of_boxes, rtol=_RELATIVE, atol=_ABSOLUTE) & known
    _count(losses, "areas of outlines replaced by those of boxes", differs)
    return table


def _count(losses: Counter[str], what: str, which: npt.NDArray[np.bool]) -> None:
    if count := int(which.sum()):
        losses[what] += count
