"""CSV files with one object per row, the format of keras-retinanet."""

from __future__ import annotations

import csv
import io
import os
from typing import TYPE_CHECKING

from focaldet._checks import check_names, existing_file, existing_folder, shortened
from focaldet.datasets.readers._builder import TableBuilder
from focaldet.datasets.readers._problems import tell_of_missing_objects
from focaldet.datasets.readers._text import read_text
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.readers._problems import Report
    from focaldet.datasets.readers._reader import ReadOptions

__all__ = ["LAYOUT", "NAME", "OPTIONS", "read", "read_csv", "recognises", "splits"]

NAME = "CSV"
LAYOUT = "a .csv file"
OPTIONS = frozenset({"images", "class_names"})

_COLUMNS = "path,x1,y1,x2,y2,class"
_NUM_COLUMNS = 6
_IF_MISSING = "If they should have objects, replace their rows, which have only a path."


def recognises(path: Path) -> bool:
    """Return whether the path is a ``.csv`` file."""
    return path.is_file() and path.suffix.lower() == ".csv"


def splits(_: Path) -> None:
    """Return None: a CSV file is a single split."""


def read(path: Path, options: ReadOptions) -> AnnotationTable:
    """Read a CSV file."""
    return read_csv(path, options.images, class_names=options.class_names, report=options.report)


def read_csv(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    class_names: Sequence[str] | str | os.PathLike[str] | None = None,
    report: Report | None = None,
) -> AnnotationTable:
    """Read a CSV file with rows ``path,x1,y1,x2,y2,class`` and no header.

    Image ids are 1, 2, ... in the order in which the file first names the images. Category ids are
    0, 1, ... in the order of ``class_names``. A row with only a path, ``path,,,,,``, is an image
    without objects.

    Args:
        annotations: The CSV file.
        images: The folder to which the paths are relative. None uses the folder of the file.
        class_names: Names of labels 0, 1, ..., or the path of a CSV file with rows ``class,number``,
            numbered from 0. None uses the names in the file, in alphabetical order. If training and
            validation have separate files, pass the names so that the labels agree.
        report: A function that is called with each error or warning about a file, line or object, which
            is then left out, so that all can be listed. None raises the first error. See
            :func:`check_dataset`.

            .. versionadded:: 0.3.0

    Convention:
        Boxes are xyxy, continuous, in pixels. The file does not contain the image sizes, so
        :class:`~focaldet.datasets.DetectionDataset` reads them from the headers of the images.

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        AnnotationError: If a row is in a different format. The message names the file and the line.
        TypeError: If ``class_names`` is neither a path nor a sequence of strings.

    Warns:
        UserWarning: If there is no object that training could learn from, or most images have no
            objects. Fewer images without objects are counted in the log.
    """
    path = existing_file("annotations", annotations)
    folder = path.parent if images is None else existing_folder("images", images)
    lines = list(_lines(path))
    if class_names is None:
        class_names = sorted({row[5] for _, row in lines if len(row) == _NUM_COLUMNS and row[5]})
    elif isinstance(class_names, (str, os.PathLike)):
        class_names = _class_names(existing_file("class_names", class_names))
    else:
        class_names = check_names("class_names", class_names)
    labels = {name: label for label, name in enumerate(class_names)}
    builder = TableBuilder()
    indices: dict[str, int] = {}
    for number, row in lines:
        try:
            _add(builder, row, f"{str(path)!r}, line {number}", indices, labels, first=number == 1)
        except AnnotationError as error:
            if report is None:
                raise
            report(error)
    table = builder.build(path, folder, class_names)
    tell_of_missing_objects(table, report, remedy=_IF_MISSING)
    return table


def _add(
    table: TableBuilder,
    row: list[str],
    where: str,
    indices: dict[str, int],
    labels: dict[str, int],
    *,
    first: bool,
) -> None:
    """Add the image of a row, if it is new, and its box, if it has one."""
    if len(row) != _NUM_COLUMNS or not row[0]:
        raise AnnotationError(f"{where}: expected {_COLUMNS}, got {_joined(row)}.")
    box: list[float] | None = None
    if any(row[1:]):
        try:
            box = [float(field) for field in row[1:5]]
        except ValueError as error:
            remedy = " If this line is a header, remove it." if first else ""
            raise AnnotationError(
                f"{where}: x1, y1, x2 and y2 must be numbers, got {_joined(row)}.{remedy}"
            ) from error
        if not row[5]:
            raise AnnotationError(f"{where}: the box has no class, got {_joined(row)}.")
    if row[0] not in indices:
        indices[row[0]] = table.add_image(row[0])
    if box is not None:
        table.add_box(indices[row[0]], labels.get(row[5], -1), box)


def _joined(row: list[str]) -> str:
    return shortened(",".join(row))


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the fields of each line that is not empty."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), skipinitialspace=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, [field.strip() for field in row]
    except csv.Error as error:
        raise AnnotationError(
            f"Cannot read {str(path)!r} as CSV: {error} (line {reader.line_num})."
        ) from error


def _class_names(path: Path) -> list[str]:
    numbers: dict[str, int] = {}
    for line, row in _lines(path):
        where = f"{str(path)!r}, line {line}"
        if len(row) != 2 or not row[1].isdecimal():
            raise AnnotationError(f"{where}: expected class,number, got {_joined(row)}.")
        if row[0] in numbers:
            raise AnnotationError(f"{where}: class {row[0]!r} is listed twice.")
        numbers[row[0]] = int(row[1])
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise AnnotationError(
            f"The class numbers in {str(path)!r} must be 0, 1, 2, ..., "
            f"got {shortened(sorted(numbers.values()))}."
        )
    return sorted(numbers, key=numbers.__getitem__)
