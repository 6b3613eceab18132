"""Folders of Pascal VOC's XML files without lists of splits, as annotation tools write them."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from focaldet._checks import check_names, existing_folder, printable
from focaldet._files import is_hidden
from focaldet.datasets.readers._builder import TableBuilder
from focaldet.datasets.readers._places import ImageIndex
from focaldet.datasets.readers._problems import raise_or_warn, tell_of_missing_objects
from focaldet.datasets.readers._splits import split_of
from focaldet.datasets.readers._voc import VocParser

if TYPE_CHECKING:
    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.readers._reader import ReadOptions

__all__ = ["LAYOUT", "NAME", "OPTIONS", "read", "recognises", "root_tag", "splits"]

NAME = "Pascal VOC without splits"
LAYOUT = "a folder with .xml files, which may be in Annotations"
OPTIONS = frozenset({"images", "class_names"})

_IF_MISSING = "If they should have objects, add them to their XML files as <object> elements."
_SUBFOLDERS = ("Annotations", "annotations")

_logger = logging.getLogger(__name__)


def recognises(path: Path) -> bool:
    """Return whether the path is a folder whose first XML file is one of Pascal VOC.

    A folder with folders of splits is not: these are recognised one by one.
    """
    if not path.is_dir():
        return False
    for name in _SUBFOLDERS:
        if (path / name).is_dir() and _first_is_voc(path / name):
            return True
    return _first_is_voc(path)


def splits(_: Path) -> None:
    """Return None: the files are a single split."""


def read(path: Path, options: ReadOptions) -> AnnotationTable:
    """Read all XML files in a folder and the folders inside it.

    The image of ``a.xml`` is ``a.jpg`` (or has another suffix), next to it or in another folder of the
    dataset. If there is none, it is the one in the ``<filename>`` of the file. Paths in the files, which
    are those of other machines, are not used. Image ids are 1, 2, ... in the order of the files.
    """
    say = options.report or raise_or_warn
    folder = path if options.images is None else existing_folder("images", options.images)
    images = ImageIndex(folder)
    inside = next((path / one for one in _SUBFOLDERS if (path / one).is_dir()), path)
    parser = VocParser(inside if _first_is_voc(inside) else path, say)
    names = options.class_names
    names = parser.class_names() if names is None else check_names("class_names", names)
    labels = {name: label for label, name in enumerate(names)}
    builder = TableBuilder()
    renamed = Counter[str]()
    used: set[str] = set()
    for stem in parser.stems():
        tree = parser.parse(stem)
        if tree is None:
            continue
        given = (tree.findtext("filename") or "").strip().replace("\\", "/")
        found = images.find(stem)
        if found is None and given:
            found = images.find(given) or images.find(str(PurePosixPath(given).with_suffix("")))
            renamed[f"{given} for {stem}.xml"] += found is not None
        if found is None:
            found = f"{stem}{PurePosixPath(given).suffix or '.jpg'}"
        used.add(found)
        parser.add(builder, stem, tree, found, labels, one_based=False)
    _log(path, renamed, images.names() - used)
    table = builder.build(path, folder, names)
    tell_of_missing_objects(table, options.report, remedy=_IF_MISSING)
    return table


def _log(path: Path, renamed: Counter[str], unused: set[str]) -> None:
    source = printable(str(path))
    if count := renamed.total():
        _logger.warning(
            "%s: %d XML files are called differently from their images, which were found by their "
            "<filename>. The first is %s.",
            source,
            count,
            printable(next(name for name, number in renamed.items() if number)),
        )
    if unused:
        _logger.warning(
            "%s: left out %d images without an XML file. The first is %s. If they have no objects, "
            "add an XML file without <object> for each.",
            source,
            len(unused),
            printable(min(unused)),
        )


def root_tag(path: Path) -> str:
    """Return the tag of the first element of an XML file, "" if it cannot be read."""
    with (
        contextlib.suppress(ET.ParseError, OSError, ValueError, LookupError),
        path.open("rb") as file,
    ):
        for _, element in ET.iterparse(file, events=("start",)):  # noqa: S314  (expat bounds entities)
            return element.tag
    return ""


def _first_is_voc(folder: Path) -> bool:
    for place, folders, files in os.walk(folder):
        if any(split_of(name) for name in folders):
            return False
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(files):
            if name.lower().endswith(".xml") and not is_hidden(name):
                return root_tag(Path(place, name)) == "annotation"
    return False
