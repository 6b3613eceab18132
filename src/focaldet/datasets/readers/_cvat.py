"""The XML files of CVAT ("CVAT for images 1.1")."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from focaldet._checks import existing_folder, printable, shortened
from focaldet.datasets._table import PackedStrings
from focaldet.datasets.readers._builder import TableBuilder
from focaldet.datasets.readers._places import locate_images
from focaldet.datasets.readers._problems import raise_or_warn, tell_of_missing_objects
from focaldet.datasets.readers._rotation import rotated_bounds
from focaldet.datasets.readers._splits import unknown_split
from focaldet.datasets.readers._voc_files import root_tag
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.readers._problems import Report
    from focaldet.datasets.readers._reader import ReadOptions

__all__ = ["LAYOUT", "NAME", "OPTIONS", "read", "recognises", "splits"]

NAME = "CVAT"
LAYOUT = "an .xml file of CVAT for images, or a folder with annotations.xml"
OPTIONS = frozenset({"images"})

_FILE = "annotations.xml"
_IF_MISSING = "If they should have objects, check that the task was annotated completely."
_NOT_SHAPES = frozenset({"tag"})  # a label of the whole image
_SIDE_LIMIT = 2**31


def recognises(path: Path) -> bool:
    """Return whether the path is an XML file of CVAT, or a folder with one."""
    file = path / _FILE if path.is_dir() else path
    if file.suffix.lower() != ".xml" or not file.is_file():
        return False
    return root_tag(file) == "annotations"


def splits(path: Path) -> tuple[str, ...] | None:
    """Return the subsets of a project, or None if the images are not in several subsets."""
    names = _subsets(_parsed(_file_of(path)))
    return names if len(names) > 1 else None


def read(path: Path, options: ReadOptions) -> AnnotationTable:
    """Read the images of a file, or of one subset.

    Boxes are used as they are. Turned boxes, polygons, masks and ellipses are replaced by their bounding
    boxes, which a warning counts, as it does shapes that have none (points, lines, cuboids) and are left
    out. Image ids are 1, 2, ... in the order of the file. Classes are the labels of the task, in its
    order.
    """
    file = _file_of(path)
    root = _parsed(file)
    say = options.report or raise_or_warn
    images = root.findall("image")
    subsets = _subsets(root)
    if options.split is not None:
        if options.split not in subsets:
            raise ValueError(unknown_split(options.split, path, subsets))
        images = [image for image in images if image.get("subset", "") == options.split]
    names = _class_names(root)
    shapes = _Shapes({name: label for label, name in enumerate(names)}, say)
    builder = TableBuilder()
    for image in images:
        name = image.get("name", "")
        where = f"{str(file)!r}, image {printable(repr(name))}"
        try:
            _text(image, "name", where)
            size = (_side(image, "height", where), _side(image, "width", where))
        except AnnotationError as error:
            say(error)
            continue
        index = builder.add_image(name, size)
        shapes.add(builder, index, image, where)
    if message := shapes.describe(file):
        say(UserWarning(message))
    table = _with_images(builder.build(file, file.parent, names), options)
    tell_of_missing_objects(table, options.report, remedy=_IF_MISSING)
    return table


def _file_of(path: Path) -> Path:
    return path / _FILE if path.is_dir() else path


def _parsed(path: Path) -> ET.Element:
    try:
        root = ET.parse(path).getroot()  # noqa: S314  (expat bounds the growth of entities)
    except (ET.ParseError, ValueError, LookupError) as error:  # LookupError: unknown encoding
        raise AnnotationError(
            f"Cannot read {str(path)!r} as XML ({printable(str(error))})."
        ) from error
    if root.find("track") is not None:
        raise AnnotationError(
            f"{str(path)!r} contains tracks of a video. Export the task from CVAT as 'CVAT for images "
            "1.1' or as COCO, with its frames."
        )
    return root


def _subsets(root: ET.Element) -> tuple[str, ...]:
    return tuple(dict.fromkeys(image.get("subset", "") for image in root.findall("image")))


def _class_names(root: ET.Element) -> list[str]:
    """Return the labels that the file declares, or else those of its shapes in alphabetical order."""
    meta = root.find("meta")
    # Skeletons declare their points as labels with a parent.
    labels = (
        [] if meta is None else [one for one in meta.iter("label") if one.find("parent") is None]
    )
    names = dict.fromkeys((label.findtext("name") or "").strip() for label in labels)
    names.pop("", None)
    if names:
        return list(names)
    shapes = (shape for image in root.findall("image") for shape in image)
    return sorted(
        {shape.get("label", "") for shape in shapes if shape.tag not in _NOT_SHAPES} - {""}
    )


class _Shapes:
    """Adds the shapes of images to a table, and counts those that are not boxes."""

    def __init__(self, labels: dict[str, int], report: Report) -> None:
        self._labels = labels
        self._report = report
        self._replaced = Counter[str]()
        self._left_out = Counter[str]()

    def add(self, table: TableBuilder, index: int, image: ET.Element, where: str) -> None:
        """Add all shapes of an image."""
        for number, shape in enumerate(image, start=1):
            if shape.tag in _NOT_SHAPES:
                continue
            if shape.tag not in _BOUNDS:
                self._left_out[shape.tag] += 1
                continue
            name = f"{where}, shape {number} ({shape.tag})"
            try:
                label = _text(shape, "label", name)
                box = _BOUNDS[shape.tag](shape, name)
                angle = _number(shape, "rotation", name, 0)
            except AnnotationError as error:
                self._report(error)
                continue
            if angle:
                x1, y1, x2, y2 = box
                box = rotated_bounds(box, angle, ((x1 + x2) / 2, (y1 + y2) / 2))
            if angle or shape.tag != "box":
                self._replaced[f"rotated {shape.tag}" if angle else shape.tag] += 1
            table.add_box(index, self._labels.get(label, -1), box)

    def describe(self, path: Path) -> str:
        """Return a warning about the shapes that were replaced or left out, or ""."""
        parts = []
        if self._replaced:
            parts.append(f"shapes replaced by their bounding boxes: {_counted(self._replaced)}")
        if self._left_out:
            parts.append(f"shapes that have no box and are left out: {_counted(self._left_out)}")
        return f"{printable(str(path))}: {'; '.join(parts)}." if parts else ""


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {printable(name)}" for name, count in sorted(counts.items()))


def _box_bounds(shape: ET.Element, where: str) -> list[float]:
    return [_number(shape, key, where) for key in ("xtl", "ytl", "xbr", "ybr")]


def _polygon_bounds(shape: ET.Element, where: str) -> list[float]:
    points = shape.get("points", "")
    try:
        xs, ys = zip(*(map(float, pair.split(",")) for pair in points.split(";")), strict=True)
    except ValueError as error:
        raise AnnotationError(
            f"{where}: points must be 'x,y;x,y;...', got {shortened(points)}."
        ) from error
    return [min(xs), min(ys), max(xs), max(ys)]


def _mask_bounds(shape: ET.Element, where: str) -> list[float]:
    left, top, width, height = (
        _number(shape, key, where) for key in ("left", "top", "width", "height")
    )
    return [left, top, left + width, top + height]


def _ellipse_bounds(shape: ET.Element, where: str) -> list[float]:
    cx, cy, rx, ry = (_number(shape, key, where) for key in ("cx", "cy", "rx", "ry"))
    return [cx - rx, cy - ry, cx + rx, cy + ry]


_BOUNDS = {
    "box": _box_bounds,
    "polygon": _polygon_bounds,
    "mask": _mask_bounds,
    "ellipse": _ellipse_bounds,
}


def _text(item: ET.Element, key: str, where: str) -> str:
    text = item.get(key)
    if not text:
        raise AnnotationError(f"{where}: the attribute {key} is missing or empty.")
    return text


def _side(image: ET.Element, key: str, where: str) -> int:
    side = _number(image, key, where, 0)
    if not 0 <= side < _SIDE_LIMIT:
        raise AnnotationError(f"{where}: {key} must be a number of pixels, got {side}.")
    return int(side)


def _number(item: ET.Element, key: str, where: str, default: float | None = None) -> float:
    text = item.get(key)
    if text is None:
        if default is not None:
            return default
        raise AnnotationError(f"{where}: the attribute {key} is missing.")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise AnnotationError(f"{where}: {key} must be a number, got {shortened(text)}.")
    return number


def _with_images(table: AnnotationTable, options: ReadOptions) -> AnnotationTable:
    """Return the table with the folder of its images, which CVAT exports as ``images``."""
    above = table.source.parent
    if options.images is not None:
        above = existing_folder("images", options.images)
    folders = [above / "images", above / "images" / (options.split or ""), above]
    located = locate_images(
        table.file_names,
        [one for one in dict.fromkeys(folders) if one.is_dir()],
        above,
        table.source,
    )
    return replace(
        table,
        image_folder=located.folder,
        file_names=PackedStrings.pack(located.names),
        tried_folders=located.tried,
    )
