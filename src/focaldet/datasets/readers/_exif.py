"""Boxes that were drawn on the stored pixels of photos, which their EXIF orientation turns.

A camera stores the pixels as its sensor lies, and an EXIF orientation that says how to turn them
upright. focaldet reads every image upright. Most annotation tools show photos upright, too, but some
ignore the orientation, so that their boxes fit the stored pixels only.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import numpy as np

from focaldet._checks import printable
from focaldet.errors import AnnotationError, UnreadableImageError
from focaldet.images import read_image_size, read_orientation

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import numpy.typing as npt

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.readers._problems import Report

__all__ = ["EXIF_CHOICES", "Exif", "read_annotated_size", "turn_boxes", "turn_upright"]

Exif: TypeAlias = Literal["upright", "stored", "auto"]
"""Which pixels boxes were drawn on."""

EXIF_CHOICES: tuple[Exif, ...] = ("upright", "stored", "auto")

_FIRST_ON_ITS_SIDE = 5  # orientations from here on swap width and height

_logger = logging.getLogger(__name__)


class _Photo(NamedTuple):
    """A photo with an EXIF orientation other than 1."""

    place: int
    orientation: int
    upright: tuple[int, int]
    drawn_on: str  # "upright", "stored", "" if its size cannot tell, or "neither"

    @property
    def stored(self) -> tuple[int, int]:
        height, width = self.upright
        return (width, height) if self.orientation >= _FIRST_ON_ITS_SIDE else (height, width)


def read_annotated_size(path: Path, exif: Exif) -> tuple[int, int]:
    """Read the ``(height, width)`` of the pixels that boxes in fractions of the size refer to.

    Raises:
        AnnotationError: If ``exif`` is "auto" and the photo has an EXIF orientation.
    """
    size = height, width = read_image_size(path)
    orientation = 1 if exif == "upright" else read_orientation(path)
    if exif == "auto" and orientation != 1:
        raise AnnotationError(
            f"exif='auto' cannot tell whether the boxes of {str(path)!r} were drawn on the upright photo "
            "or on the stored pixels, because the annotations contain no image size. Use "
            "exif='upright' or exif='stored'."
        )
    return (width, height) if orientation >= _FIRST_ON_ITS_SIDE else size


def turn_upright(
    table: AnnotationTable, exif: Exif, report: Report | None = None
) -> AnnotationTable:
    """Return the table with the boxes and sizes of turned photos as the upright images need them.

    Args:
        table: The table, with sizes of the pixels that the boxes were drawn on, 0 where unknown.
        exif: "stored" turns the boxes of every photo that has an orientation, "auto" of those whose
            annotated size is the stored one, and "upright" of none.
        report: Called with an error about each image that cannot be read. None raises the first.

    Raises:
        AnnotationError: If ``exif`` is "auto" and the sizes do not tell which pixels a photo was
            annotated on, or "stored" and an annotated size is only that of the upright image.
        FileNotFoundError, UnreadableImageError: If an image cannot be read.
    """
    if exif == "upright":
        return table
    photos = list(_photos(table, report))
    to_turn = _to_turn(table, photos) if exif == "auto" else _stored(table, photos)
    if not to_turn:
        return table
    boxes, sizes = table.boxes.copy(), table.image_sizes.copy()
    for photo in to_turn:
        rows = table.boxes_of(photo.place)
        boxes[rows] = turn_boxes(boxes[rows], photo.orientation, photo.stored)
        sizes[photo.place] = photo.upright
    _logger.info(
        "%s: turned the boxes of %d photos upright, as their EXIF orientation says (exif=%r).",
        printable(str(table.source)),
        len(to_turn),
        exif,
    )
    return replace(table, boxes=boxes, image_sizes=sizes)


def turn_boxes(
    boxes: npt.NDArray[np.float64], orientation: int, size: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """Turn boxes on the stored pixels so that they fit the upright image.

    Args:
        boxes: ``[N, 4]``, xyxy.
        orientation: EXIF orientation from 1 to 8.
        size: ``(height, width)`` of the stored pixels.

    Convention:
        Coordinates are continuous: a photo stored 40 pixels wide and 20 high with orientation 6 is
        turned clockwise, and its box (1, 2, 11, 8) becomes (12, 1, 18, 11) in 20x40 pixels.

    >>> turn_boxes(np.array([[1.0, 2, 11, 8]]), 6, (20, 40)).tolist()
    [[12.0, 1.0, 18.0, 11.0]]
    """
    height, width = size
    x1, y1, x2, y2 = boxes.T
    if orientation in (2, 3, 7, 8):
        x1, x2 = width - x2, width - x1
    if orientation in (3, 4, 6, 7):
        y1, y2 = height - y2, height - y1
    if orientation >= _FIRST_ON_ITS_SIDE:
        x1, y1, x2, y2 = y1, x1, y2, x2
    return np.stack([x1, y1, x2, y2], axis=1)


def _photos(table: AnnotationTable, report: Report | None) -> Iterator[_Photo]:
    for index in range(len(table)):
        path = table.image_path(index)
        try:
            orientation = read_orientation(path)
            if orientation == 1:
                continue
            upright = read_image_size(path)
        except (FileNotFoundError, UnreadableImageError) as error:
            if report is None:
                if isinstance(error, FileNotFoundError):
                    raise FileNotFoundError(f"{error} {table.describe_folder()}") from error
                raise
            report(error)
            continue
        photo = _Photo(index, orientation, upright, "")
        height, width = table.image_sizes[index].tolist()
        if min(height, width) > 0:
            fits = ((height, width) == photo.upright, (height, width) == photo.stored)
            names = {(True, False): "upright", (False, True): "stored", (False, False): "neither"}
            photo = photo._replace(drawn_on=names.get(fits, ""))
        yield photo


def _stored(table: AnnotationTable, photos: list[_Photo]) -> list[_Photo]:
    for photo in photos:
        if photo.drawn_on == "upright":
            height, width = photo.upright
            raise AnnotationError(
                f"exif='stored' does not fit {str(table.source)!r}: "
                f"{printable(table.file_names[photo.place])} is annotated as {width}x{height}, which "
                "is its size after turning it upright. Use exif='upright', or exif='auto' if the "
                "photos differ."
            )
    return [photo for photo in photos if photo.drawn_on != "neither"]


def _to_turn(table: AnnotationTable, photos: list[_Photo]) -> list[_Photo]:
    counts = Counter(photo.drawn_on for photo in photos)
    unclear = [photo for photo in photos if not photo.drawn_on]
    decided = {name for name in ("upright", "stored") if counts[name]}
    if unclear and len(decided) != 1:
        raise AnnotationError(
            f"exif='auto' cannot tell whether the boxes of {str(table.source)!r} were drawn on the "
            f"upright photos or on the stored pixels: {len(unclear)} of the {len(photos)} photos with "
            "an EXIF orientation have no annotated size, or the same size either way (square, mirrored "
            f"or turned by 180 degrees), and the others {'disagree' if decided else 'do not help'}. "
            f"The first is {printable(table.file_names[unclear[0].place])}. Use exif='upright' or "
            "exif='stored'."
        )
    source = printable(str(table.source))
    if unclear:
        [other] = decided
        _logger.warning(
            "%s: %d photos have the same size before and after their EXIF orientation; took their "
            "boxes as drawn on the %s pixels, as those of the other %d photos with an orientation.",
            source,
            len(unclear),
            other,
            counts[other],
        )
        counts[other] += len(unclear)
        photos = [photo if photo.drawn_on else photo._replace(drawn_on=other) for photo in photos]
    if photos:
        _logger.info(
            "%s: photos with an EXIF orientation: %d annotated upright, %d as stored, %d with another "
            "size.",
            source,
            counts["upright"],
            counts["stored"],
            counts["neither"],
        )
    return [photo for photo in photos if photo.drawn_on == "stored"]
