"""LabelMe files: one JSON file per image, with rectangles and other shapes."""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from focaldet._checks import check_names, existing_folder, is_number, printable, shortened
from focaldet._files import list_files
from focaldet.datasets.readers._builder import TableBuilder
from focaldet.datasets.readers._problems import raise_or_warn, tell_of_missing_objects
from focaldet.datasets.readers._splits import unknown_split
from focaldet.datasets.readers._text import read_text
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.readers._problems import Report
    from focaldet.datasets.readers._reader import ReadOptions

__all__ = ["LAYOUT", "NAME", "OPTIONS", "read", "read_labelme", "recognises", "splits"]

NAME = "LabelMe"
LAYOUT = "a folder of LabelMe's .json files"
OPTIONS = frozenset({"class_names"})

_SPLITS = ("train", "valid", "validation", "val", "test", "all")
_CLASS_LIST = "labels.txt"
_NOT_CLASSES = frozenset({"__ignore__", "_background_"})  # special lines of LabelMe's list
_SHAPES = re.compile(rb'"shapes"\s*:')
_HEAD = 4096  # bytes; enough to tell LabelMe's files from COCO's
_RECTANGLE, _CIRCLE = "rectangle", "circle"
_MAX_SIDE = 2**31 - 1
_IF_MISSING = "If they should have objects, check their files."

_logger = logging.getLogger(__name__)


def recognises(path: Path) -> bool:
    """Return whether the path is a folder with a LabelMe file, in it or in the folder of a split."""
    if not path.is_dir():
        return False
    folders = [path, *(path / name for name in splits(path) or ())]
    return any(
        _is_labelme(file) for folder in folders for file in list_files(folder, (".json",))[:3]
    )


def splits(path: Path) -> tuple[str, ...] | None:
    """Return the names of subfolders for splits, or None if the files are in the folder itself."""
    if list_files(path, (".json",)):
        return None
    names = tuple(
        name
        for name in _SPLITS
        if (path / name).is_dir() and list_files(path / name, (".json",), recursive=True)
    )
    return names or None


def read(path: Path, options: ReadOptions) -> AnnotationTable:
    """Read a folder, or one split of it."""
    return read_labelme(path, options.split, class_names=options.class_names, report=options.report)


def read_labelme(
    root: str | os.PathLike[str],
    split: str | None = None,
    *,
    class_names: Sequence[str] | None = None,
    report: Report | None = None,
) -> AnnotationTable:
    r"""Read a folder of LabelMe files, and the folders inside it.

    Image ids are 1, 2, ... in the order of the paths of the files. Category ids are 0, 1, ... in the
    order of ``class_names``.

    Args:
        root: Folder of the ``.json`` files.
        split: Name of a folder in ``root``, such as "train", to read only the files in it. None reads
            all files.
        class_names: Names of labels 0, 1, ... None uses the lines of ``labels.txt`` in ``root``, where
            LabelMe's lines ``__ignore__`` and ``_background_`` do not count. If there is no such file,
            all names in the files below ``root`` are used in alphabetical order. These are the same for
            every split.
        report: A function that is called with each error or warning about a file or shape, which is
            then left out, so that all can be listed. None raises the first error. See
            :func:`check_dataset`.

    Convention:
        Points are continuous coordinates in pixels, which become the corners of xyxy boxes as they are.
        Polygons and other shapes become their bounding boxes, counted in the log; a circle is its
        centre and a point on it. A shape with the flag ``crowd`` or ``difficult`` becomes a crowd.
        ``imagePath`` is relative to its file; backslashes are read as ``/``. If there is no such image,
        as after a move to a different computer, one with the same name next to the file is used.
        Images inside the files (``imageData``) are not read.

    Raises:
        FileNotFoundError: If a folder does not exist, or contains no ``.json`` file.
        AnnotationError: If a file cannot be read. The message names the file and the shape.
        TypeError: If ``class_names`` is not a sequence of strings.

    Warns:
        UserWarning: If there is no object that training could learn from, or most images have no
            objects. Fewer images without objects are counted in the log.

    .. versionadded:: 0.3.0
    """
    root = existing_folder("root", root)
    if class_names is not None:
        class_names = check_names("class_names", class_names)
    folder = root if split is None else root / split
    if split is not None and not folder.is_dir():
        raise FileNotFoundError(unknown_split(split, root, splits(root) or ()))
    paths = list_files(folder, (".json",), recursive=True)
    if not paths:
        raise FileNotFoundError(f"There are no .json files in {str(folder)!r}.")
    say = report or raise_or_warn
    reader = _FileReader(say)
    images = [image for path in paths if (image := reader.read(path)) is not None]
    if class_names is None:
        class_names = _listed_classes(root)
    if class_names is None:
        others = () if folder == root else list_files(root, (".json",), recursive=True)
        known = set(paths)
        names = _FileReader(lambda _: None)  # errors in other splits are reported with these
        everything = [*images, *(names.read(path) for path in others if path not in known)]
        class_names = sorted({shape.name for one in everything if one for shape in one.shapes})
    labels = {name: label for label, name in enumerate(class_names)}
    builder = TableBuilder()
    for image in images:
        index = builder.add_image(_relative(image.path, folder), image.size)
        for shape in image.shapes:
            builder.add_box(index, labels.get(shape.name, -1), shape.box, crowd=shape.crowd)
    reader.tell(folder)
    table = builder.build(folder, folder, class_names)
    tell_of_missing_objects(table, report, remedy=_IF_MISSING)
    return table


