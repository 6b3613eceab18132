"""The annotation formats that focaldet can write, one module per format.

A writer (:class:`Writer`) is a module with a ``NAME``, a ``FILE_SUFFIX``, its default for
``IMAGE_FILES``, and the function ``write``. To add a format, write its module and list it in
:data:`WRITERS`.

.. versionadded:: 0.3.0
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from focaldet._checks import check_choice, printable, shortened
from focaldet.datasets._table import AnnotationTable
from focaldet.datasets.writers import _coco, _csv, _labelme, _voc, _yolo
from focaldet.datasets.writers._folder import OutputFolder
from focaldet.datasets.writers._places import safe_part
from focaldet.datasets.writers._table_parts import leave_out_unusable
from focaldet.datasets.writers._writer import ImageFiles, Output, Writer
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["WRITERS", "Output", "Writer", "write_annotations"]

FormatName: TypeAlias = Literal["coco", "yolo", "voc", "csv", "labelme"]

WRITERS: Mapping[str, Writer] = {
    "coco": _coco,
    "yolo": _yolo,
    "voc": _voc,
    "csv": _csv,
    "labelme": _labelme,
}
"""The formats by their names in :func:`~focaldet.datasets.write_annotations`.

:meta hide-value:
"""

_SINGLE = "all"  # the name of a table that is not called by one
_logger = logging.getLogger(__name__)


def write_annotations(
    table: AnnotationTable | Mapping[str, AnnotationTable],
    path: str | os.PathLike[str],
    format: FormatName,  # noqa: A002  # the usual name
    *,
    image_files: ImageFiles | None = None,
    image_folder: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write annotations as COCO, YOLO, Pascal VOC, CSV or LabelMe files.

    :func:`~focaldet.datasets.read_annotations` reads them again. What is written:

    ===========  ====================================================================================
    "coco"       ``path`` itself if it ends with ``.json``, otherwise
                 ``annotations/instances_<split>.json``. The file holds everything except outlines.
    "yolo"       ``data.yaml``, ``images/<split>`` and ``labels/<split>``. A single table becomes
                 "train", and so does "train2017". Programs only look for "train", "val" and "test";
                 splits with other names are written and counted in the log.
    "voc"        ``Annotations``, ``JPEGImages`` and ``ImageSets/Main/<split>.txt``.
    "csv"        ``path`` itself if it ends with ``.csv``, and ``<name>_classes.csv`` next to it,
                 otherwise ``<split>.csv`` and ``classes.csv``. Pass the latter to
                 :func:`~focaldet.datasets.read_csv` as ``class_names``, so that labels keep their
                 order.
    "labelme"    A ``.json`` file per image, in a folder per split, and ``labels.txt``.
    ===========  ====================================================================================

    Files appear only after all of them are complete.

    Args:
        table: The annotations, or those of each split by its name. A single table is called "all", and
            needs no name in a format that has single files.
        path: The file or folder to write. Folders above it are created.
        format: "coco", "yolo", "voc", "csv" or "labelme".
        image_files: "keep" leaves the images where they are; COCO, CSV and LabelMe files refer to them
            by relative paths. "link" creates symbolic links in the folder, and "copy" copies the files.
            None links for YOLO and Pascal VOC, whose readers look for images in the folder of the
            dataset, and keeps otherwise. A single file can only keep them.
        image_folder: The folder to which paths of kept images in COCO and CSV files are relative. None
            uses the folder of the file, so that readers find the images without being told.
        overwrite: Whether to write into a folder that is not empty, and to replace files. Other files
            in the folder stay.

    Returns:
        The path of what was written.

    Convention:
        Boxes are continuous, without a pixel added: VOC's ``xmax`` is x2. COCO, Pascal VOC, CSV and
        LabelMe hold float64 numbers in full. COCO stores a width, so x2 is exact to one rounding of
        ``x1 + width``. YOLO has 9 decimals of the image size: corners are exact to 1e-9 of it, 0.00001
        pixels in an image of 10,000.

        Crowds are kept by COCO, by Pascal VOC (as difficult) and by LabelMe (as the flag "crowd").
        YOLO and CSV leave them out. Ids and areas are only kept by COCO. Image ids become the position
        of the image, which is that of its name in YOLO and LabelMe. Image sizes that are not annotated
        are read from the images. Images whose names would collide in YOLO and Pascal VOC folders,
        such as ``a/1.jpg`` and ``b/1.jpg``, get a new name, counted in the log.

    Raises:
        AnnotationError: If the format cannot hold a name, an id or an image.
        FileExistsError: If the file exists or the folder is not empty, and ``overwrite`` is False.
        FileNotFoundError: If an image is needed, to link or copy it or for its size, and does not exist.
        ValueError: If an option is unknown or does not fit the format, there are no tables, or their
            classes differ.

    Warns:
        UserWarning: If boxes are left out or clipped, areas are lost, or the size of an image is
            unknown. The warning counts each.

    .. versionadded:: 0.3.0
    """
    check_choice("format", format, WRITERS)
    writer = WRITERS[format]
    tables = _checked_tables(table)
    how: ImageFiles = writer.IMAGE_FILES if image_files is None else image_files
    check_choice("image_files", how, ("keep", "link", "copy"))
    target = Path(os.path.abspath(path))  # noqa: PTH100  (resolve() would follow links)
    is_file = writer.FILE_SUFFIX is not None and target.suffix.lower() == writer.FILE_SUFFIX
    if is_file:
        _check_single_file(target, tables, how, overwrite=overwrite)
    else:
        _check_folder(target, overwrite=overwrite)
    if image_folder is not None and (writer.FILE_SUFFIX is None or how != "keep"):
        raise ValueError(
            f"image_folder={shortened(os.fspath(image_folder))} is only for kept images in COCO and CSV "
            "files. Leave it out."
        )
    with OutputFolder.staged(
        target.parent if is_file else target, overwrite=overwrite, count_others=not is_file
    ) as folder:
        output = Output(
            folder=folder,
            file_name=target.name if is_file else None,
            image_files=how,
            image_folder=None if image_folder is None else Path(os.path.abspath(image_folder)),  # noqa: PTH100
        )
        usable = {split: leave_out_unusable(one, output.losses) for split, one in tables.items()}
        writer.write(usable, output)
    _tell_of_losses(tables, writer, output)
    return Path(path)


