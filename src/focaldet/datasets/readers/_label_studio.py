"""The JSON and JSON-MIN exports of Label Studio."""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from focaldet._checks import check_names, existing_folder, printable, shortened
from focaldet.datasets._table import PackedStrings
from focaldet.datasets.readers._builder import TableBuilder
from focaldet.datasets.readers._exif import read_annotated_size
from focaldet.datasets.readers._places import is_file, locate_images
from focaldet.datasets.readers._problems import raise_or_warn, tell_of_missing_objects
from focaldet.datasets.readers._rotation import rotated_bounds
from focaldet.datasets.readers._text import read_text
from focaldet.errors import AnnotationError, UnreadableImageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.readers._exif import Exif
    from focaldet.datasets.readers._problems import Report
    from focaldet.datasets.readers._reader import ReadOptions

__all__ = ["LAYOUT", "NAME", "OPTIONS", "read", "recognises", "splits"]

NAME = "Label Studio"
LAYOUT = "a .json file of the export JSON or JSON-MIN"
OPTIONS = frozenset({"images", "class_names"})

_HEAD = 2**16  # bytes in which the keys of the first task are looked for
_KEYS = re.compile(rb'"(annotations|completions|original_width)"\s*:')
_UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")  # what Label Studio puts before the names of uploads
_LABELS = ("rectanglelabels", "polygonlabels", "ellipselabels", "labels")
_NOT_SHAPES = frozenset({"choices", "textarea", "rating", "rectangle", "polygon", "ellipse"})
_IF_MISSING = "If they should have objects, check that these tasks were annotated completely."
_SIDE_LIMIT = 2**31

_logger = logging.getLogger(__name__)


