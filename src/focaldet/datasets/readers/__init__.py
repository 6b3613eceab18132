"""The annotation formats that focaldet can read, one module per format.

A reader (:class:`Reader`) is a module with a ``NAME``, a ``LAYOUT``, the ``OPTIONS`` that it takes,
and the functions ``recognises``, ``splits`` and ``read``. To add a format, write its module and list
it in :data:`READERS`. :func:`read_annotations`, the dataset checker and the examples then read it.

.. versionadded:: 0.3.0
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from focaldet._checks import check_choice, printable, shortened
from focaldet.datasets.readers import (
    _coco,
    _csv,
    _cvat,
    _label_studio,
    _labelme,
    _voc,
    _voc_files,
    _yolo,
)
from focaldet.datasets.readers._alignment import aligned
from focaldet.datasets.readers._exif import EXIF_CHOICES, Exif, turn_upright
from focaldet.datasets.readers._folder import FolderReader, describe_content, find_in_folder
from focaldet.datasets.readers._reader import Reader, ReadOptions
from focaldet.datasets.readers._splits import missing_split, split_of, usual_splits
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.readers._problems import Report

__all__ = [
    "READERS",
    "ReadOptions",
    "Reader",
    "find_reader",
    "list_splits",
    "read_annotations",
    "read_splits",
]

READERS: tuple[Reader, ...] = (
    _voc,
    _yolo,
    _label_studio,
    _coco,
    _csv,
    _cvat,
    _labelme,
    _voc_files,
)
"""The supported formats, in the order in which they are tried.

:meta hide-value:
"""

_logger = logging.getLogger(__name__)

_SAID_BY_FILES = {"images": "say where the images are", "class_names": "name the classes"}


def find_reader(path: str | os.PathLike[str]) -> Reader:
    """Return the reader of the format that a file or folder is in.

    A folder can also contain a folder per split (``train``, ``valid``, ``test``), or annotation files
    of formats that have one file per split.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        AnnotationError: If no reader recognises it, or a folder contains several annotation files. The
            message says what each reader looks for, and what the folder contains.

    .. versionadded:: 0.3.0
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No such file or folder: {str(path)!r} (path).")
    for reader in READERS:
        if reader.recognises(path):
            return reader
    if path.suffix.lower() == ".zip" and path.is_file():
        raise AnnotationError(f"{str(path)!r} is a zip archive. Unpack it and pass the folder.")
    if path.is_dir() and (found := find_in_folder(path, READERS)) is not None:
        return found
    looked_for = ", ".join(f"{reader.NAME} ({reader.LAYOUT})" for reader in READERS)
    raise AnnotationError(
        f"{str(path)!r} is not in a supported annotation format. Looked for: {looked_for}, or a "
        "folder with such files, or with folders train, val and test of them."
        f"{printable(describe_content(path))}"
    )


