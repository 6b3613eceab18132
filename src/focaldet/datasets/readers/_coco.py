"""Annotations in COCO format."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from focaldet._checks import existing_file, existing_folder, printable
from focaldet._coco_json import InstanceColumns, describe_row, read_instances
from focaldet.datasets._cache import fingerprint, load_cache, save_cache
from focaldet.datasets._table import AnnotationTable, PackedStrings
from focaldet.datasets.readers._places import locate_images, native_name
from focaldet.datasets.readers._problems import raise_or_warn, tell_of_missing_objects
from focaldet.datasets.readers._splits import unknown_split
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from focaldet.datasets.readers._problems import Report
    from focaldet.datasets.readers._reader import ReadOptions

__all__ = ["LAYOUT", "NAME", "OPTIONS", "read", "read_coco", "recognises", "splits"]

_logger = logging.getLogger(__name__)

_ANNOTATIONS = "annotations"
_CACHED_FROM = 2**23  # bytes; smaller files are read quickly enough without a cache
_IF_MISSING = "If they should have objects, check that the file is complete."


def read_coco(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    cache: bool = True,
    report: Report | None = None,
) -> AnnotationTable:
    """Read a COCO annotation file ("instances").

    The file is checked as in :func:`focaldet.evaluation.evaluate_coco`: what changes a result must be
    right, but integers may be written as ``1.0``, and ``id``, ``area``, ``iscrowd``, the size of an
    image and the name of a category may be missing. A width or height of 0 or -1 and a negative
    ``area`` also count as missing. Only ``file_name`` is required here and not
    there. Boxes are not judged; use :func:`check_dataset` to find those that are empty or outside
    their image.

    Args:
        annotations: Path of the JSON file.
        images: Folder of the images. None looks for the first images in the folder of the file and in
            the folder above, and in those of their subfolders that have the name of the split or
            are called "images". COCO itself has ``annotations/instances_val2017.json`` and
            ``val2017/``. If none of them is found, images with the same names are looked for in all
            folders next to the file (for ``annotations/x.json``, next to ``annotations``), which is
            logged. If there are none either, reading the first image raises an error that lists
            the folders.
        cache: Whether to keep what was read from a file of 8 MiB or more in a second file next to
            it, which is read the next time if the annotations are unchanged.
        report: A function that is called with each error or warning about a file, line or object, which
            is then left out, so that all can be listed. None raises the first error. See
            :func:`check_dataset`.

            .. versionadded:: 0.3.0

    Convention:
        Boxes are ``x, y, width, height`` in the file and xyxy in the table, without a pixel added: a
        box of ``[1, 2, 3, 4]`` becomes ``[1, 2, 4, 6]``. Labels are positions in the ascending list
        of category ids. Backslashes in file names, which Windows programs write, are read as ``/`` if
        the file exists under that name and not under the other. A category of id 0 that is the
        supercategory of all others and that no box has, as in Roboflow's exports, is left out,
        which is logged.

    Raises:
        FileNotFoundError: If the file or the image folder does not exist.
        AnnotationError: If the file is not in COCO format. The message names the item and its id.

    Warns:
        UserWarning: If images are listed more than once, each time alike; each is kept once. If there
            is no object that training could learn from, or most images have no objects. Fewer images
            without objects are counted in the log.
    """
    path = existing_file("annotations", annotations)
    folder = None if images is None else existing_folder("images", images)
    cache = cache and path.stat().st_size >= _CACHED_FROM
    table = load_cache(path, path.parent) if cache else None
    if table is None:
        state = fingerprint(path) if cache else None
        noted: list[Exception] = []
        columns = read_instances(path, report=None if report is None else noted.append)
        say = raise_or_warn if report is None else noted.append
        table = _without_root(_table(columns, path, say), columns)
        if columns.repetitions:
            say(UserWarning(columns.repetitions))
        if state is not None and not (noted or columns.repetitions):
            save_cache(table, path, state)  # otherwise, the next reading must report again
        if report is not None:
            for problem in noted:
                report(problem)
    table = _with_images(table, folder)
    tell_of_missing_objects(table, report, remedy=_IF_MISSING)
    if report is not None and table.tried_folders:
        report(UserWarning(table.describe_folder()))
    return table


def _with_images(table: AnnotationTable, folder: Path | None) -> AnnotationTable:
    """Return the table with the folder of its images, and file names that fit this system."""
    path = table.source
    if folder is None:
        above = path.parent.parent if path.parent.name == _ANNOTATIONS else path.parent
        located = locate_images(table.file_names, _image_folders(path), above, path)
    else:
        located = locate_images(table.file_names, [folder], folder, path)
        located = located._replace(tried=())  # the caller knows the folder
    file_names = located.names
    if os.sep != "\\" and _has_backslash(file_names):
        file_names = [native_name(name, located.folder) for name in file_names]
    if not isinstance(file_names, PackedStrings):
        file_names = PackedStrings.pack(file_names)
    return replace(
        table, image_folder=located.folder, file_names=file_names, tried_folders=located.tried
    )


def _has_backslash(names: Sequence[str]) -> bool:
    if isinstance(names, PackedStrings):  # the bytes are searched much faster than the names
        return b"\\" in names.data.tobytes()
    return any("\\" in name for name in names)


def _image_folders(path: Path) -> list[Path]:
    """Return the folders that may contain the images of an annotation file."""
    split = path.stem.rpartition("_")[2]  # instances_val2017 -> val2017
    names = (split, f"images/{split}", "images")
    bases = (path.parent, path.parent.parent)
    return [
        *(base / name for base in bases for name in names if (base / name).is_dir()),
        *bases,
    ]


def _table(columns: InstanceColumns, path: Path, report: Report) -> AnnotationTable:
    boxes = columns.boxes.copy()
    with np.errstate(invalid="ignore", over="ignore"):  # boxes may be infinite or NaN
        boxes[:, 2:] += boxes[:, :2]
    by_image = np.argsort(columns.image_indices, kind="stable")
    return AnnotationTable(
        source=path,
        image_folder=path.parent,
        file_names=PackedStrings.pack(_file_names(columns, report)),
        image_ids=columns.image_ids,
        image_sizes=columns.image_sizes,
        class_names=columns.category_names,
        category_ids=tuple(columns.category_ids.tolist()),
        boxes=boxes[by_image],
        labels=columns.labels[by_image],
        areas=columns.areas[by_image],
        crowd=columns.crowd[by_image],
        annotation_ids=columns.annotation_ids[by_image],
        image_indices=columns.image_indices[by_image],
    )


def _without_root(table: AnnotationTable, columns: InstanceColumns) -> AnnotationTable:
    """Return the table without a category that only groups the others, as Roboflow writes it.

    It has the id 0 and the supercategory "none", its name is the supercategory of every other
    category, and no box has it.
    """
    ids, names = table.category_ids, table.class_names
    if len(ids) < 2 or ids[0] != 0 or (columns.supercategories[0] or "none") != "none":
        return table
    if any(parent != names[0] for parent in columns.supercategories[1:]):
        return table
    if (table.labels == 0).any():
        return table
    _logger.warning(
        "%s: left out the category %s (id 0), which only groups the others: no box has it.",
        printable(str(table.source)),
        printable(repr(names[0])),
    )
    labels = np.where(table.labels > 0, table.labels - 1, table.labels)
    return replace(table, class_names=names[1:], category_ids=ids[1:], labels=labels)


def _file_names(columns: InstanceColumns, report: Report) -> list[str]:
    """Return the file names; "" for those that are missing, which are reported."""
    names: list[str] = []
    for index, name in enumerate(columns.file_names):
        if name is None:
            where = describe_row("images", index, columns.source, columns.image_ids[index].item())
            problem = f"{where}: file_name is missing, so the image cannot be found."
            report(AnnotationError(problem))
        names.append(name or "")
    return names


# The entry of this format in focaldet.datasets.readers.READERS.

NAME = "COCO"
LAYOUT = "a .json file, or a folder with annotations/instances_<split>.json"
OPTIONS = frozenset({"images"})

_PREFIX = "instances_"


def recognises(path: Path) -> bool:
    """Return whether the path is a ``.json`` file or a folder with files of instances."""
    if path.is_dir():
        return any((path / _ANNOTATIONS).glob(f"{_PREFIX}*.json"))
    return path.suffix.lower() == ".json"


def splits(path: Path) -> tuple[str, ...] | None:
    """Return the splits of a folder, or None for a file."""
    if path.is_file():
        return None
    files = (path / _ANNOTATIONS).glob(f"{_PREFIX}*.json")
    return tuple(sorted(file.stem.removeprefix(_PREFIX) for file in files))


def read(path: Path, options: ReadOptions) -> AnnotationTable:
    """Read a file, or one split of a folder."""
    if options.split is None:
        return read_coco(path, options.images, cache=options.cache, report=options.report)
    file = path / _ANNOTATIONS / f"{_PREFIX}{options.split}.json"
    if not file.is_file():
        raise FileNotFoundError(unknown_split(options.split, path, splits(path) or ()))
    return read_coco(file, options.images, cache=options.cache, report=options.report)
