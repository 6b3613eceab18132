"""Annotation tables built image by image and box by box."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from focaldet.datasets._table import AnnotationTable, PackedStrings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["TableBuilder"]


class TableBuilder:
    """Collects images and boxes in compact arrays and builds a table from them."""

    def __init__(self) -> None:
        self.file_names: list[str] = []
        self._sizes = array("i")
        self._boxes = array("d")
        self._columns = {key: array("q") for key in ("image", "label", "crowd")}

    def add_image(self, file_name: str, size: tuple[int, int] = (0, 0)) -> int:
        """Add an image of size ``(height, width)``, and return its index."""
        self.file_names.append(file_name)
        self._sizes.extend(size)
        return len(self.file_names) - 1

    def add_box(self, image: int, label: int, box: Sequence[float], *, crowd: bool = False) -> None:
        """Add a box (xyxy in pixels) to the image with this index."""
        for column, value in zip(self._columns.values(), (image, label, crowd), strict=True):
            column.append(value)
        self._boxes.extend(box)

    def build(
        self, source: Path, image_folder: Path, class_names: Sequence[str]
    ) -> AnnotationTable:
        """Build the table.

        Image ids start at 1 and category ids at 0. Annotation ids count the boxes of each image
        from 0.
        """
        columns = {key: np.array(column, np.int64) for key, column in self._columns.items()}
        order = np.argsort(columns["image"], kind="stable")
        image_indices = columns["image"][order]
        annotation_ids = np.arange(len(order)) - np.searchsorted(image_indices, image_indices)
        boxes = np.array(self._boxes, np.float64).reshape(-1, 4)[order]
        with np.errstate(invalid="ignore", over="ignore"):
            areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        return AnnotationTable(
            source=source,
            image_folder=image_folder,
            file_names=PackedStrings.pack(self.file_names),
            image_ids=np.arange(1, len(self.file_names) + 1),
            image_sizes=np.array(self._sizes, np.int32).reshape(-1, 2),
            class_names=tuple(class_names),
            category_ids=tuple(range(len(class_names))),
            boxes=boxes,
            labels=columns["label"][order],
            areas=areas,
            crowd=columns["crowd"][order].astype(np.bool_),
            annotation_ids=annotation_ids,
            image_indices=image_indices,
        )
