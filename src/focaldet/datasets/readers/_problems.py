"""What readers do about problems in the files: raise and warn, or report them all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from focaldet._checks import printable

if TYPE_CHECKING:
    from focaldet.datasets._table import AnnotationTable

__all__ = ["Report", "raise_or_warn", "warn_if_nothing_to_learn"]

Report: TypeAlias = Callable[[Exception], object]
"""A function that takes an error or a warning about one file, line or object."""


def raise_or_warn(problem: Exception) -> None:
    """Raise an error, or give a warning at the line that calls the caller of this function."""
    if not isinstance(problem, Warning):
        raise problem
    warnings.warn(problem, stacklevel=3)


def warn_if_nothing_to_learn(table: AnnotationTable) -> None:
    """Warn if no box of the table can be used for training, like :func:`raise_or_warn`."""
    reason = table.why_nothing_to_learn()
    if reason:
        message = f"{printable(str(table.source))}: {reason}"
        warnings.warn(message, UserWarning, stacklevel=3)
