"""CSV files with one object per row, the format of keras-retinanet."""

from __future__ import annotations

import csv
import io
from pathlib import PurePath
from typing import TYPE_CHECKING

from focaldet._checks import printable
from focaldet.datasets.writers._places import image_paths, place_images, places_of, relative_path
from focaldet.datasets.writers._table_parts import leave_out_crowds, lose_outlines
from focaldet.datasets.writers._text import check_class_names, is_control, number_text
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.writers._writer import ImageFiles, Output

__all__ = ["FILE_SUFFIX", "HOLDS_IDS", "IMAGE_FILES", "NAME", "write"]

NAME = "CSV"
FILE_SUFFIX: str | None = ".csv"
IMAGE_FILES: ImageFiles = "keep"
HOLDS_IDS = False


def write(tables: Mapping[str, AnnotationTable], output: Output) -> None:
    """Write one file, or a file for each split, and a file with the names of the classes."""
    class_names = next(iter(tables.values())).class_names
    check_class_names(class_names, NAME)
    for split, every in tables.items():
        table = lose_outlines(leave_out_crowds(every, output.losses), output.losses)
        name = output.file_name or f"{split}.csv"
        paths = image_paths(table)
        if output.image_files == "keep":
            folder = output.image_folder or (output.folder.path / name).parent
            names = [relative_path(path, folder) for path in paths]
        else:
            places = places_of(paths, flat=False)
            place_images(table, paths, places, split, output)
            names = [f"{split}/{place}" for place in places]
        _check_file_names(names)
        output.folder.write_text(name, _as_csv(_rows(table, names)))
    classes = "classes.csv"
    if output.file_name is not None:
        classes = f"{PurePath(output.file_name).stem}_classes.csv"
    numbered = ([name, str(label)] for label, name in enumerate(class_names))
    output.folder.write_text(classes, _as_csv(numbered))


def _rows(table: AnnotationTable, names: list[str]) -> Iterable[list[str]]:
    for index, name in enumerate(names):
        rows = table.boxes_of(index)
        boxes, labels = table.boxes[rows].tolist(), table.labels[rows].tolist()
        if not boxes:
            yield [name, "", "", "", "", ""]
        for box, label in zip(boxes, labels, strict=True):
            yield [name, *map(number_text, box), table.class_names[label]]


def _check_file_names(names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise AnnotationError(
                f"The image {printable(repr(name))} is listed twice. The rows of a CSV file would become "
                "the objects of one image. Select one of the two with AnnotationTable.select."
            )
        if name != name.strip() or any(map(is_control, name)):
            raise AnnotationError(
                f"The file name {printable(repr(name))} contains control characters or spaces at its "
                "ends, which readers of CSV remove. Rename the image."
            )
        seen.add(name)


def _as_csv(rows: Iterable[list[str]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
