"""Results files: a list of detections, each with its score."""

from __future__ import annotations

import os
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from focaldet._checks import existing_file, shortened
from focaldet._coco_json._file import decode_quickly, open_bytes, parse
from focaldet._coco_json._rows import Rows, as_boxes, field_column, usable_boxes
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

__all__ = ["DetectionColumns", "read_detections"]


@dataclass(frozen=True, eq=False, kw_only=True)
class DetectionColumns:
    """M detections, in the order of the file.

    Attributes:
        image_ids: ``[M]``.
        category_ids: ``[M]``.
        boxes: ``[M, 4]``, x, y, width, height; finite, and the last two not negative.
        scores: ``[M]``, finite.
    """

    image_ids: npt.NDArray[np.int64]
    category_ids: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]


def read_detections(
    results: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
) -> DetectionColumns:
    """Read a results file, or its content.

    Raises:
        FileNotFoundError: If the file does not exist.
        AnnotationError: If the results are not in COCO format. The message names the file, the item
            and the value.
    """
    if not isinstance(results, str | os.PathLike):
        return _checked_columns(Rows(results, "results", None))
    path = existing_file("results", results)
    with open_bytes(path) as data:
        columns = _quick_columns(data)
        if columns is not None:
            return columns
        content, valid_text = parse(data, path)
        if not isinstance(content, list):
            raise AnnotationError(
                f"{str(path)!r} is not a results file: it must be a list of detections with "
                f"image_id, category_id, bbox and score, got {shortened(content, 60)}."
            )
        return _checked_columns(Rows(content, "results", str(path), valid_text=valid_text))


def _quick_columns(data: memoryview) -> DetectionColumns | None:
    """Read the columns with msgspec; None if that is not possible or anything is unusual."""
    entries = decode_quickly(data, "Results")
    if entries is None:
        return None
    try:
        columns = DetectionColumns(
            image_ids=field_column(entries, "image_id", np.int64),
            category_ids=field_column(entries, "category_id", np.int64),
            boxes=as_boxes(map(attrgetter("bbox"), entries), len(entries)),
            scores=field_column(entries, "score", np.float64),
        )
    except OverflowError:
        return None
    return columns if usable_boxes(columns.boxes).all() else None


def _checked_columns(rows: Rows) -> DetectionColumns:
    columns = DetectionColumns(
        image_ids=rows.integers("image_id"),
        category_ids=rows.integers("category_id"),
        boxes=rows.boxes(),
        scores=rows.numbers("score"),
    )
    usable = usable_boxes(columns.boxes)
    if not usable.all():
        index = int(usable.argmin())
        condition = "bbox must be finite numbers, with a width and height of at least 0"
        raise rows.error(index, f"{condition}, got {columns.boxes[index].tolist()}.")
    return columns
