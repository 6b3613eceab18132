"""What msgspec reads of a COCO file; it skips the rest. Imported only where msgspec is installed."""

from __future__ import annotations

import msgspec

__all__ = ["File"]


class _Image(msgspec.Struct, gc=False):
    id: int
    file_name: str
    height: int | None = None
    width: int | None = None


class _Category(msgspec.Struct, gc=False):
    id: int
    name: str


class _Annotation(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: int | bool | None = None


class File(msgspec.Struct, gc=False):
    """A COCO file of instances."""

    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Annotation]
