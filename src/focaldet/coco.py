"""Deprecated: the names of COCO's classes moved to :mod:`focaldet.class_names` in 0.3.0."""

from __future__ import annotations

from focaldet._deprecation import moved

__all__ = ["CATEGORY_IDS", "CLASS_NAMES"]  # noqa: F822  # found by __getattr__

__getattr__ = moved(
    __name__,
    {
        "CATEGORY_IDS": "focaldet.class_names.COCO_CATEGORY_IDS",
        "CLASS_NAMES": "focaldet.class_names.COCO_CLASS_NAMES",
    },
)
