"""Annotations in COCO format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from focaldet._checks import existing_file, existing_folder
from focaldet._coco_json import InstanceColumns, describe_row, read_instances
from focaldet.datasets._cache import fingerprint, load_cache, save_cache
from focaldet.datasets._table import AnnotationTable, PackedStrings
from focaldet.datasets.readers._splits import unknown_split
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from focaldet.datasets.readers._reader import ReadOptions

__all__ = ["LAYOUT", "NAME", "OPTIONS", "read", "read_coco", "recognises", "splits"]

_CACHED_FROM = 2**23  # bytes; smaller files are read quickly enough without a cache


def read_coco(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    cache: bool = True,
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
        images: Folder of the images. None looks for it next to the file and in the folder above,
            where COCO has it: ``annotations/instances_val2017.json`` and ``val2017/``.
        cache: Whether to keep what was read from a file of 8 MiB or more in a second file next to
            it, which is read the next time if the annotations are unchanged.

    Convention:
        Boxes are ``x, y, width, height`` in the file and xyxy in the table, without a pixel added: a
        box of ``[1, 2, 3, 4]`` becomes ``[1, 2, 4, 6]``. Labels are positions in the ascending list
        of category ids.

    Raises:
        FileNotFoundError: If the file or the image folder does not exist.
        AnnotationError: If the file is not in COCO format. The message names the item and its id.

    Warns:
        UserWarning: If images are listed more than once, each time alike; each is kept once.
    """
    path = existing_file("annotations", annotations)
    folder = _default_image_folder(path) if images is None else existing_folder("images", images)
    if not cache or path.stat().st_size < _CACHED_FROM:
        return _table(read_instances(path), path, folder)
    cached = load_cache(path, folder)
    if cached is not None:
        return cached
    state = fingerprint(path)
    columns = read_instances(path)
    table = _table(columns, path, folder)
    if not columns.num_repeated_images:  # otherwise the next reading must warn again
        save_cache(table, path, state)
    return table


def _default_image_folder(path: Path) -> Path:
    split = path.stem.rpartition("_")[2]  # instances_val2017 -> val2017
    for base in (path.parent, path.parent.parent):
        for name in (split, "images"):
            if (base / name).is_dir():
                return base / name
    return path.parent


def _table(columns: InstanceColumns, path: Path, folder: Path) -> AnnotationTable:
    boxes = columns.boxes.copy()
    with np.errstate(invalid="ignore", over="ignore"):  # boxes may be infinite or NaN
        boxes[:, 2:] += boxes[:, :2]
    by_image = np.argsort(columns.image_indices, kind="stable")
    return AnnotationTable(
        source=path,
        image_folder=folder,
        file_names=PackedStrings.pack(_file_names(columns)),
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


def _file_names(columns: InstanceColumns) -> list[str]:
    names = [name for name in columns.file_names if name is not None]
    if len(names) < len(columns.file_names):
        index = columns.file_names.index(None)
        image_id = columns.image_ids[index].item()
        where = describe_row("images", index, columns.source, image_id)
        raise AnnotationError(f"{where}: file_name is missing, so the image cannot be found.")
    return names


# The entry of this format in focaldet.datasets.readers.READERS.

NAME = "COCO"
LAYOUT = "a .json file, or a folder with annotations/instances_<split>.json"
OPTIONS = frozenset({"images"})

_PREFIX = "instances_"


def recognises(path: Path) -> bool:
    """Return whether the path is a ``.json`` file or a folder with ``annotations``."""
    if path.is_dir():
        return (path / "annotations").is_dir()
    return path.suffix.lower() == ".json"


def splits(path: Path) -> tuple[str, ...] | None:
    """Return the splits of a folder, or None for a file."""
    if path.is_file():
        return None
    files = (path / "annotations").glob(f"{_PREFIX}*.json")
    return tuple(sorted(file.stem.removeprefix(_PREFIX) for file in files))


def read(path: Path, options: ReadOptions) -> AnnotationTable:
    """Read a file, or one split of a folder."""
    if options.split is None:
        return read_coco(path, options.images, cache=options.cache)
    file = path / "annotations" / f"{_PREFIX}{options.split}.json"
    if not file.is_file():
        raise FileNotFoundError(unknown_split(options.split, path, splits(path) or ()))
    return read_coco(file, options.images, cache=options.cache)
