"""Small annotation tables for tests of datasets and of the dataset checker."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from focaldet.datasets import AnnotationTable
from focaldet.datasets.checks import Finding, check_dataset

__all__ = ["GOOD_ROWS", "Row", "findings_of", "table_of_rows", "table_with_photos"]

Row = tuple[int, int, list[float]]
"""The image index, label and box (xyxy) of an annotation."""

GOOD_ROWS: tuple[Row, ...] = ((0, 0, [10, 10, 40, 40]), (1, 1, [20, 20, 90, 70]))


def table_with_photos(
    folder: Path,
    boxes: list[list[list[float]]],
    *,
    sizes: tuple[int, int] = (20, 30),
    **changes: Any,
) -> AnnotationTable:
    """Write 30x20 photos whose left third is white, and return a table of them.

    Args:
        folder: The folder of the photos.
        boxes: Boxes of each photo. The labels alternate between 0 and 1.
        sizes: The annotated ``(height, width)`` of every photo.
        changes: Fields of the table to replace.
    """
    for index in range(len(boxes)):
        pixels = np.full((20, 30, 3), 10 * index, np.uint8)
        pixels[:, :10] = 255
        Image.fromarray(pixels).save(folder / f"{index}.png")
    counts = [len(image) for image in boxes]
    number = sum(counts)
    flat = np.array([box for image in boxes for box in image], np.float64).reshape(-1, 4)
    table = AnnotationTable(
        source=folder / "some.json",
        image_folder=folder,
        file_names=[f"{index}.png" for index in range(len(boxes))],
        image_ids=np.arange(len(boxes)) + 100,
        image_sizes=np.array([sizes] * len(boxes), np.int32).reshape(-1, 2),
        class_names=("cat", "dog"),
        category_ids=(3, 9),
        boxes=flat,
        labels=np.arange(number) % 2,
        areas=np.ones(number),
        crowd=np.zeros(number, np.bool_),
        annotation_ids=np.arange(number) + 50,
        image_indices=np.repeat(np.arange(len(boxes)), counts),
    )
    return replace(table, **changes)


def table_of_rows(
    *rows: Row,
    folder: Path = Path("images"),
    files: tuple[str, ...] = ("a.png", "b.png"),
    crowd: tuple[int, ...] = (),
    **changes: Any,
) -> AnnotationTable:
    """Return a table of 100x80 images with ids 11, 12, ... and annotations 501, 502, ..."""
    boxes = np.array([box for _, _, box in rows], np.float64).reshape(-1, 4)
    table = AnnotationTable(
        source=Path("cells.json"),
        image_folder=folder,
        file_names=files,
        image_ids=np.arange(11, 11 + len(files)),
        image_sizes=np.array([[80, 100]] * len(files), np.int32).reshape(-1, 2),
        class_names=("cat", "dog"),
        category_ids=(3, 5),
        boxes=boxes,
        labels=np.array([label for _, label, _ in rows], np.int64),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        crowd=np.isin(np.arange(len(rows)), crowd),
        annotation_ids=np.arange(501, 501 + len(rows)),
        image_indices=np.array([image for image, _, _ in rows], np.int64),
    )
    return replace(table, **changes)


def findings_of(table: AnnotationTable, kind: str, **options: Any) -> list[Finding]:
    """Check a table, by default without images, and return the findings of one kind."""
    report = check_dataset(table, **{"images": "none", **options})
    return [finding for finding in report.findings if finding.kind == kind]