def list_splits(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the name in a dataset of each split that :func:`read_splits` reads.

    The keys are "train", "val" and "test", as far as the dataset has them, in this order. A dataset
    whose only split has a different name has that name as its key. A path that is a single split gives
    an empty dictionary, and so does one with several splits of other names.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        AnnotationError: If the format is not supported, or two splits stand for the same one.

    .. versionadded:: 0.3.0
    """
    path = Path(path)
    names = find_reader(path).splits(path) or ()
    found = usual_splits(path, names)
    return {names[0]: names[0]} if len(names) == 1 and not found else found


def read_annotations(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    exif: Exif = "upright",
    cache: bool = True,
    report: Report | None = None,
) -> AnnotationTable:
    """Read annotations in any supported format, which is recognised by the path.

    Args:
        path: A file or folder in one of the formats of :data:`~focaldet.datasets.readers.READERS`:
            a COCO file (``.json``) or folder (with ``annotations/instances_<split>.json``), a Pascal
            VOC folder (with ``ImageSets/Main/<split>.txt``, or any folder of ``.xml`` files), a YOLO
            ``data.yaml``, ``obj.data`` or folder, a ``.csv`` file, a CVAT ``annotations.xml``, a Label
            Studio ``.json`` file, or a folder of LabelMe's ``.json`` files. Also a folder with such
            files, or with folders ``train``, ``valid`` and ``test`` of them.
        images: Folder of the images. An error for formats whose files say where it is.
        split: Name of a split, such as "train". Required if there are several, and an error for a
            single one. "val" also stands for "valid" and "val2017", and so on, if the dataset has no
            split of exactly this name.
        class_names: Names of labels 0, 1, ..., for Pascal VOC, CSV, LabelMe and Label Studio. Files of
            the other formats contain them.
        exif: Which pixels the boxes were drawn on, if photos have an EXIF orientation, which turns
            them. "upright": on the upright image. "stored": on the pixels as the file stores them; the
            boxes and sizes are then turned with the image. "auto": whichever has the annotated size,
            an error if that cannot be told (square photos are taken like the others). Other than
            "upright", this reads the header of every image.

            .. versionadded:: 0.3.0
        cache: Whether to keep a cache of a large COCO file, see :func:`read_coco`. Other formats have
            none.
        report: A function that is called with each error or warning about a file, line or object, which
            is then left out, so that all can be listed. None raises the first error. See
            :func:`check_dataset`.

            .. versionadded:: 0.3.0

    Raises:
        FileNotFoundError: If the path, or a file or folder that it refers to, does not exist.
        AnnotationError: If the format is not supported, or a file is damaged.
        ValueError: If an option is missing, or the format does not take it.

    Warns:
        UserWarning: If no object can be learned from, or a reader warns, see :func:`read_yolo` and
            :func:`read_coco`.
    """
    path = Path(path)
    check_choice("exif", exif, EXIF_CHOICES)
    reader = find_reader(path)
    options = ReadOptions(
        images=images, split=split, class_names=class_names, cache=cache, report=report, exif=exif
    )
    splits = _check_options(reader, path, options)
    if splits is None and options.split is not None:
        raise ValueError(
            f"split={options.split!r} cannot be given for {str(path)!r}, which is a single split. "
            "Leave it out."
        )
    if splits is not None and options.split is None:
        raise ValueError(missing_split(path, splits))
    if splits is not None and split is not None and split not in splits and split_of(split):
        name = usual_splits(path, splits).get(split_of(split) or "")
        if name is not None:
            _logger.info("%s: read the split %r for %r.", printable(str(path)), name, split)
            options = replace(options, split=name)
    if isinstance(reader, FolderReader):
        options = reader.with_class_names(options)
    return _read(reader, path, options)


def read_splits(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    class_names: Sequence[str] | None = None,
    exif: Exif = "upright",
    cache: bool = True,
    report: Report | None = None,
) -> dict[str, AnnotationTable]:
    """Read all splits of a dataset, with the same classes in the same order.

    Splits are called "train", "val" and "test", whatever the dataset calls them: "valid" and
    "validation" are "val", and "train2017" is "train". Other splits, such as "trainval", are left out
    if there is one of these. Both is logged.

    Args:
        path: As for :func:`read_annotations`.
        images: Folder of the images, as for :func:`read_annotations`. If it contains a folder with the
            name of a split as the dataset writes it, that is used for the split.
        class_names: As for :func:`read_annotations`.
        exif: As for :func:`read_annotations`.
        cache: As for :func:`read_annotations`.
        report: As for :func:`read_annotations`.

    Convention:
        COCO files of splits that number their categories differently are matched by the names of the
        categories, in the order of the first split. The classes of formats that do not declare them
        (Pascal VOC, CSV) are those of all splits together, in alphabetical order.

    Returns:
        The table of each split that exists, in the order "train", "val", "test". A path that is a
        single split gives ``{"all": table}``.

    Raises:
        FileNotFoundError: If the path, or a file or folder that it refers to, does not exist.
        AnnotationError: If the format is not supported, a file is damaged, two splits stand for the
            same one, several splits have other names, or their classes differ. The message lists what
            was found.
        ValueError: If the format does not take an option.

    Warns:
        UserWarning: As :func:`read_annotations`.

    .. versionadded:: 0.3.0
    """
    path = Path(path)
    check_choice("exif", exif, EXIF_CHOICES)
    reader = find_reader(path)
    options = ReadOptions(
        images=images, class_names=class_names, cache=cache, report=report, exif=exif
    )
    splits = _check_options(reader, path, options)
    if splits is None:
        return {"all": _read(reader, path, options)}
    tables: dict[str, AnnotationTable] = {}
    for usual, name in _chosen_splits(reader, path, splits).items():
        tables[usual] = _read(reader, path, replace(options, split=name))
        if "class_names" in reader.OPTIONS and not isinstance(reader, FolderReader):
            options = replace(options, class_names=tables[usual].class_names)
    return aligned(tables, names_from_objects="class_names" in reader.OPTIONS, source=str(path))


def _chosen_splits(reader: Reader, path: Path, splits: Sequence[str]) -> dict[str, str]:
    """Return the name in the dataset of each split that is read, and log what is not obvious."""
    source = printable(str(path))
    chosen = usual_splits(path, splits)
    if not chosen and len(splits) == 1:
        chosen = {"all": splits[0]}
    if not chosen:
        listed = ", ".join(map(repr, splits)) or "none"
        raise AnnotationError(
            f"{str(path)!r} has no split called train, val or test. Its splits: {printable(listed)}. "
            "Rename them, or read one with read_annotations(..., split=...)."
        )
    renamed = [f"{name!r} as {usual!r}" for usual, name in chosen.items() if name != usual]
    if renamed:
        _logger.info("%s: read the split %s.", source, printable(", ".join(renamed)))
    left_out = [name for name in splits if name not in chosen.values()]
    if left_out:
        what = "split" if len(left_out) == 1 else "splits"
        names = shortened(left_out)[1:-1]  # without the brackets
        _logger.warning("%s: skipped the %s %s.", source, what, printable(names))
    unread = reader.unread if isinstance(reader, FolderReader) else ()
    if unread:
        _logger.warning(
            "%s: skipped the folders %s, which contain no annotations.",
            source,
            printable(", ".join(folder.name for folder in unread)),
        )
    return chosen


def _read(reader: Reader, path: Path, options: ReadOptions) -> AnnotationTable:
    table = reader.read(path, options)
    return turn_upright(table, options.exif, options.report)


def _check_options(reader: Reader, path: Path, options: ReadOptions) -> tuple[str, ...] | None:
    """Return the splits of the path, after checking that the format takes the options."""
    for name, said in _SAID_BY_FILES.items():
        value = getattr(options, name)
        if value is not None and name not in reader.OPTIONS:
            shown = os.fspath(value) if isinstance(value, os.PathLike) else value
            raise ValueError(
                f"{name}={shortened(shown)} cannot be given for {reader.NAME} annotations, which "
                f"{said}. Leave it out."
            )
    return reader.splits(path)
