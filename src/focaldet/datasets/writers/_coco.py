"""COCO annotation files ("instances")."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from focaldet._checks import printable
from focaldet.datasets._table import PackedStrings
from focaldet.datasets.writers._places import (
    image_paths,
    known_sizes,
    place_images,
    places_of,
    relative_path,
)
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.writers._writer import ImageFiles, Output

__all__ = ["FILE_SUFFIX", "HOLDS_IDS", "IMAGE_FILES", "NAME", "write"]

NAME = "COCO"
FILE_SUFFIX: str | None = ".json"
IMAGE_FILES: ImageFiles = "keep"
HOLDS_IDS = True

_FOLDER = "annotations"


def write(tables: Mapping[str, AnnotationTable], output: Output) -> None:
    """Write one file, or a file for each split in the folder ``annotations``."""
    for split, table in tables.items():
        name = output.file_name or f"{_FOLDER}/instances_{split}.json"
        paths = image_paths(table)
        if output.image_files == "keep":
            folder = output.image_folder or (output.folder.path / name).parent
            names = [relative_path(path, folder) for path in paths]
        else:
            names = places_of(paths, flat=False)
            place_images(table, paths, names, split, output)
        sizes = known_sizes(table, paths, missing="zero")
        if unknown := int((sizes[:, 0] == 0).sum()):
            output.losses["images without a known size, written as 0x0"] += unknown
        _check_ids(table)
        content = {
            "info": {},  # pycocotools requires it to load results
            "licenses": [],
            **replace(
                table,
                file_names=PackedStrings.pack(names),
                image_sizes=sizes,
                category_ids=_category_ids(table),
            ).to_coco(),
        }
        output.folder.write_text(name, json.dumps(content) + "\n")


def _check_ids(table: AnnotationTable) -> None:
    values, counts = np.unique(table.image_ids, return_counts=True)
    if (counts > 1).any():
        image_id = values[counts > 1][0]
        first, second = np.flatnonzero(table.image_ids == image_id)[:2]
        raise AnnotationError(
            f"image_ids contains {image_id} for the images {printable(table.file_names[first])} and "
            f"{printable(table.file_names[second])}. COCO requires unique ids."
        )


def _category_ids(table: AnnotationTable) -> tuple[int, ...]:
    """Return the category ids, or 1, 2, ... if readers would put them in a different order."""
    if list(table.category_ids) == sorted(set(table.category_ids)):
        return table.category_ids
    return tuple(range(1, len(table.category_ids) + 1))