class _Shape(NamedTuple):
    name: str
    box: tuple[float, float, float, float]
    crowd: bool


class _Image(NamedTuple):
    path: Path
    size: tuple[int, int]
    shapes: list[_Shape]


class _FileReader:
    """Reads files, and counts what is not as the file says.

    Args:
        report: Called with each error, after which the file or shape is left out.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._outlines: Counter[str] = Counter()
        self._moved = 0

    def read(self, path: Path) -> _Image | None:
        """Read a file; None if that is not possible."""
        try:
            content = _parsed(path)
            image = self._image_path(content, path)
        except AnnotationError as error:
            self._report(error)
            return None
        shapes = []
        for number, item in enumerate(content["shapes"], start=1):
            try:
                shapes.append(self._shape(item, f"{str(path)!r}, shape {number}"))
            except AnnotationError as error:
                self._report(error)
        return _Image(image, self._size(content, path), shapes)

    def tell(self, folder: Path) -> None:
        """Log what was counted."""
        source = printable(str(folder))
        if self._outlines:
            counts = ", ".join(f"{count} {kind}" for kind, count in self._outlines.items())
            _logger.warning(
                "%s: shapes that are replaced by their bounding boxes: %s.",
                source,
                printable(counts),
            )
        if self._moved:
            _logger.warning(
                "%s: images that are not at their imagePath but next to their .json file: %d.",
                source,
                self._moved,
            )

    def _image_path(self, content: dict[str, Any], path: Path) -> Path:
        name = content.get("imagePath")
        if not isinstance(name, str) or not name:
            raise AnnotationError(
                f"{str(path)!r}: imagePath must be the path of the image, got {shortened(name)}."
            )
        image = _normal(path.parent / name)
        if not _is_file(image) and "\\" in name:
            image = _normal(path.parent / name.replace("\\", "/"))
        neighbour = path.parent / name.replace("\\", "/").rpartition("/")[2]
        if not _is_file(image) and _is_file(neighbour):
            self._moved += 1
            return neighbour
        return image

    def _size(self, content: dict[str, Any], path: Path) -> tuple[int, int]:
        """Return ``(height, width)``, 0 where the file does not say."""
        height, width = content.get("imageHeight"), content.get("imageWidth")
        if height is None or width is None:
            return (0, 0)
        if _is_side(height) and _is_side(width):
            return (int(height), int(width))
        self._report(
            AnnotationError(
                f"{str(path)!r}: imageHeight and imageWidth must be numbers of pixels, got "
                f"{shortened([height, width])}."
            )
        )
        return (0, 0)

    def _shape(self, item: object, where: str) -> _Shape:
        if not isinstance(item, dict):
            raise AnnotationError(f"{where} is not an object, but {shortened(item)}.")
        name = item.get("label")
        if isinstance(name, bool) or not isinstance(name, (str, int)) or name == "":
            raise AnnotationError(f"{where}: label must be a name, got {shortened(name)}.")
        kind = item.get("shape_type") or "polygon"
        points = _points(item.get("points"), where)
        if kind != _RECTANGLE:
            self._outlines[str(kind)] += 1
        if kind == _CIRCLE and len(points) == 2:
            (x, y), edge = points
            radius = math.dist((x, y), edge)
            points = [(x - radius, y - radius), (x + radius, y + radius)]
        xs, ys = zip(*points, strict=True)
        flags = item.get("flags")
        crowd = bool(item.get("difficult"))
        if isinstance(flags, dict):
            crowd = crowd or bool(flags.get("crowd") or flags.get("difficult"))
        return _Shape(str(name), (min(xs), min(ys), max(xs), max(ys)), crowd)


def _is_side(side: Any) -> bool:
    return is_number(side) and bool(0 < side <= _MAX_SIDE) and side == int(side)


def _points(points: object, where: str) -> list[tuple[float, float]]:
    if (
        isinstance(points, list)
        and points
        and all(isinstance(point, list) and len(point) == 2 for point in points)
        and all(is_number(number) and math.isfinite(number) for point in points for number in point)
    ):
        return [(float(x), float(y)) for x, y in points]
    raise AnnotationError(
        f"{where}: points must be a list of points [x, y], got {shortened(points, 80)}."
    )


def _parsed(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, AnnotationError):
            raise
        raise AnnotationError(
            f"Cannot read {str(path)!r}: it is not valid JSON ({printable(str(error))})."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise AnnotationError(
            f"{str(path)!r} is not a LabelMe file: it has no list 'shapes'. Move other .json files to a "
            "different folder."
        )
    return content


def _listed_classes(root: Path) -> list[str] | None:
    path = root / _CLASS_LIST
    if not path.is_file():
        return None
    names = [line.strip() for line in read_text(path).splitlines()]
    return [name for name in names if name and name not in _NOT_CLASSES]


def _is_labelme(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_HEAD)
    return _SHAPES.search(head) is not None and b'"images"' not in head


def _normal(path: Path) -> Path:
    return Path(os.path.normpath(path))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def _relative(path: Path, folder: Path) -> str:
    base = _normal(folder)
    return str(path.relative_to(base) if path.is_relative_to(base) else path.absolute())
