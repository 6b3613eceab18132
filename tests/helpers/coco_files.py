"""Small COCO files for tests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def annotation(annotation_id: int, image_id: int, **changes: Any) -> dict[str, Any]:
    """Build an annotation, with some of its fields changed."""
    usual = {"bbox": [1, 2, 3, 4], "category_id": 9, "iscrowd": 0}
    return {"id": annotation_id, "image_id": image_id, **usual, **changes}


def coco_content(**changes: Any) -> dict[str, Any]:
    """Build the content of a file with two images and three boxes, with some lists changed."""
    content: dict[str, Any] = {
        "images": [
            {"id": 30, "file_name": "b.png", "height": 40, "width": 60},
            {"id": 10, "file_name": "a.png", "height": 20, "width": 30},
        ],
        "annotations": [
            annotation(7, 10),
            annotation(5, 30, bbox=[10.5, 0, 4, 8], category_id=2, segmentation=[[1, 2, 3, 4.5]]),
            annotation(6, 10, bbox=[0, 0, 30, 20], iscrowd=1, area=12.5),
        ],
        "categories": [{"id": 9, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    return content | changes


def coco_file(folder: Path, **changes: Any) -> Path:
    """Write a file of this content."""
    path = folder / "instances_some.json"
    path.write_text(json.dumps(coco_content(**changes)), encoding="utf-8")
    return path


def names_in(folder: Path) -> list[str]:
    """Return the names of the files and folders in a folder."""
    return [path.name for path in folder.iterdir()]
