"""The dataset checker: :func:`check_dataset` finds mistakes in a dataset before training.

.. versionadded:: 0.3.0
"""

from __future__ import annotations

from focaldet.datasets.checks import _report
from focaldet.datasets.checks._anchor_reach import AnchorReach, SuggestedAnchors
from focaldet.datasets.checks._check import check_dataset
from focaldet.datasets.checks._report import (
    BoxSizes,
    ClassCount,
    DatasetReport,
    Finding,
    Kind,
)

__all__ = [
    "KINDS",
    "AnchorReach",
    "BoxSizes",
    "ClassCount",
    "DatasetReport",
    "Finding",
    "Kind",
    "SuggestedAnchors",
    "check_dataset",
]

KINDS: dict[str, Kind] = _report.KINDS
"""Every kind of finding, in the order in which they are printed.

:meta hide-value:
"""
