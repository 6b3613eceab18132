"""Pascal VOC's folders: an XML file an image, lists of names for the splits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from focaldet._checks import must_be
from focaldet.datasets.readers._rows import TableRows
from focaldet.images import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from focaldet.datasets._table import AnnotationTable

__all__ = ["read_voc"]

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def read_voc(
    root: str | os.PathLike[str],
    split: str,
    *,
    class_names: Sequence[str] | None = None,
    one_based: bool = False,
) -> AnnotationTable:
    """Read one split of a data set in Pascal VOC's form.

    Images are numbered 1, 2, ... in the split's order, categories 0, 1, ... as ``class_names``.

    Args:
        root: holds ``ImageSets/Main``, ``Annotations`` and ``JPEGImages``.
        split: such as "train": the images listed in ``ImageSets/Main/train.txt``.
        class_names: of labels 0, 1, ... None takes all that occur in ``Annotations``, whatever the
            split, in alphabetical order (VOC's own), so that the splits agree; it reads every file.
        one_based: whether pixels count from 1 and a box includes the pixels ``xmax`` and ``ymax``.
            ``xmin`` and ``ymin`` then lose 1.

    Convention:
        Pascal VOC's own files are one-based. Most tools that write this form write the corners of a
        box as continuous coordinates, so that is the default, and what the COCO file that comes with
        the BCCD set takes its VOC files for. The box 10, 20, 30, 40 is (10, 20, 30, 40), and with
        ``one_based`` (9, 19, 30, 40). A difficult object becomes a crowd: neither trained on nor
        counted in evaluation. (Unlike VOC's own evaluation, COCO's lets any number of detections
        inside it go unpunished.)

    Raises:
        FileNotFoundError: no list of that split, or no XML file of an image in it.
        ValueError: an XML file that can't be read; the message names it and the object.
    """
    root = Path(root)
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        known = ", ".join(sorted(path.stem for path in listing.parent.glob("*.txt"))) or "none"
        condition = "a split of the data set"
        got = f"{split!r}, but there is no {str(listing)!r}"
        raise FileNotFoundError(must_be("split", condition, got, f"Splits there: {known}."))
    if class_names is None:
        class_names = _names_in(root / "Annotations")
    labels = {name: label for label, name in enumerate(class_names)}
    files = _image_files(root / "JPEGImages")
    rows = TableRows()
    for line in listing.read_text(encoding="utf-8").splitlines():
        name = line.strip()
        if name:
            path = root / "Annotations" / f"{name}.xml"
            _add(rows, _parsed(path), path, files.get(name), labels, one_based=one_based)
    return rows.table(listing, root / "JPEGImages", class_names)


def _image_files(folder: Path) -> dict[str, str]:
    """Return the image files of a folder by their names without suffix."""
    if not folder.is_dir():
        raise FileNotFoundError(
            must_be("root", "a folder with JPEGImages", repr(str(folder.parent)))
        )
    return {
        path.stem: path.name
        for path in sorted(folder.iterdir(), reverse=True)
        if path.suffix.lower() in IMAGE_EXTENSIONS
    }


def _names_in(folder: Path) -> list[str]:
    names = {
        _text(item, "name", path, place)
        for path in folder.glob("*.xml")
        for place, item in enumerate(_parsed(path).findall("object"), start=1)
    }
    return sorted(names)


def _parsed(path: Path) -> ET.Element:
    try:
        return ET.parse(path).getroot()  # noqa: S314  (expat bounds the growth of entities)
    except FileNotFoundError as error:
        remedy = "Every image of a split needs one, even one without objects."
        raise FileNotFoundError(
            must_be("annotations", "an existing file", repr(str(path)), remedy)
        ) from error
    except (ET.ParseError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        got = f"{str(path)!r} ({error})"
        raise ValueError(must_be("annotations", "an XML file", got)) from error


def _add(
    rows: TableRows,
    tree: ET.Element,
    path: Path,
    image_file: str | None,
    labels: dict[str, int],
    *,
    one_based: bool,
) -> None:
    size = tuple(
        int(_number(tree.find("size"), side, path, "size", 0)) for side in ("height", "width")
    )
    index = rows.add_image(image_file or f"{path.stem}.jpg", (size[0], size[1]))
    for place, item in enumerate(tree.findall("object"), start=1):
        what = f"object {place}"
        x1, y1, x2, y2 = (_number(item.find("bndbox"), key, path, what) for key in _CORNERS)
        box = (x1 - one_based, y1 - one_based, x2, y2)
        label = labels.get(_text(item, "name", path, place), -1)
        rows.add_box(index, label, box, crowd=_number(item, "difficult", path, what, 0) > 0)


def _text(item: ET.Element, key: str, path: Path, place: int) -> str:
    text = (item.findtext(key) or "").strip()
    if not text:
        raise ValueError(must_be(key, "given", f"nothing for object {place} of {str(path)!r}"))
    return text


def _number(
    item: ET.Element | None, key: str, path: Path, what: str, default: float | None = None
) -> float:
    text = None if item is None else item.findtext(key)
    if text is None and default is not None:
        return default
    try:
        return float(text or "")
    except ValueError as error:
        got = f"{text!r} in {what} of {str(path)!r}"
        raise ValueError(must_be(key, "a number", got)) from error
