"""The annotation formats that focaldet can read, one module per format.

A reader (:class:`Reader`) is a module with a ``NAME``, a ``LAYOUT``, the ``OPTIONS`` that it takes,
and the functions ``recognises``, ``splits`` and ``read``. To add a format, write its module and list
it in :data:`READERS`. :func:`read_annotations`, the dataset checker and the examples then read it.

.. versionadded:: 0.3.0
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from focaldet._checks import shortened
from focaldet.datasets.readers import _coco, _csv, _labelme, _voc, _yolo
from focaldet.datasets.readers._reader import Reader, ReadOptions
from focaldet.datasets.readers._splits import missing_split
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.readers._problems import Report

__all__ = ["READERS", "ReadOptions", "Reader", "find_reader", "read_annotations"]

READERS: tuple[Reader, ...] = (_voc, _yolo, _coco, _csv, _labelme)
"""The supported formats, in the order in which they are tried.

:meta hide-value:
"""

_SAID_BY_FILES = {"images": "say where the images are", "class_names": "name the classes"}


def find_reader(path: str | os.PathLike[str]) -> Reader:
    """Return the reader of the format that a file or folder is in.

    Raises:
        FileNotFoundError: If there is no such file or folder.
        AnnotationError: If no reader recognises it. The message says what each looks for.

    .. versionadded:: 0.3.0
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"No such file or folder: {str(path)!r} (path).")
    for reader in READERS:
        if reader.recognises(path):
            return reader
    looked_for = ", ".join(f"{reader.NAME} ({reader.LAYOUT})" for reader in READERS)
    raise AnnotationError(
        f"{str(path)!r} is not in a supported annotation format. Looked for: {looked_for}."
    )


def read_annotations(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    cache: bool = True,
    report: Report | None = None,
) -> AnnotationTable:
    """Read annotations in any supported format, which is recognised by the path.

    Args:
        path: A COCO file (``.json``) or folder (with ``annotations/instances_<split>.json``), a Pascal
            VOC folder (with ``ImageSets/Main/<split>.txt``), a YOLO ``data.yaml`` or its folder, a
            ``.csv`` file, or a folder of LabelMe's ``.json`` files.
        images: Folder of the images, for COCO and CSV. Files of the other formats say where it is.
        split: Name of a split, such as "train". Required for folders and YOLO, and an error for
            single files.
        class_names: Names of labels 0, 1, ..., for Pascal VOC, CSV and LabelMe. Files of the other formats
            contain them.
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
    reader = find_reader(path)
    options = ReadOptions(
        images=images, split=split, class_names=class_names, cache=cache, report=report
    )
    _check_options(reader, path, options)
    return reader.read(path, options)


def _check_options(reader: Reader, path: Path, options: ReadOptions) -> None:
    for name, said in _SAID_BY_FILES.items():
        value = getattr(options, name)
        if value is not None and name not in reader.OPTIONS:
            shown = os.fspath(value) if isinstance(value, os.PathLike) else value
            raise ValueError(
                f"{name}={shortened(shown)} cannot be given for {reader.NAME} annotations, which "
                f"{said}. Leave it out."
            )
    splits = reader.splits(path)
    if splits is None and options.split is not None:
        raise ValueError(
            f"split={options.split!r} cannot be given for {str(path)!r}, which is a single split. "
            "Leave it out."
        )
    if splits is not None and options.split is None:
        raise ValueError(missing_split(path, splits))
