"""CSV files with a row an object, as keras-retinanet has them."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import TYPE_CHECKING

from focaldet._checks import must_be
from focaldet.datasets.readers._rows import TableRows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from focaldet.datasets._table import AnnotationTable

__all__ = ["read_csv"]

_FIELDS = 6


def read_csv(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    class_names: Sequence[str] | str | os.PathLike[str] | None = None,
) -> AnnotationTable:
    """Read a CSV file of rows ``path,x1,y1,x2,y2,class``, without a header.

    Images are numbered 1, 2, ... in the order in which the file first names them, categories 0,
    1, ... as ``class_names``. A row of a path alone, ``path,,,,,``, is an image without objects.

    Args:
        annotations: the file.
        images: the folder to which the paths are relative; None takes the file's own.
        class_names: of labels 0, 1, ...; or a CSV file of rows ``class,number``, numbers from 0. None
            takes those in the file, in alphabetical order; with several files, for training and for
            validation, give the names.

    Convention:
        Boxes are xyxy, continuous, in pixels. Sizes of images are not in the file:
        :class:`~focaldet.datasets.DetectionDataset` reads them from the images' headers.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a row in another form; the message names the file and the line.
    """
    path = Path(annotations)
    folder = path.parent if images is None else Path(images)
    if not folder.is_dir():
        raise FileNotFoundError(must_be("images", "an existing folder", repr(str(folder))))
    found = list(_rows(path, "annotations"))
    if class_names is None:
        class_names = sorted({row[5] for _, row in found if len(row) == _FIELDS and row[5]})
    elif isinstance(class_names, (str, os.PathLike)):
        class_names = _class_names(Path(class_names))
    labels = {name: label for label, name in enumerate(class_names)}
    rows = TableRows()
    indices: dict[str, int] = {}
    for line, row in found:
        where = f"{','.join(row)!r} in line {line} of {str(path)!r}"
        if len(row) != _FIELDS or not row[0]:
            raise ValueError(must_be("row", "path,x1,y1,x2,y2,class", where))
        if row[0] not in indices:
            indices[row[0]] = rows.add_image(row[0])
        if not any(row[1:]):
            continue
        try:
            box = [float(field) for field in row[1:5]]
        except ValueError as error:
            remedy = "A header is not part of this form: remove it." if line == 1 else ""
            raise ValueError(must_be("x1,y1,x2,y2", "numbers", where, remedy)) from error
        if not row[5]:
            raise ValueError(must_be("class", "given for a box", where))
        rows.add_box(indices[row[0]], labels.get(row[5], -1), box)
    return rows.table(path, folder, class_names)


def _rows(path: Path, name: str) -> Iterator[tuple[int, list[str]]]:
    """Yield number and fields of each line that is not empty."""
    if not path.is_file():
        raise FileNotFoundError(must_be(name, "an existing file", repr(str(path))))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, skipinitialspace=True)
            for row in reader:
                if row:
                    yield reader.line_num, [field.strip() for field in row]
    except (csv.Error, UnicodeDecodeError) as error:
        got = f"{str(path)!r} ({error})"
        raise ValueError(must_be(name, "a CSV file in UTF-8", got)) from error


def _class_names(path: Path) -> list[str]:
    numbers: dict[str, int] = {}
    for line, row in _rows(path, "class_names"):
        where = f"{','.join(row)!r} in line {line} of {str(path)!r}"
        if len(row) != 2 or not row[1].isdecimal():
            raise ValueError(must_be("row", "class,number", where))
        if row[0] in numbers:
            raise ValueError(must_be("class", "named once", where))
        numbers[row[0]] = int(row[1])
    if sorted(numbers.values()) != list(range(len(numbers))):
        got = f"{sorted(numbers.values())} in {str(path)!r}"
        raise ValueError(must_be("class numbers", "0, 1, 2, ...", got))
    return sorted(numbers, key=numbers.__getitem__)
