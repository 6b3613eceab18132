"""The parts of a COCO file that detection needs, as plain lists, column by column.

Two ways in, with one result. The standard library's parser reads everything, so the outlines of the
objects (nine tenths of a COCO file) are cut out of the text before. msgspec, where installed, skips
them as it reads into typed structs; whatever it refuses goes to the first way, which then either
reads it (``NaN``, for one) or says what is wrong.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import mmap
import re
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from focaldet._checks import must_be

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

__all__ = ["CocoColumns", "read_columns"]

# A polygon is a list of lists of numbers: none of what may come after it, a key or a brace, is
# among these characters, so the last bracket of the run closes the list.
_POLYGONS = re.compile(rb'(?<!\\)"segmentation"\s*:\s*\[[\[\]\s\d.,+\-eE]*\]')


class CocoColumns(NamedTuple):
    """What is kept of a COCO file; see :class:`~focaldet.datasets.AnnotationTable` for the meaning.

    ``boxes`` are xywh, ``areas`` NaN where not given, ids as in the file, rows in the file's order.
    """

    file_names: list[str]
    image_ids: npt.NDArray[np.int64]
    image_sizes: npt.NDArray[np.int32]
    category_ids: npt.NDArray[np.int64]
    class_names: list[str]
    boxes: npt.NDArray[np.float64]
    areas: npt.NDArray[np.float64]
    crowd: npt.NDArray[np.bool_]
    annotation_ids: npt.NDArray[np.int64]
    annotation_image_ids: npt.NDArray[np.int64]
    annotation_category_ids: npt.NDArray[np.int64]


def read_columns(path: Path) -> CocoColumns:
    """Read a COCO file.

    Raises:
        ValueError: the file is not JSON, or not in COCO's form.
    """
    with _mapped(path) as data, _no_garbage_collection():
        with contextlib.suppress(
            ImportError, ValueError, OverflowError
        ):  # msgspec's are ValueErrors
            return _by_msgspec(data)
        try:
            content = json.loads(_POLYGONS.sub(b'"segmentation":0', data))
        except (ValueError, RecursionError) as error:
            got = f"{str(path)!r} ({error})"
            raise ValueError(must_be("annotations", "a JSON file", got)) from error
        return _by_hand(content, path)


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap | bytes]:
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (ValueError, OSError):  # empty, or a file system that cannot map
            yield file.read()
            return
        with data:
            yield data


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of small lists make the collector search for cycles, again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _by_msgspec(data: mmap.mmap | bytes) -> CocoColumns:
    import msgspec

    from focaldet.datasets._msgspec import File

    content = msgspec.json.decode(data, type=File)
    images, annotations = content.images, content.annotations
    return _columns(
        file_names=[image.file_name for image in images],
        image_ids=[image.id for image in images],
        image_sizes=[(image.height or 0, image.width or 0) for image in images],
        category_ids=[category.id for category in content.categories],
        class_names=[category.name for category in content.categories],
        boxes=[annotation.bbox for annotation in annotations],
        areas=[annotation.area for annotation in annotations],
        crowd=[annotation.iscrowd for annotation in annotations],
        annotation_ids=[annotation.id for annotation in annotations],
        annotation_image_ids=[annotation.image_id for annotation in annotations],
        annotation_category_ids=[annotation.category_id for annotation in annotations],
    )


_MISSING = object()
_INTEGER, _NUMBER = frozenset({int}), frozenset({int, float})
_TEXT, _OPTIONAL = frozenset({str}), frozenset({type(None)})


class _Section(NamedTuple):
    """One of the three lists of a COCO file, read column by column."""

    name: str
    items: list[dict[str, Any]]
    path: Path

    @classmethod
    def of(cls, content: object, name: str, path: Path) -> _Section:
        items = content.get(name) if isinstance(content, dict) else None
        if not isinstance(items, list):
            got = f"{str(path)!r} without the list '{name}'"
            remedy = "A COCO file has the lists images, annotations and categories."
            raise ValueError(must_be("annotations", "a file in COCO's form", got, remedy))
        section = cls(name, items, path)
        section._require("an object", [isinstance(item, dict) for item in items])
        return section

    def column(
        self, key: str, condition: str, kinds: frozenset[type], default: object = _MISSING
    ) -> list[Any]:
        values = [item.get(key, default) for item in self.items]
        if not kinds.issuperset(map(type, values)):
            self._require(condition, [type(value) in kinds for value in values], key)
        return values

    def boxes(self) -> list[list[float]]:
        condition = "four numbers (x, y, width, height)"
        boxes = self.column("bbox", condition, frozenset({list}))
        if not {4}.issuperset(map(len, boxes)) or not _NUMBER.issuperset(
            map(type, chain.from_iterable(boxes))
        ):
            fine = [len(box) == 4 and _NUMBER.issuperset(map(type, box)) for box in boxes]
            self._require(condition, fine, "bbox")
        return boxes

    def _require(self, condition: str, fine: list[bool], key: str | None = None) -> None:
        """Raise for the first item that is not fine."""
        if all(fine):
            return
        index = fine.index(False)
        item = self.items[index]
        name, got = f"{self.name}[{index}]", repr(item)
        if key is not None:
            name += f"['{key}']"
            got = repr(item[key]) if key in item else "nothing"
            if key != "id" and "id" in item:
                got += f" (id {item['id']!r})"
        if len(got) > 200:
            got = got[:200] + "…"
        raise ValueError(must_be(name, condition, f"{got} in {str(self.path)!r}"))


def _by_hand(content: object, path: Path) -> CocoColumns:
    images = _Section.of(content, "images", path)
    categories = _Section.of(content, "categories", path)
    annotations = _Section.of(content, "annotations", path)
    sides = [
        images.column(key, "an integer", _INTEGER | _OPTIONAL, None) for key in ("height", "width")
    ]
    try:
        return _columns(
            file_names=images.column("file_name", "a string", _TEXT),
            image_ids=images.column("id", "an integer", _INTEGER),
            image_sizes=[(height or 0, width or 0) for height, width in zip(*sides, strict=True)],
            category_ids=categories.column("id", "an integer", _INTEGER),
            class_names=categories.column("name", "a string", _TEXT),
            boxes=annotations.boxes(),
            areas=annotations.column("area", "a number", _NUMBER | _OPTIONAL, None),
            crowd=annotations.column("iscrowd", "0 or 1", _INTEGER | _OPTIONAL | {bool}, None),
            annotation_ids=annotations.column("id", "an integer", _INTEGER),
            annotation_image_ids=annotations.column("image_id", "an integer", _INTEGER),
            annotation_category_ids=annotations.column("category_id", "an integer", _INTEGER),
        )
    except OverflowError as error:
        got = f"{str(path)!r} ({error})"
        raise ValueError(must_be("annotations", "made of 64-bit numbers", got)) from error


def _columns(
    *,
    file_names: list[str],
    image_ids: list[int],
    image_sizes: list[tuple[int, int]],
    category_ids: list[int],
    class_names: list[str],
    boxes: list[Any],
    areas: list[float | None],
    crowd: list[int | bool | None],
    annotation_ids: list[int],
    annotation_image_ids: list[int],
    annotation_category_ids: list[int],
) -> CocoColumns:
    number = len(annotation_ids)
    return CocoColumns(
        file_names=file_names,
        image_ids=np.array(image_ids, np.int64),
        image_sizes=np.array(image_sizes, np.int32).reshape(-1, 2),
        category_ids=np.array(category_ids, np.int64),
        class_names=class_names,
        boxes=np.fromiter(chain.from_iterable(boxes), np.float64, 4 * number).reshape(-1, 4),
        areas=np.array([math.nan if area is None else area for area in areas], np.float64),
        crowd=np.array([bool(value) for value in crowd], np.bool_),
        annotation_ids=np.array(annotation_ids, np.int64),
        annotation_image_ids=np.array(annotation_image_ids, np.int64),
        annotation_category_ids=np.array(annotation_category_ids, np.int64),
    )
