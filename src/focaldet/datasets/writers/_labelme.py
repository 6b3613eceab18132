"""LabelMe files: one JSON file per image, with rectangles."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from focaldet.datasets.writers._places import (
    image_paths,
    known_sizes,
    place_images,
    places_of,
    relative_path,
    without_suffix,
)
from focaldet.datasets.writers._table_parts import lose_outlines
from focaldet.datasets.writers._text import check_class_names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.writers._writer import ImageFiles, Output

__all__ = ["FILE_SUFFIX", "HOLDS_IDS", "IMAGE_FILES", "NAME", "write"]

NAME = "LabelMe"
FILE_SUFFIX: str | None = None
IMAGE_FILES: ImageFiles = "keep"
HOLDS_IDS = False

_VERSION = "5.0.1"  # the version of LabelMe whose files have these fields


def write(tables: Mapping[str, AnnotationTable], output: Output) -> None:
    """Write a JSON file for each image, in a folder for each split, and ``labels.txt``."""
    class_names = next(iter(tables.values())).class_names
    check_class_names(class_names, NAME)
    for split, table in tables.items():
        prefix = "" if split == "all" else f"{split}/"
        paths = image_paths(table)
        places = places_of(paths, flat=False)
        place_images(table, paths, places, prefix.rstrip("/") or ".", output)
        sizes = known_sizes(table, paths, missing="zero").tolist()
        if unknown := sum(not height for height, _ in sizes):
            output.losses["images without a known size"] += unknown
        lose_outlines(table, output.losses)
        for index, (path, place, size) in enumerate(zip(paths, places, sizes, strict=True)):
            file = f"{prefix}{without_suffix(place)}.json"
            image = place.rpartition("/")[2]
            if output.image_files == "keep":
                image = relative_path(path, (output.folder.path / file).parent)
            content: dict[str, Any] = {
                "version": _VERSION,
                "flags": {},
                "shapes": list(_shapes(table, index)),
                "imagePath": image,
                "imageData": None,
                "imageHeight": size[0] or None,
                "imageWidth": size[1] or None,
            }
            text = json.dumps(content, ensure_ascii=False, indent=2)
            output.folder.write_text(file, text + "\n")
    output.folder.write_text("labels.txt", "".join(f"{name}\n" for name in class_names))


def _shapes(table: AnnotationTable, index: int) -> Iterator[dict[str, Any]]:
    rows = table.boxes_of(index)
    boxes, labels = table.boxes[rows].tolist(), table.labels[rows].tolist()
    for (x1, y1, x2, y2), label, crowd in zip(
        boxes, labels, table.crowd[rows].tolist(), strict=True
    ):
        yield {
            "label": table.class_names[label],
            "points": [[x1, y1], [x2, y2]],
            "group_id": None,
            "description": "",
            "shape_type": "rectangle",
            "flags": {"crowd": True} if crowd else {},
        }