def recognises(path: Path) -> bool:
    """Return whether the path is a JSON file with a list of tasks."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
    return head.startswith(b"[") and _KEYS.search(head) is not None


def splits(_: Path) -> None:
    """Return None: a file is a single split."""


class _Task(NamedTuple):
    """The image and the regions of a task."""

    name: str
    regions: list[Any]
    where: str


def read(path: Path, options: ReadOptions) -> AnnotationTable:
    """Read the tasks of a file.

    Coordinates are percentages of the size of the image, which the file gives; if it does not, it is
    read from the image. Tasks without an annotation and skipped ones are left out. Of several
    annotations of a task, the first is used. Polygons, ellipses and rotated rectangles are replaced by
    their bounding boxes. All this is counted in one warning, or in the log if nothing is wrong with it.
    Classes are the labels of the regions in alphabetical order, unless given.
    """
    say = options.report or raise_or_warn
    counts = Counter[str]()
    tasks = list(_tasks(path, _content(path), counts, say))
    folder = path.parent if options.images is None else existing_folder("images", options.images)
    folders = [folder, folder / "images"]
    located = locate_images([task.name for task in tasks], folders, folder, path)
    names = [_without_prefix(name, located.folder) for name in located.names]
    changed = [pair for pair in zip(located.names, names, strict=True) if pair[0] != pair[1]]
    if changed:
        _logger.warning(
            "%s: %d uploaded images were found under another name. The first is %s for %s.",
            printable(str(path)),
            len(changed),
            printable(changed[0][1]),
            printable(changed[0][0]),
        )
    regions = _Regions(counts, say, options.exif)
    objects = [
        regions.read(task, located.folder / name) for task, name in zip(tasks, names, strict=True)
    ]
    if options.class_names is None:
        class_names = sorted({label for one in objects for label, _ in one.boxes})
    else:
        class_names = list(check_names("class_names", options.class_names))
    labels = {name: label for label, name in enumerate(class_names)}
    builder = TableBuilder()
    for name, one in zip(names, objects, strict=True):
        index = builder.add_image(name, one.size)
        for label, box in one.boxes:
            builder.add_box(index, labels.get(label, -1), box)
    _tell(path, counts, say)
    table = builder.build(path, located.folder, class_names)
    table = replace(table, file_names=PackedStrings.pack(names), tried_folders=located.tried)
    tell_of_missing_objects(table, options.report, remedy=_IF_MISSING)
    return table


def _content(path: Path) -> list[Any]:
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, AnnotationError):
            raise
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise AnnotationError(
            f"Cannot read {str(path)!r} as JSON ({printable(reason)})."
        ) from error
    if not isinstance(content, list):
        raise AnnotationError(f"{str(path)!r} is not a list of Label Studio tasks.")
    return content


def _tasks(path: Path, content: list[Any], counts: Counter[str], say: Report) -> Iterator[_Task]:
    for number, item in enumerate(content):
        where = f"{str(path)!r}, task {number}"
        try:
            task = _checked(item, where)
            where += f" (id {shortened(task['id'])})" if "id" in task else ""
            regions = _regions_of(task, where, counts)
            if regions is not None:
                yield _Task(_image_name(task, where), regions, where)
        except AnnotationError as error:
            say(error)


def _checked(task: object, where: str) -> dict[str, Any]:
    if not isinstance(task, dict):
        raise AnnotationError(f"{where} must be an object, got {type(task).__name__}.")
    return task


def _regions_of(task: dict[str, Any], where: str, counts: Counter[str]) -> list[Any] | None:
    """Return the regions of a task; None for a task that was not annotated."""
    key = "annotations" if "annotations" in task else "completions"
    if key not in task:  # JSON-MIN has the regions of each control tag in the task itself
        return [
            {"type": name, "value": value, **value}
            for values in task.values()
            if isinstance(values, list)
            for value in values
            if isinstance(value, dict)
            for name in _LABELS
            if name in value
        ]
    annotations = task[key]
    if not isinstance(annotations, list) or not all(isinstance(one, dict) for one in annotations):
        raise AnnotationError(f"{where}: {key} must be a list of objects.")
    valid = [one for one in annotations if not one.get("was_cancelled")]
    if not valid:
        counts["skipped" if annotations else "unannotated"] += 1
        return None
    counts["several"] += len(valid) > 1
    regions = valid[0].get("result", [])
    if not isinstance(regions, list) or not all(isinstance(one, dict) for one in regions):
        raise AnnotationError(f"{where}: result must be a list of objects.")
    return regions


def _image_name(task: dict[str, Any], where: str) -> str:
    """Return the name of the image of a task, from its path or URL."""
    data = task.get("data", task)
    if isinstance(data, dict):
        keys = ["image", "img", "ocr", *data]
        for key in keys:
            value = data.get(key)
            if isinstance(value, str) and (key == "image" or _is_image_name(value)):
                return _name_in(value)
    raise AnnotationError(f"{where}: data has no path or URL of an image.")


def _is_image_name(text: str) -> bool:
    from focaldet.images import IMAGE_EXTENSIONS

    return _name_in(text).lower().endswith(IMAGE_EXTENSIONS)


def _name_in(url: str) -> str:
    """Return the path in a URL or a path of Label Studio's storage."""
    parts = urlsplit(url) if "://" in url or url.startswith("/data/") else None
    if parts is None:
        return url
    if served := parse_qs(parts.query).get("d"):  # /data/local-files/?d=folder/a.jpg
        return served[0].lstrip("/")
    return unquote(parts.path).removeprefix("/data/upload/").lstrip("/")


def _without_prefix(name: str, folder: Path) -> str:
    """Return the name of an uploaded file before the upload, if only that file exists."""
    if is_file(folder / name):
        return name
    above, slash, last = name.replace("\\", "/").rpartition("/")
    for start in (above + slash, ""):
        for one in (last, _UPLOADED.sub("", last, count=1)):
            for place in ("", "images/"):
                if is_file(folder / place / start / one):
                    return f"{place}{start}{one}"
    return name


class _Objects(NamedTuple):
    """The size of an image, (0, 0) if unknown, and its objects."""

    size: tuple[int, int]
    boxes: list[tuple[str, list[float]]]


