"""The lines of YOLO label files: boxes, outlines, oriented boxes, and boxes with keypoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from focaldet._checks import shortened
from focaldet.datasets.readers._text import read_text
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet.datasets.readers._problems import Report

__all__ = ["KeypointShape", "LabelFolders", "LineReader", "YoloObject"]

_LABEL_FOLDER = {"images": "labels", "image": "label"}
_TOLERANCE = 1e-3  # fractions of the image size; label files are rounded
_RIGHT_ANGLE = 0.02  # cosine; a rectangle that was rounded is not exactly rectangular


class KeypointShape(NamedTuple):
    """What ``kpt_shape`` in a data file says: the number of keypoints and of values per keypoint."""

    number: int
    values: int


class YoloObject(NamedTuple):
    """An object: its label, and its box (xyxy) in fractions of the image size."""

    label: int
    box: tuple[float, float, float, float]


@dataclass
class LineReader:
    """Reads label files and counts the lines whose meaning is not stated.

    Five values are a box. More values are an outline, unless the data file has ``kpt_shape`` or the
    values can only be a box with keypoints. Some numbers can be either; if all long lines of a dataset
    can, the data file must say which they are.

    Args:
        num_classes: Number of classes. Larger labels become -1.
        keypoints: What the data file says of keypoints; None if it says nothing.
        report: Called with each error, after which the line is left out.

    Attributes:
        num_poses: Number of lines that were found to have keypoints, though the data file says
            nothing of them.
        num_oriented: Number of lines with an oriented box.
        num_outlines: Number of lines with any other outline.
    """

    num_classes: int
    keypoints: KeypointShape | None
    report: Report
    num_poses: int = 0
    num_oriented: int = 0
    num_outlines: int = 0
    _lengths: set[int] = field(default_factory=set)
    _all_can_be_poses: bool = True
    _first_outline: str = ""

    def read(self, path: Path, size: tuple[int, int]) -> list[YoloObject]:
        """Read a file.

        Args:
            path: The label file.
            size: ``(height, width)`` of its image in pixels, to measure angles.
        """
        try:
            lines = read_text(path).splitlines()
        except AnnotationError as error:
            self.report(error)
            return []
        objects = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                objects.append(self._object(line, f"{str(path)!r}, line {number}", size))
            except AnnotationError as error:
                self.report(error)
        return objects

    def ambiguity(self) -> str:
        """Return what is ambiguous about the lines that were read as outlines, or ""."""
        if len(self._lengths) != 1 or not self._all_can_be_poses:
            return ""
        [length] = self._lengths
        shapes = [
            f"[{(length - 4) // values}, {values}]"
            for values in (2, 3)
            if (length - 4) % values == 0
        ]
        return (
            f"{self._first_outline}: {length} values after the class can be an outline or a box with "
            f"keypoints, and so can those of every other outline (lines affected: "
            f"{self.num_outlines}). In the data file, set kpt_shape to {' or '.join(shapes)} for "
            "keypoints, or to [0, 0] for outlines."
        )

    def _object(self, line: str, where: str, size: tuple[int, int]) -> YoloObject:
        try:
            first, *values = (float(text) for text in line.split())
            label = int(first)  # raises for NaN and infinity
        except (ValueError, OverflowError):
            first, label, values = 0.5, 0, []
        length = len(values)
        if label != first or length < 4:
            raise AnnotationError(
                f"{where}: expected 'class cx cy w h', or a class and the points of an outline, got "
                f"{shortened(line.strip(), 80)}."
            )
        label = label if 0 <= label < self.num_classes else -1
        if length == 4:
            return YoloObject(label, _corners(values))
        if self.keypoints is not None and self.keypoints.number:
            expected = 4 + self.keypoints.number * self.keypoints.values
            if length != expected:
                raise AnnotationError(
                    f"{where}: kpt_shape {list(self.keypoints)} in the data file requires {expected} "
                    f"values after the class (or the 4 of a box), got {length}."
                )
            return YoloObject(label, _corners(values))
        if self.keypoints is None and _must_be_pose(values):
            self.num_poses += 1
            return YoloObject(label, _corners(values))
        if length < 6 or length % 2:
            raise AnnotationError(
                f"{where}: expected 'class cx cy w h', or a class and the points of an outline, got "
                f"{shortened(line.strip(), 80)}."
            )
        self._count_outline(values, where, size)
        xs, ys = values[::2], values[1::2]
        return YoloObject(label, (min(xs), min(ys), max(xs), max(ys)))

    def _count_outline(self, values: list[float], where: str, size: tuple[int, int]) -> None:
        if len(values) == 8 and (angle := _rectangle(values, size)):
            self.num_oriented += angle == "rotated"
            self._all_can_be_poses = False
            return
        self.num_outlines += 1
        self._first_outline = self._first_outline or where
        if self.keypoints is None and self._all_can_be_poses:
            self._lengths.add(len(values))
            self._all_can_be_poses = len(self._lengths) == 1 and _can_be_pose(values)


def _corners(values: list[float]) -> tuple[float, float, float, float]:
    cx, cy, width, height = values[:4]
    return (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)


def _must_be_pose(values: list[float]) -> bool:
    """Return whether values are a box and keypoints with visibility, and cannot be an outline.

    The visibility of a keypoint is 0, 1 or 2. An outline has an even number of values, all at most 1.
    """
    visibility = values[6::3]
    return (
        len(values) % 3 == 1
        and set(visibility) <= {0, 1, 2}
        and (len(values) % 2 == 1 or 2 in visibility)
        and _points_in_box(values, 3)
    )


def _can_be_pose(values: list[float]) -> bool:
    if _points_in_box(values, 2):
        return True
    return len(values) % 3 == 1 and set(values[6::3]) <= {0, 1} and _points_in_box(values, 3)


def _points_in_box(values: list[float], step: int) -> bool:
    """Return whether the first four values are a box in the image with all keypoints inside it."""
    x1, y1, x2, y2 = _corners(values)
    low, high = -_TOLERANCE, 1 + _TOLERANCE
    if not (low <= x1 < x2 <= high and low <= y1 < y2 <= high):
        return False
    return all(
        (x == y == 0)  # a keypoint that is not annotated
        or (x1 - _TOLERANCE <= x <= x2 + _TOLERANCE and y1 - _TOLERANCE <= y <= y2 + _TOLERANCE)
        for x, y in zip(values[4::step], values[5::step], strict=True)
    )


def _rectangle(values: list[float], size: tuple[int, int]) -> str:
    """Return whether four points are a "rotated" or an "upright" rectangle, or "" for neither."""
    height, width = size
    points = [(x * width, y * height) for x, y in zip(values[::2], values[1::2], strict=True)]
    points = [*points, *points[:2]]
    sides = [(x2 - x1, y2 - y1) for (x1, y1), (x2, y2) in pairwise(points)]
    for (dx1, dy1), (dx2, dy2) in pairwise(sides):
        lengths = ((dx1**2 + dy1**2) * (dx2**2 + dy2**2)) ** 0.5
        if not abs(dx1 * dx2 + dy1 * dy2) < _RIGHT_ANGLE * lengths:
            return ""
    dx, dy = (abs(side) for side in sides[0])
    return "upright" if min(dx, dy) < _RIGHT_ANGLE * max(dx, dy) else "rotated"


class LabelFolders:
    """Finds label files, and lists each folder only once.

    The label file of ``images/a.png`` is ``labels/a.txt``. Both folders may be spelled in upper case
    or in the singular, and so may the suffix be in upper case. If the path contains several folders
    ``images``, the last one is tried first. At the end, ``a.txt`` is looked for next to the image.
    """

    def __init__(self) -> None:
        self._files: dict[Path, dict[str, str]] = {}
        self._folders: dict[Path, dict[str, list[str]]] = {}

    def find(self, image: Path) -> Path | None:
        """Return the label file of an image, or None."""
        for folder in self._candidates(image):
            name = self._label_files(folder).get(image.stem)
            if name is not None:
                return folder / name
        return None

    def looked_for(self, image: Path) -> list[Path]:
        """Return where :meth:`find` looks."""
        return [folder / f"{image.stem}.txt" for folder in self._candidates(image)]

    def _candidates(self, image: Path) -> list[Path]:
        parts = image.parent.parts
        found: list[Path] = []
        for place in range(len(parts) - 1, -1, -1):
            name = _LABEL_FOLDER.get(parts[place].lower())
            if name is None:
                continue
            above, below = image.parents[len(parts) - 1 - place].parent, parts[place + 1 :]
            spelled = self._subfolders(above)
            names = [*spelled.get("labels", ()), *spelled.get("label", ())] or [name]
            found += [above.joinpath(one, *below) for one in names]
        return [*found, image.parent]

    def _subfolders(self, folder: Path) -> dict[str, list[str]]:
        """Return the names of the label folders in a folder, by their names in lower case."""
        if folder not in self._folders:
            spelled: dict[str, list[str]] = {}
            for path in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ():
                if path.name.lower() in _LABEL_FOLDER.values():
                    spelled.setdefault(path.name.lower(), []).append(path.name)
            self._folders[folder] = spelled
        return self._folders[folder]

    def _label_files(self, folder: Path) -> dict[str, str]:
        """Return the names of the text files in a folder by their names without suffix."""
        if folder not in self._files:
            paths = sorted(folder.iterdir()) if folder.is_dir() else []
            self._files[folder] = {
                path.stem: path.name for path in paths if path.suffix.lower() == ".txt"
            }
        return self._files[folder]
