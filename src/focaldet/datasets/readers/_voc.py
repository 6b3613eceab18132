"""Pascal VOC folders: one XML file per image, and lists of image names for the splits."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from focaldet._checks import existing_folder, shortened
from focaldet.datasets.readers._builder import TableBuilder
from focaldet.datasets.readers._splits import unknown_split
from focaldet.datasets.readers._text import read_text
from focaldet.errors import AnnotationError
from focaldet.images import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.readers._reader import ReadOptions

__all__ = ["LAYOUT", "NAME", "OPTIONS", "read", "read_voc", "recognises", "splits"]

NAME = "Pascal VOC"
LAYOUT = "a folder with ImageSets/Main/<split>.txt"
OPTIONS = frozenset({"class_names"})

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_SIZE_LIMIT = 2**31


def recognises(path: Path) -> bool:
    """Return whether the path is a folder with ``ImageSets``."""
    return (path / "ImageSets").is_dir()


def splits(path: Path) -> tuple[str, ...]:
    """Return the names of the lists in ``ImageSets/Main``."""
    names = sorted(file.stem for file in (path / "ImageSets" / "Main").glob("*.txt"))
    # Pascal VOC also has a list per class and split, such as cat_train.
    known = set(names)
    return tuple(name for name in names if "_" not in name or name.rpartition("_")[2] not in known)


def read(path: Path, options: ReadOptions) -> AnnotationTable:
    """Read one split of a folder."""
    return read_voc(path, options.split or "", class_names=options.class_names)


def read_voc(
    root: str | os.PathLike[str],
    split: str,
    *,
    class_names: Sequence[str] | None = None,
    one_based: bool = False,
) -> AnnotationTable:
    """Read one split of a dataset in Pascal VOC format.

    Image ids are 1, 2, ... in the order of the split. Category ids are 0, 1, ... in the order of
    ``class_names``.

    Args:
        root: Folder with ``ImageSets/Main``, ``Annotations`` and ``JPEGImages``.
        split: Name of a split, such as "train" for the images listed in
            ``ImageSets/Main/train.txt``.
        class_names: Names of labels 0, 1, ... None uses all names in ``Annotations``, in alphabetical
            order as VOC does. These are the same for every split, but finding them takes reading
            every file.
        one_based: Whether pixel coordinates start at 1 and a box includes the pixels at ``xmax`` and
            ``ymax``. If so, 1 is subtracted from ``xmin`` and ``ymin``.

    Convention:
        The files of Pascal VOC itself are one-based. Most tools that write this format store corners
        as continuous coordinates, so that is the default. The COCO file published with the BCCD
        dataset reads its VOC files in the same way. The box 10, 20, 30, 40 becomes (10, 20, 30, 40),
        or (9, 19, 30, 40) with ``one_based``. A difficult object becomes a crowd: it is not trained
        on and not counted in evaluation. (Unlike VOC's evaluation, COCO's ignores any number of
        detections inside it.)

    Raises:
        FileNotFoundError: If the list of the split, the XML file of an image in it, or a folder does
            not exist.
        AnnotationError: If an XML file cannot be read. The message names the file and the object.
        TypeError: If ``class_names`` is a single string.
    """
    if isinstance(class_names, str):
        raise TypeError(
            f"class_names must be a list of names, got the string {class_names!r}. "
            f"For a single class, pass [{class_names!r}]."
        )
    root = existing_folder("root", root)
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        raise FileNotFoundError(unknown_split(split, root, splits(root)))
    if class_names is None:
        class_names = _names_in(root / "Annotations")
    labels = {name: label for label, name in enumerate(class_names)}
    images = _image_files(existing_folder("root", root / "JPEGImages"))
    table = TableBuilder()
    for line in read_text(listing).splitlines():
        name = line.strip()
        if name:
            path = root / "Annotations" / f"{name}.xml"
            _add(table, _parsed(path), path, images.get(name), labels, one_based=one_based)
    return table.build(listing, root / "JPEGImages", class_names)


def _image_files(folder: Path) -> dict[str, str]:
    """Return the image files of a folder by their names without suffix."""
    return {
        path.stem: path.name
        for path in sorted(folder.iterdir(), reverse=True)
        if path.suffix.lower() in IMAGE_EXTENSIONS
    }


def _names_in(folder: Path) -> list[str]:
    names = {
        _class_name(item, f"{str(path)!r}, object {number}")
        for path in folder.glob("*.xml")
        for number, item in enumerate(_parsed(path).findall("object"), start=1)
    }
    return sorted(names)


def _parsed(path: Path) -> ET.Element:
    try:
        return ET.parse(path).getroot()  # noqa: S314  (expat bounds the growth of entities)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"No such file: {str(path)!r}. Every image of a split needs an XML file, even one "
            "without objects."
        ) from error
    except (ET.ParseError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        raise AnnotationError(f"Cannot read {str(path)!r} as XML ({error}).") from error


def _add(
    table: TableBuilder,
    tree: ET.Element,
    path: Path,
    image_file: str | None,
    labels: dict[str, int],
    *,
    one_based: bool,
) -> None:
    size = tree.find("size")
    height, width = (_side(size, side, f"{str(path)!r}, size") for side in ("height", "width"))
    index = table.add_image(image_file or f"{path.stem}.jpg", (height, width))
    for number, item in enumerate(tree.findall("object"), start=1):
        where = f"{str(path)!r}, object {number}"
        x1, y1, x2, y2 = (_number(item.find("bndbox"), key, where) for key in _CORNERS)
        box = (x1 - one_based, y1 - one_based, x2, y2)
        label = labels.get(_class_name(item, where), -1)
        table.add_box(index, label, box, crowd=_number(item, "difficult", where, 0) > 0)


def _class_name(item: ET.Element, where: str) -> str:
    name = (item.findtext("name") or "").strip()
    if not name:
        raise AnnotationError(f"{where}: name is missing or empty.")
    return name


def _side(size: ET.Element | None, key: str, where: str) -> int:
    """Return a side of the image, 0 where it is not given."""
    side = _number(size, key, where, 0)
    if not -_SIZE_LIMIT < side < _SIZE_LIMIT:
        raise AnnotationError(f"{where}: {key} must be a number of pixels, got {side}.")
    return max(int(side), 0)  # some programs write -1 for an unknown size


def _number(item: ET.Element | None, key: str, where: str, default: float | None = None) -> float:
    text = None if item is None else item.findtext(key)
    if text is None:
        if default is not None:
            return default
        raise AnnotationError(f"{where}: {key} is missing.")
    try:
        return float(text)
    except ValueError as error:
        raise AnnotationError(f"{where}: {key} must be a number, got {shortened(text)}.") from error
