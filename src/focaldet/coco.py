"""Deprecated: the names of COCO's classes moved to :mod:`focaldet.class_names` in 0.3.0."""

from __future__ import annotations

from focaldet._deprecation import moved

__getattr__ = moved(
    __name__,
    {
        "CATEGORY_IDS": "focaldet.class_names.COCO_CATEGORY_IDS",
        "CLASS_NAMES": "focaldet.class_names.COCO_CLASS_NAMES",
    },
)
