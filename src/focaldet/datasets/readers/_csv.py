"""CSV files with one object per row, with or without a header."""

from __future__ import annotations

import csv
import io
import logging
import os
from dataclasses import replace
from operator import itemgetter
from typing import TYPE_CHECKING

from focaldet._checks import check_names, existing_file, existing_folder, printable, shortened
from focaldet.datasets._table import PackedStrings
from focaldet.datasets.readers._builder import TableBuilder
from focaldet.datasets.readers._places import locate_images, native_name
from focaldet.datasets.readers._problems import tell_of_missing_objects
from focaldet.datasets.readers._text import read_text
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
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
_PLAIN = {"path": 0, "x1": 1, "y1": 2, "x2": 3, "y2": 4, "class": 5}
_SIDES = ("x1", "y1", "x2", "y2")

# The names of columns in headers, in lower case: those of keras-retinanet, of TensorFlow's CSV files
# (which Roboflow also writes), of DeepForest and of pandas users.
_HEADERS = {
    "path": ("path", "filename", "file_name", "image_path", "image", "img_path", "image_name"),
    "x1": ("x1", "xmin", "x_min"),
    "y1": ("y1", "ymin", "y_min"),
    "x2": ("x2", "xmax", "x_max"),
    "y2": ("y2", "ymax", "y_max"),
    "class": ("class", "label", "class_name", "category", "category_name"),
    "width": ("width", "image_width", "img_width"),
    "height": ("height", "image_height", "img_height"),
}
_SIDE_LIMIT = 2**31

