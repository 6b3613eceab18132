"""What the module of an annotation format provides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.readers._exif import Exif
    from focaldet.datasets.readers._problems import Report

__all__ = ["ReadOptions", "Reader"]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """The optional arguments of :func:`~focaldet.datasets.read_annotations`.

    Attributes:
        images: Folder of the images, or None.
        split: Name of a split. None for a path that is a single split.
        class_names: Names of labels 0, 1, ..., or None.
        cache: Whether a cache file may be used and written.
        report: Called with each error or warning about a file, line or object. By default, errors are
            raised and warnings are given.
        exif: Which pixels the boxes were drawn on. A reader of coordinates in fractions of the image
            size multiplies them with the size of these pixels. The boxes of all formats are turned
            upright after reading.

    .. versionadded:: 0.3.0
    """

    images: str | os.PathLike[str] | None = None
    split: str | None = None
    class_names: Sequence[str] | None = None
    cache: bool = True
    report: Report | None = None
    exif: Exif = "upright"


class Reader(Protocol):
    """An annotation format. A module with these names is one.

    :func:`~focaldet.datasets.read_annotations` checks ``images``, ``class_names`` and whether a
    split is needed before it calls :meth:`read`. An unknown split is for the reader to report.

    Attributes:
        NAME: Name of the format, for messages.
        LAYOUT: What a path of this format looks like, as a noun phrase: "a .csv file".
        OPTIONS: Which of "images" and "class_names" the format takes. The files of other formats
            say these themselves.

    .. versionadded:: 0.3.0
    """

    NAME: str
    LAYOUT: str
    OPTIONS: frozenset[str]

    def recognises(self, path: Path, /) -> bool:
        """Return whether an existing file or folder looks like this format."""

    def splits(self, path: Path, /) -> tuple[str, ...] | None:
        """Return the names of the splits, or None if the path is a single split."""

    def read(self, path: Path, options: ReadOptions, /) -> AnnotationTable:
        """Read the annotations.

        Raises:
            AnnotationError: If a file is damaged or not in this format.
            FileNotFoundError: If a file or folder is missing.

        With ``options.report``, both only if nothing can be read at all. Otherwise, the function is
        called with the error, and the image, line or object is left out.
        """
