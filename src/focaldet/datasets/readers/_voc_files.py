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
from focaldet.datasets.readers._splits import split_of, unknown_split
from focaldet.datasets.readers._voc import VocParser

if TYPE_CHECKING:
    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.readers._reader import ReadOptions

__all__ = ["LAYOUT", "NAME", "OPTIONS", "read", "recognises", "root_tag", "splits"]

NAME = "Pascal VOC without splits"
LAYOUT = "a folder with .xml files, which may be in Annotations or in folders of splits"
OPTIONS = frozenset({"images", "class_names"})

_IF_MISSING = "If they should have objects, add them to their XML files as <object> elements."
_SUBFOLDERS = ("Annotations", "annotations")

_logger = logging.getLogger(__name__)


def recognises(path: Path) -> bool:
    """Return whether the path is a folder whose first XML file is one of Pascal VOC."""
    return path.is_dir() and _first_is_voc(_xml_folder(path))


def splits(path: Path) -> tuple[str, ...] | None:
    """Return the names of the folders of splits, or None if there are none."""
    folder = _xml_folder(path)
    names = [entry.name for entry in folder.iterdir() if split_of(entry.name) and entry.is_dir()]
    return tuple(name for name in sorted(names) if _first_is_voc(folder / name)) or None


def read(path: Path, options: ReadOptions) -> AnnotationTable:
    """Read all XML files in a folder and the folders inside it, or those in the folder of a split.

    The image of ``a.xml`` is ``a.jpg`` (or has another suffix), next to it or in another folder of the
    dataset. If there is none, it is the one in the ``<filename>`` of the file. Paths in the files, which
    are those of other machines, are not used. Image ids are 1, 2, ... in the order of the files.
    """
    say = options.report or raise_or_warn
    folder = path if options.images is None else existing_folder("images", options.images)
    images = ImageIndex(folder)
    parser = VocParser(_xml_folder(path), say)
    names = options.class_names
    names = parser.class_names() if names is None else check_names("class_names", names)
    labels = {name: label for label, name in enumerate(names)}
    builder = TableBuilder()
    renamed = Counter[str]()
    used: set[str] = set()
    for stem in _stems(path, parser, options.split):
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
    unused = images.names() - used
    if options.split is not None:
        unused = {name for name in unused if options.split in name.split("/")}
    _log(path, renamed, unused)
    table = builder.build(path, folder, names)
    tell_of_missing_objects(table, options.report, remedy=_IF_MISSING)
    return table


def _stems(path: Path, parser: VocParser, split: str | None) -> list[str]:
    """Return the files of a split."""
    stems = parser.stems()
    if split is None:
        return stems
    names = splits(path) or ()
    if split not in names:
        raise FileNotFoundError(unknown_split(split, path, names))
    others = [stem for stem in stems if stem.partition("/")[0] not in names]
    if others:
        _logger.warning(
            "%s: left out %d XML files outside the folders of splits. The first is %s.xml.",
            printable(str(path)),
            len(others),
            printable(others[0]),
        )
    return [stem for stem in stems if stem.partition("/")[0] == split]


def _xml_folder(path: Path) -> Path:
    """Return the folder of annotations in a folder, or else the folder itself."""
    folders = (path / name for name in _SUBFOLDERS)
    return next((one for one in folders if one.is_dir() and _first_is_voc(one)), path)


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
            tag: str = element.tag
            return tag
    return ""


def _first_is_voc(folder: Path) -> bool:
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(files):
            if name.lower().endswith(".xml") and not is_hidden(name):
                return root_tag(Path(place, name)) == "annotation"
    return False
