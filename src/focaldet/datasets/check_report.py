"""Deprecated: these names moved to :mod:`focaldet.datasets.checks` in 0.3.0."""

from __future__ import annotations

from focaldet._deprecation import moved

__all__ = ["KINDS", "BoxSizes", "ClassCount", "DatasetReport", "Finding", "Kind"]  # noqa: F822  # found by __getattr__

__getattr__ = moved(
    __name__,
    {
        "KINDS": "focaldet.datasets.checks.KINDS",
        "BoxSizes": "focaldet.datasets.checks.BoxSizes",
        "ClassCount": "focaldet.datasets.checks.ClassCount",
        "DatasetReport": "focaldet.datasets.checks.DatasetReport",
        "Finding": "focaldet.datasets.checks.Finding",
        "Kind": "focaldet.datasets.checks.Kind",
    },
)
