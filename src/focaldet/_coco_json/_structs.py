"""The parts of COCO files that msgspec reads; it skips the rest. Importing this needs msgspec.

Only the usual types are listed. A file with others, such as ids written as ``1.0``, is read by the
standard library.
"""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["Instances", "Results"]


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str | None = None
    height: int | None = None
    width: int | None = None


class _Category(msgspec.Struct, gc=False):
    id: int
    name: str | None = None
    supercategory: Any = None


class _Annotation(msgspec.Struct, gc=False):
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    id: int | None = None
    area: float | None = None
    iscrowd: int | float | bool | None = None


class Instances(msgspec.Struct, gc=False):
    """An annotation file."""

    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation]


class _Detection(msgspec.Struct, gc=False):
    """An entry of a results file."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    score: float


Results = list[_Detection]
