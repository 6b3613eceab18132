"""What readers do about problems in the files: raise and warn, or report them all."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from focaldet._checks import printable

if TYPE_CHECKING:
    from focaldet.datasets._table import AnnotationTable

__all__ = ["Report", "raise_or_warn", "tell_of_missing_objects"]

Report: TypeAlias = Callable[[Exception], object]
"""A function that takes an error or a warning about one file, line or object."""

_logger = logging.getLogger(__name__)


def raise_or_warn(problem: Exception) -> None:
    """Raise an error, or give a warning at the line that calls the caller of this function."""
    if not isinstance(problem, Warning):
        raise problem
    warnings.warn(problem, stacklevel=3)


def tell_of_missing_objects(
    table: AnnotationTable, report: Report | None, *, remedy: str | None
) -> None:
    """Say if nothing can be learned from the table, or else how many images have no objects.

    A dataset may have images without objects on purpose, so a few of them are only logged. If most
    images have none, that is a warning. With ``report``, only this warning is given, because the
    dataset checker finds the rest in the table and lists it.

    Args:
        table: What was read.
        report: The caller's function for problems. By default, warnings are given at the line that
            calls the caller of this function.
        remedy: What to do if the images should have objects, as a sentence. None for a format whose
            files say which images have none; these are not counted.
    """
    source = printable(str(table.source))
    if reason := table.why_nothing_to_learn():
        if report is None:
            warnings.warn(f"{source}: {reason}", UserWarning, stacklevel=3)
        return
    (empty,) = np.nonzero(np.bincount(table.image_indices, minlength=len(table)) == 0)
    if remedy is None or not len(empty):
        return
    most = 2 * len(empty) > len(table)
    message = (
        f"{source}: {'Most' if most else 'Some'} images have no objects ({len(empty):,} of "
        f"{len(table):,}) and count as background only. The first is "
        f"{printable(table.file_names[empty[0]])}. {remedy}"
    )
    if most and report is not None:
        report(UserWarning(message))
    elif most:
        warnings.warn(message, UserWarning, stacklevel=3)
    elif report is None:
        _logger.warning(message)