class _Regions:
    """Reads the regions of tasks, and counts what is replaced or left out."""

    def __init__(self, counts: Counter[str], report: Report, exif: Exif) -> None:
        self._counts = counts
        self._report = report
        self._exif: Exif = exif

    def read(self, task: _Task, image: Path) -> _Objects:
        """Read all regions of a task."""
        size = (0, 0)
        boxes = []
        for number, region in enumerate(task.regions):
            where = f"{task.where}, region {number}"
            try:
                if (label := self._label(region, where)) is None:
                    continue
                if min(size) <= 0:
                    size = self._size(region, image, where)
                boxes.append((label, self._box(region, size, where)))
            except (AnnotationError, UnreadableImageError, FileNotFoundError) as error:
                self._report(error)
        return _Objects(size, boxes)

    def _label(self, region: dict[str, Any], where: str) -> str | None:
        """Return the label of a region; None if it is not a shape with a bounding box."""
        value = region.get("value")
        kind = region.get("type")
        labels = None
        if isinstance(value, dict):
            labels = next((value[key] for key in _LABELS if key in value), None)
        if labels is None or not isinstance(value, dict):
            if kind not in _NOT_SHAPES:  # brushes, keypoints and relations have no box
                self._counts[f"left out: {printable(shortened(kind))}"] += 1
            return None
        if "x" not in value and "points" not in value:
            self._counts[f"left out: {printable(shortened(kind))}"] += 1
            return None
        if not isinstance(labels, list) or not labels or not isinstance(labels[0], str):
            raise AnnotationError(
                f"{where}: the label must be a list of texts, got {shortened(labels)}."
            )
        if region.get("image_rotation"):
            raise AnnotationError(
                f"{where}: the image was rotated in Label Studio (image_rotation "
                f"{shortened(region['image_rotation'])}), so its boxes do not fit the file. Rotate the "
                "file, or annotate it unrotated."
            )
        self._counts["labels"] += len(labels) > 1
        return labels[0]

    def _size(self, region: dict[str, Any], image: Path, where: str) -> tuple[int, int]:
        sides = region.get("original_height"), region.get("original_width")
        if None in sides:
            return read_annotated_size(image, self._exif)
        height, width = (_number(side, "original size", where) for side in sides)
        if not (0 < height < _SIDE_LIMIT and 0 < width < _SIDE_LIMIT):
            raise AnnotationError(
                f"{where}: original_width and original_height must be numbers of pixels, got "
                f"{width:g} and {height:g}."
            )
        return int(height), int(width)

    def _box(self, region: dict[str, Any], size: tuple[int, int], where: str) -> list[float]:
        value = region["value"]
        height, width = size
        if "points" in value:
            self._counts["replaced: polygon"] += 1
            points = value["points"]
            try:
                xs, ys = zip(*points, strict=True)
                x1, y1, x2, y2 = min(xs), min(ys), max(xs), max(ys)
                corners = [_number(one, "points", where) for one in (x1, y1, x2, y2)]
            except (TypeError, ValueError) as error:
                if isinstance(error, AnnotationError):
                    raise
                raise AnnotationError(
                    f"{where}: points must be a list of [x, y], got {shortened(points)}."
                ) from error
            return _scaled(corners, width, height)
        angle = _number(value.get("rotation") or 0, "rotation", where)
        x, y = (_number(value.get(key), key, where) for key in ("x", "y"))
        if "radiusX" in value:
            rx, ry = (_number(value.get(key), key, where) for key in ("radiusX", "radiusY"))
            box = _scaled([x - rx, y - ry, x + rx, y + ry], width, height)
            pivot = (x * width / 100, y * height / 100)
            self._counts["replaced: ellipse"] += 1
        else:
            w, h = (_number(value.get(key), key, where) for key in ("width", "height"))
            box = _scaled([x, y, x + w, y + h], width, height)
            pivot = (box[0], box[1])  # Label Studio turns rectangles around their first corner
            self._counts["replaced: rotated rectangle"] += angle != 0
        return rotated_bounds(box, angle, pivot) if angle else box


def _scaled(percent: list[float], width: int, height: int) -> list[float]:
    x1, y1, x2, y2 = percent
    return [x1 * width / 100, y1 * height / 100, x2 * width / 100, y2 * height / 100]


def _number(value: object, key: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AnnotationError(f"{where}: {key} must be a number, got {shortened(value)}.")
    return float(value)


_SAID = {
    "several": "tasks with several annotations, of which the first is used",
    "labels": "regions with several labels, of which the first is used",
}


def _tell(path: Path, counts: Counter[str], say: Report) -> None:
    source = printable(str(path))
    doubtful = [f"{text}: {counts[key]}" for key, text in _SAID.items() if counts[key]]
    for kind, text in (
        ("replaced", "shapes replaced by their bounding boxes"),
        ("left out", "regions that have no box and are left out"),
    ):
        found = {key: count for key, count in counts.items() if key.startswith(kind) and count}
        if found:
            listed = ", ".join(
                f"{count} {key.partition(': ')[2]}" for key, count in sorted(found.items())
            )
            doubtful.append(f"{text}: {listed}")
    if doubtful:
        say(UserWarning(f"{source}: {'; '.join(doubtful)}."))
    if counts["unannotated"] or counts["skipped"]:
        _logger.warning(
            "%s: left out tasks without an annotation: %d, and skipped ones: %d.",
            source,
            counts["unannotated"],
            counts["skipped"],
        )