_logger = logging.getLogger(__name__)
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
    """Read a CSV file with rows ``path,x1,y1,x2,y2,class``, or with a header that names the columns.

    Image ids are 1, 2, ... in the order in which the file first names the images. Category ids are
    0, 1, ... in the order of ``class_names``. A row with only a path, ``path,,,,,``, is an image
    without objects. So is a row with only a path, a width and a height.

    With a header, the columns can be in any order, such as ``filename,width,height,class,xmin,ymin,xmax,
    ymax`` (TensorFlow, Roboflow) or ``image_path,xmin,ymin,xmax,ymax,label`` (DeepForest). Other columns
    are ignored, which is logged.

    Args:
        annotations: The CSV file.
        images: The folder to which the paths are relative. None uses the folder of the file, or else
            its subfolder "images". If none of the first images is there, images with the same names
            are looked for in all folders inside it, which is logged.
        class_names: Names of labels 0, 1, ..., or the path of a CSV file with rows ``class,number``,
            numbered from 0. None uses the names in the file, in alphabetical order. If training and
            validation have separate files, pass the names so that the labels agree.
        report: A function that is called with each error or warning about a file, line or object, which
            is then left out, so that all can be listed. None raises the first error. See
            :func:`check_dataset`.

            .. versionadded:: 0.3.0

    Convention:
        Boxes are xyxy, continuous, in pixels. Unless the file has columns for the image sizes,
        :class:`~focaldet.datasets.DetectionDataset` reads them from the headers of the images.
        Coordinates between 0 and 1 in a file with a header are an error, because they are
        probably fractions of the image size.

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
    columns = _header(path, lines[0][1]) if lines else None
    if columns is None:
        columns = _PLAIN
    else:
        del lines[0]
    rows = _Rows(columns, str(path), len(columns) if columns is _PLAIN else 0)
    if class_names is None:
        class_names = sorted(rows.class_names(lines))
    elif isinstance(class_names, (str, os.PathLike)):
        class_names = _class_names(existing_file("class_names", class_names))
    else:
        class_names = check_names("class_names", class_names)
    labels = {name: label for label, name in enumerate(class_names)}
    builder = TableBuilder()
    for number, row in lines:
        try:
            rows.add(builder, row, number, labels)
        except AnnotationError as error:
            if report is None:
                raise
            report(error)
    if rows.are_fractions:
        _raise_or_report(
            AnnotationError(
                f"{str(path)!r}: all coordinates are between 0 and 1, so they are probably fractions of "
                "the image size. Multiply x by the width and y by the height of each image."
            ),
            report,
        )
    table = _with_images(builder.build(path, folder, class_names), anywhere=images is None)
    tell_of_missing_objects(table, report, remedy=_IF_MISSING)
    return table


def _raise_or_report(error: AnnotationError, report: Report | None) -> None:
    """Raise an error, unless the caller collects them."""
    if report is None:
        raise error
    report(error)


def _header(path: Path, row: list[str]) -> dict[str, int] | None:
    """Return the index of each column if the first row of a file is a header, or None.

    Raises:
        AnnotationError: If it is a header without a column that is needed, or with two for the same.
    """
    names = [name.lower() for name in row]
    columns: dict[str, int] = {}
    for column, spellings in _HEADERS.items():
        places = [place for place, name in enumerate(names) if name in spellings]
        if len(places) > 1:
            found = " and ".join(repr(row[place]) for place in places)
            raise AnnotationError(
                f"{str(path)!r}, line 1: {found} can both be the column for {column}. Rename one."
            )
        if places:
            columns[column] = places[0]
    if not any(side in columns for side in _SIDES):
        return None
    if missing := [column for column in _PLAIN if column not in columns]:
        expected = "; ".join(f"{name}: {' or '.join(_HEADERS[name])}" for name in missing)
        raise AnnotationError(
            f"{str(path)!r}, line 1: the header {_joined(row)} lacks columns. Expected {expected}."
        )
    ignored = [name for place, name in enumerate(row) if place not in columns.values() and name]
    if ignored:
        _logger.warning(
            "%s: ignored the columns %s.", printable(str(path)), printable(shortened(ignored))
        )
    return columns


class _Rows:
    """Adds the rows of a file to a table.

    Args:
        columns: The index of each column.
        source: The path of the file, for messages.
        length: Number of fields of each row; 0 allows rows that end earlier or later.
    """

    def __init__(self, columns: dict[str, int], source: str, length: int) -> None:
        self._columns = columns
        self._pick = itemgetter(*(columns[name] for name in _PLAIN))
        self._last = max(columns[name] for name in _PLAIN)
        self._has_sizes = "width" in columns or "height" in columns
        self._has_header = not length
        self._source = repr(source)
        self._path_place = columns["path"]
        self._length = length
        self._indices: dict[str, int] = {}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._fractions = self._others = False

    @property
    def are_fractions(self) -> bool:
        """Whether all coordinates are between 0 and 1, and some of them strictly."""
        return self._fractions and not self._others

    def class_names(self, lines: Iterable[tuple[int, list[str]]]) -> set[str]:
        """Return the names of all classes in the rows."""
        place = self._columns["class"]
        return {row[place] for _, row in lines if self._fits(row) and row[place:]} - {""}

    def add(self, table: TableBuilder, row: list[str], line: int, labels: dict[str, int]) -> None:
        """Add the image of a row, if it is new, and its box, if it has one."""
        where = f"{self._source}, line {line}"
        fields = row
        if len(row) <= self._last and self._has_header:
            fields = [*row, *[""] * (self._last + 1 - len(row))]
        if not self._fits(row) or not fields[self._path_place]:
            raise AnnotationError(f"{where}: expected {self._expected()}, got {_joined(row)}.")
        name, *sides, label = self._pick(fields)
        box: list[float] | None = None
        if label or any(sides):
            try:
                box = [float(side) for side in sides]
            except ValueError as error:
                raise AnnotationError(
                    f"{where}: x1, y1, x2 and y2 must be numbers, got {_joined(row)}."
                    f"{self._remedy(line)}"
                ) from error
            if not label:
                raise AnnotationError(f"{where}: the box has no class, got {_joined(row)}.")
        size = self._size(row, where) if self._has_sizes else (0, 0)
        index = self._indices.get(name)
        if index is None:
            index = self._indices[name] = table.add_image(name, size)
            self._sizes[name] = size
        elif self._has_sizes and size != self._sizes[name]:
            raise AnnotationError(
                f"{where}: the size of {printable(repr(name))} is {size[1]}x{size[0]}, but "
                f"{self._sizes[name][1]}x{self._sizes[name][0]} in an earlier line."
            )
        if box is not None:
            if self._has_header and not self._others:
                self._fractions |= any(0 < side < 1 for side in box)
                self._others = not all(0 <= side <= 1 for side in box)
            table.add_box(index, labels.get(label, -1), box)

    def _fits(self, row: list[str]) -> bool:
        return self._has_header or len(row) == self._length

    def _field(self, row: list[str], column: str) -> str:
        place = self._columns.get(column, len(row))
        return row[place] if place < len(row) else ""

    def _size(self, row: list[str], where: str) -> tuple[int, int]:
        """Return the size of the image, (0, 0) if it is not given."""
        sides = []
        for column in ("height", "width"):
            text = self._field(row, column)
            try:
                side = float(text or 0)
            except ValueError:
                side = -1
            if not 0 <= side < _SIDE_LIMIT:
                raise AnnotationError(
                    f"{where}: {column} must be a number of pixels, got {text!r}."
                )
            sides.append(int(side))
        return sides[0], sides[1]

    def _expected(self) -> str:
        if self._length:
            return _COLUMNS
        return ",".join(sorted(self._columns, key=self._columns.__getitem__))

    def _remedy(self, line: int) -> str:
        if line > 1 or not self._length:
            return ""
        names = ",".join(_PLAIN)
        return f" If this line is a header, name the columns as in {names}, or remove it."


def _with_images(table: AnnotationTable, *, anywhere: bool) -> AnnotationTable:
    """Return the table with the folder of its images, and file names that fit this system."""
    folder = table.image_folder
    folders = [folder, folder / "images"] if anywhere else [folder]
    located = locate_images(table.file_names, folders, folder, table.source)
    names = [native_name(name, located.folder) for name in located.names]
    return replace(table, image_folder=located.folder, file_names=PackedStrings.pack(names))


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
