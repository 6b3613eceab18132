"""What the module of an annotation format provides to write it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.writers._folder import OutputFolder

__all__ = ["ImageFiles", "Output", "Writer"]

ImageFiles: TypeAlias = Literal["keep", "link", "copy"]
"""What happens to the image files: they stay where they are, or are linked or copied."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a writer writes, and what it reports.

    Attributes:
        folder: The files that are written, with paths relative to the folder.
        file_name: Name of the only file of annotations, or None for a dataset that is a folder.
        image_files: "keep", "link" or "copy".
        image_folder: The folder to which paths of images in COCO and CSV files are relative, or None.
        losses: Counts what the format cannot hold, by a description: "crowds left out".

    .. versionadded:: 0.3.0
    """

    folder: OutputFolder
    file_name: str | None
    image_files: ImageFiles
    image_folder: Path | None
    losses: Counter[str] = field(default_factory=Counter)


class Writer(Protocol):
    """An annotation format that can be written. A module with these names is one.

    :func:`~focaldet.datasets.write_annotations` leaves out boxes that are not finite, have a negative
    size or an undeclared category, checks that all splits have the same classes, and counts them
    before it calls :meth:`write`.

    Attributes:
        NAME: Name of the format, for messages.
        FILE_SUFFIX: Suffix of a path that means a single file: ".json". None if the format is always a
            folder.
        IMAGE_FILES: What happens to image files by default. It is "link" if readers of the format look
            for them in the folder of the dataset.
        HOLDS_IDS: Whether the ids of images and categories are in the files.

    .. versionadded:: 0.3.0
    """

    NAME: str
    FILE_SUFFIX: str | None
    IMAGE_FILES: ImageFiles
    HOLDS_IDS: bool

    def write(self, tables: Mapping[str, AnnotationTable], output: Output, /) -> None:
        """Write a table for each split. A single table without a name has the name "all".

        Raises:
            AnnotationError: If the format cannot hold the annotations.
            FileNotFoundError: If an image is needed and does not exist.
            ValueError: If an option does not fit the format.
        """