def _checked_tables(
    table: AnnotationTable | Mapping[str, AnnotationTable],
) -> dict[str, AnnotationTable]:
    """Return the tables by their splits, after checking that they can be written together."""
    tables = {_SINGLE: table} if isinstance(table, AnnotationTable) else dict(table)
    if not tables:
        raise ValueError("table has no splits; pass at least one.")
    first = next(iter(tables.values()))
    for split, one in tables.items():
        if safe_part(split) != split:
            raise ValueError(
                f"{shortened(split)} cannot be the name of a split, because files are named after it."
            )
        if one.class_names != first.class_names:
            raise ValueError(
                f"The classes of the split {split!r} are {shortened(one.class_names)}, but those of "
                f"{next(iter(tables))!r} are {shortened(first.class_names)}. Read both with the same "
                "class_names."
            )
        for name in (*one.class_names, *one.file_names):
            _check_encodable(name)
    return tables


def _check_encodable(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise AnnotationError(
            f"The name {shortened(name)} is not valid Unicode, so no file can hold it. Rename it."
        ) from error


def _check_single_file(
    target: Path, tables: Mapping[str, AnnotationTable], how: ImageFiles, *, overwrite: bool
) -> None:
    if len(tables) > 1:
        raise ValueError(
            f"{str(target)!r} is a single file, but there are {len(tables)} splits: "
            f"{', '.join(map(repr, tables))}. Pass a folder, or write them one by one."
        )
    if how != "keep":
        raise ValueError(
            f"image_files={how!r} needs a folder, but {str(target)!r} is a single file. Pass a folder, or "
            "image_files='keep'."
        )
    if target.is_dir():
        raise FileExistsError(f"{str(target)!r} is a folder, not a file (path).")
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"{str(target)!r} exists already (path). Choose another path, or pass overwrite=True."
        )


def _check_folder(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{str(target)!r} is a file, not a folder (path).")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(
            f"The folder {str(target)!r} is not empty (path). Choose another folder, or pass "
            "overwrite=True."
        )


def _tell_of_losses(tables: Mapping[str, AnnotationTable], writer: Writer, output: Output) -> None:
    """Warn about what is not in the files that were written. Ids are only logged."""
    sources = ", ".join(dict.fromkeys(printable(str(one.source)) for one in tables.values()))
    if not writer.HOLDS_IDS:
        lost = sum(_has_ids(one) for one in tables.values())
        if lost:
            _logger.info(
                "%s: the ids of images and categories are not kept by %s.", sources, writer.NAME
            )
    if output.losses:
        counts = "; ".join(f"{what}: {count:,}" for what, count in output.losses.items())
        warnings.warn(
            f"{sources}: not all annotations are written to the {writer.NAME} files as they are. "
            f"{counts[0].upper()}{counts[1:]}.",
            UserWarning,
            stacklevel=3,
        )


def _has_ids(table: AnnotationTable) -> bool:
    """Return whether the ids are others than those that readers give to files without ids."""
    return (
        table.category_ids != tuple(range(len(table.category_ids)))
        or (table.image_ids != np.arange(1, len(table) + 1)).any().item()
    )
