"""Pascal VOC folders: one XML file per image, and lists of image names for the splits."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from focaldet._checks import check_names, existing_folder, printable, shortened
from focaldet._files import list_files
from focaldet.datasets.readers._builder import TableBuilder
from focaldet.datasets.readers._problems import raise_or_warn, tell_of_missing_objects
from focaldet.datasets.readers._splits import unknown_split
from focaldet.datasets.readers._text import read_text
from focaldet.errors import AnnotationError
from focaldet.images import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    import os
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.readers._problems import Report
    from focaldet.datasets.readers._reader import ReadOptions

__all__ = ["LAYOUT", "NAME", "OPTIONS", "VocParser", "read", "read_voc", "recognises", "splits"]

NAME = "Pascal VOC"
LAYOUT = "a folder with ImageSets/Main/<split>.txt"
OPTIONS = frozenset({"class_names"})

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_SIZE_LIMIT = 2**31
_IF_MISSING = "If they should have objects, add them to their XML files as <object> elements."


def recognises(path: Path) -> bool:
    """Return whether the path is a folder with ``ImageSets``."""
    return (path / "ImageSets").is_dir()


def splits(path: Path) -> tuple[str, ...]:
    """Return the names of the lists in ``ImageSets/Main``."""
    folder = path / "ImageSets" / "Main"
    names = [file.stem for file in list_files(folder, (".txt",))] if folder.is_dir() else []
    # Pascal VOC also has a list per class and split, such as cat_train.
    known = set(names)
    return tuple(name for name in names if "_" not in name or name.rpartition("_")[2] not in known)


def read(path: Path, options: ReadOptions) -> AnnotationTable:
    """Read one split of a folder."""
    return read_voc(
        path, options.split or "", class_names=options.class_names, report=options.report
    )


def read_voc(
    root: str | os.PathLike[str],
    split: str,
    *,
    class_names: Sequence[str] | None = None,
    one_based: bool = False,
    report: Report | None = None,
) -> AnnotationTable:
    """Read one split of a dataset in Pascal VOC format.

    Image ids are 1, 2, ... in the order of the split. Category ids are 0, 1, ... in the order of
    ``class_names``.

    Args:
        root: Folder with ``ImageSets/Main``, ``Annotations`` and ``JPEGImages``.
        split: Name of a split, such as "train" for the images listed in
            ``ImageSets/Main/train.txt``. A line may name an image in a folder, such as ``street/a``
            for ``JPEGImages/street/a.jpg`` and ``Annotations/street/a.xml``.
        class_names: Names of labels 0, 1, ... None uses all names in ``Annotations``, in alphabetical
            order as VOC does. These are the same for every split, but finding them takes reading
            every file.
        one_based: Whether pixel coordinates start at 1 and a box includes the pixels at ``xmax`` and
            ``ymax``. If so, 1 is subtracted from ``xmin`` and ``ymin``.
        report: A function that is called with each error or warning about a file, line or object, which
            is then left out, so that all can be listed. None raises the first error. See
            :func:`check_dataset`.

            .. versionadded:: 0.3.0

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
        TypeError: If ``class_names`` is not a sequence of strings.

    Warns:
        UserWarning: If there is no object that training could learn from, or most images have no
            objects. Fewer images without objects are counted in the log.
    """
    if class_names is not None:
        class_names = check_names("class_names", class_names)
    root = existing_folder("root", root)
    listing = root / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        raise FileNotFoundError(unknown_split(split, root, splits(root)))
    folder = existing_folder("root", root / "JPEGImages")
    images = _by_stem(folder, IMAGE_EXTENSIONS)
    parser = VocParser(root / "Annotations", report or raise_or_warn)
    if class_names is None:
        class_names = parser.class_names()
    labels = {name: label for label, name in enumerate(class_names)}
    builder = TableBuilder()
    for line in read_text(listing).splitlines():
        name = line.strip().replace("\\", "/")
        tree = parser.parse(name) if name else None
        if tree is not None:
            image = images.get(name)
            file_name = f"{name}.jpg" if image is None else image.relative_to(folder).as_posix()
            parser.add(builder, name, tree, file_name, labels, one_based=one_based)
    table = builder.build(listing, folder, class_names)
    tell_of_missing_objects(table, report, remedy=_IF_MISSING)
    return table


def _by_stem(folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    """Return the files in a folder by their relative paths without suffix. The first of two is kept."""
    files = reversed(list_files(folder, suffixes, recursive=True))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


class _MissingAnnotationsError(AnnotationError, FileNotFoundError):
    """An image of a split has no XML file."""


class VocParser:
    """Reads the XML files of a folder, each of which is reported once if it cannot be read.

    Args:
        folder: The folder of the XML files.
        report: Called with each error, after which the file or object is left out.
    """

    def __init__(self, folder: Path, report: Report) -> None:
        self._folder = folder
        self._report = report
        self._files = _by_stem(folder, (".xml",)) if folder.is_dir() else {}
        self._unreadable: set[str] = set()

    def stems(self) -> list[str]:
        """Return the path of every file, relative to the folder and without suffix, in this order."""
        return sorted(self._files)

    def class_names(self) -> list[str]:
        """Return the names of all classes in the folder, in alphabetical order."""
        names = set()
        for stem in self.stems():
            tree = self.parse(stem)
            for item in () if tree is None else tree.findall("object"):
                name = (item.findtext("name") or "").strip()
                if name:  # otherwise, it is reported if the image is in the split
                    names.add(name)
        return sorted(names)

    def parse(self, stem: str) -> ET.Element | None:
        """Parse the file of an image; None if that is not possible."""
        if stem in self._unreadable:
            return None
        try:
            return self._parsed(stem)
        except AnnotationError as error:
            self._unreadable.add(stem)
            self._report(error)
        return None

    def _parsed(self, stem: str) -> ET.Element:
        path = self.path(stem)
        try:
            return ET.parse(path).getroot()  # noqa: S314  (expat bounds the growth of entities)
        except FileNotFoundError as error:
            raise _MissingAnnotationsError(
                f"No such file: {str(path)!r}. Every image of a split needs an XML file, even one "
                "without objects."
            ) from error
        except (ET.ParseError, ValueError, LookupError) as error:  # LookupError: unknown encoding
            raise AnnotationError(
                f"Cannot read {str(path)!r} as XML ({printable(str(error))})."
            ) from error

    def path(self, stem: str) -> Path:
        """Return the path of the XML file of an image, whether it exists or not."""
        return self._files.get(stem, self._folder / f"{stem}.xml")

    def add(
        self,
        table: TableBuilder,
        stem: str,
        tree: ET.Element,
        file_name: str,
        labels: dict[str, int],
        *,
        one_based: bool,
    ) -> None:
        """Add an image and its objects to the table."""
        path = self.path(stem)
        try:
            size = _size(tree, f"{str(path)!r}, size")
        except AnnotationError as error:
            self._report(error)
            size = (0, 0)
        index = table.add_image(file_name, size)
        for number, item in enumerate(tree.findall("object"), start=1):
            where = f"{str(path)!r}, object {number}"
            try:
                x1, y1, x2, y2 = (_number(item.find("bndbox"), key, where) for key in _CORNERS)
                label = labels.get(_class_name(item, where), -1)
                crowd = _number(item, "difficult", where, 0) > 0
            except AnnotationError as error:
                self._report(error)
                continue
            table.add_box(index, label, (x1 - one_based, y1 - one_based, x2, y2), crowd=crowd)


def _size(tree: ET.Element, where: str) -> tuple[int, int]:
    size = tree.find("size")
    return _side(size, "height", where), _side(size, "width", where)


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
    if text is None or not text.strip():
        if default is not None:
            return default
        raise AnnotationError(f"{where}: {key} is missing or empty.")
    try:
        return float(text)
    except ValueError as error:
        raise AnnotationError(f"{where}: {key} must be a number, got {shortened(text)}.") from error
