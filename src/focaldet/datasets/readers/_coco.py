"""COCO's JSON files of instances."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from focaldet._checks import must_be
from focaldet.datasets._cache import fingerprint, load_cache, save_cache
from focaldet.datasets._json import CocoColumns, read_columns
from focaldet.datasets._table import AnnotationTable, PackedStrings
from focaldet.datasets.readers._splits import unknown_split

if TYPE_CHECKING:
    import os

    import numpy.typing as npt

    from focaldet.datasets.readers._reader import ReadOptions

__all__ = ["LAYOUT", "NAME", "OPTIONS", "read", "read_coco", "recognises", "splits"]

_CACHED_FROM = 2**23  # bytes; smaller files open in a moment without a second file beside them


def read_coco(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    cache: bool = True,
) -> AnnotationTable:
    """Read a COCO file of instances.

    Args:
        annotations: the JSON file.
        images: the folder of the images. None looks for it beside the file and one folder above, as
            COCO lies: ``annotations/instances_val2017.json`` and ``val2017/``.
        cache: of a file of 8 MiB or more, keep what was read in a file beside it, and open that the
            next time.

    Convention:
        Boxes are ``x, y, width, height`` in the file and xyxy in the table, as numbers, without
        a pixel added. Labels are places in the ascending list of category ids.

    Raises:
        FileNotFoundError: no such file, or no folder of images.
        ValueError: a file that is not in COCO's form; the message names the item and its id.
    """
    path = Path(annotations)
    if not path.is_file():
        raise FileNotFoundError(must_be("annotations", "an existing file", repr(str(path))))
    folder = _image_folder(path, images)
    if not cache or path.stat().st_size < _CACHED_FROM:
        return _table(read_columns(path), path, folder)
    cached = load_cache(path, folder)
    if cached is not None:
        return cached
    state = fingerprint(path)
    table = _table(read_columns(path), path, folder)
    save_cache(table, path, state)
    return table


def _image_folder(path: Path, images: str | os.PathLike[str] | None) -> Path:
    if images is not None:
        folder = Path(images)
        if not folder.is_dir():
            raise FileNotFoundError(must_be("images", "an existing folder", repr(str(folder))))
        return folder
    split = path.stem.rpartition("_")[2]  # instances_val2017 -> val2017
    tried = [
        base / name for base in (path.parent, path.parent.parent) for name in (split, "images")
    ]
    for folder in tried:
        if folder.is_dir():
            return folder
    return path.parent


def _table(columns: CocoColumns, path: Path, folder: Path) -> AnnotationTable:
    order = np.argsort(columns.category_ids, kind="stable")
    category_ids = columns.category_ids[order]
    labels = _places(columns.annotation_category_ids, category_ids)
    image_indices = _places(columns.annotation_image_ids, columns.image_ids)
    _check_ids(columns, image_indices, path)
    boxes = columns.boxes.copy()
    boxes[:, 2:] += boxes[:, :2]
    areas = np.where(
        np.isnan(columns.areas), columns.boxes[:, 2] * columns.boxes[:, 3], columns.areas
    )
    by_image = np.argsort(image_indices, kind="stable")
    return AnnotationTable(
        source=path,
        image_folder=folder,
        file_names=PackedStrings.pack(columns.file_names),
        image_ids=columns.image_ids,
        image_sizes=columns.image_sizes,
        class_names=tuple(columns.class_names[place] for place in order.tolist()),
        category_ids=tuple(category_ids.tolist()),
        boxes=boxes[by_image],
        labels=labels[by_image],
        areas=areas[by_image],
        crowd=columns.crowd[by_image],
        annotation_ids=columns.annotation_ids[by_image],
        image_indices=image_indices[by_image],
    )


def _places(ids: npt.NDArray[np.int64], known: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where each id stands among the known ones, -1 where it doesn't."""
    if not len(known):
        return np.full(len(ids), -1, np.int64)
    order = np.argsort(known, kind="stable")
    ascending = known[order]
    places = np.searchsorted(ascending, ids).clip(max=len(known) - 1)
    return np.where(ascending[places] == ids, order[places], -1)


def _check_ids(columns: CocoColumns, image_indices: npt.NDArray[np.int64], path: Path) -> None:
    for name, ids in (
        ("images", columns.image_ids),
        ("categories", columns.category_ids),
    ):
        known, counts = np.unique(ids, return_counts=True)
        if len(known) < len(ids):
            got = f"{counts.max()} with id {known[counts.argmax()]} in {str(path)!r}"
            raise ValueError(must_be(name, "of different ids", got))
    if (image_indices < 0).any():
        row = int((image_indices < 0).argmax())
        got = (
            f"{columns.annotation_image_ids[row]} "
            f"(annotation id {columns.annotation_ids[row]}) in {str(path)!r}"
        )
        remedy = "Add the image to the file's images, or remove the annotation."
        raise ValueError(
            must_be(f"annotations[{row}]['image_id']", "the id of an image", got, remedy)
        )


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
