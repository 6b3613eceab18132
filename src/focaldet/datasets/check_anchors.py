"""Deprecated: these names moved to :mod:`focaldet.datasets.checks` in 0.3.0."""

from __future__ import annotations

from focaldet._deprecation import moved

__all__ = ["AnchorReach", "SuggestedAnchors"]  # noqa: F822  # found by __getattr__

__getattr__ = moved(
    __name__,
    {
        "AnchorReach": "focaldet.datasets.checks.AnchorReach",
        "SuggestedAnchors": "focaldet.datasets.checks.SuggestedAnchors",
    },
)
