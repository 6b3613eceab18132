"""Folders of annotation files in formats whose files are a single split each.

Two layouts are common: a folder per split, each with annotations and images (Roboflow writes
``train``, ``valid`` and ``test``), and a file per split in one folder (``train.json``, ``val.json``).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from focaldet._files import is_hidden
from focaldet.datasets.readers._alignment import joined_class_names
from focaldet.datasets.readers._splits import split_of, split_of_file, unknown_split
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.readers._reader import Reader, ReadOptions

__all__ = ["FolderReader", "describe_content", "find_in_folder"]

_SHOWN = 8
_SUFFIXES = (".json", ".csv", ".xml")


class FolderReader:
    """Reads the files of a folder with the reader of their format.

    It is itself a :class:`~focaldet.datasets.readers.Reader`.

    Args:
        reader: The reader of the format.
        places: The file or folder of each split. A single one with the name "" is not a split.
        unread: Folders that have the name of a split but no annotations.
    """

    def __init__(
        self, reader: Reader, places: Mapping[str, Path], unread: Sequence[Path] = ()
    ) -> None:
        self.NAME = reader.NAME
        self.LAYOUT = reader.LAYOUT
        self.OPTIONS = reader.OPTIONS
        self.places = places
        self.unread = unread
        self._reader = reader

    def recognises(self, path: Path, /) -> bool:
        """Return True: it was made for the path."""
        return path.is_dir()

    def splits(self, path: Path, /) -> tuple[str, ...] | None:  # noqa: ARG002  (of a reader)
        """Return the names of the splits, or None if there is only one file."""
        return None if "" in self.places else tuple(self.places)

    def read(self, path: Path, options: ReadOptions, /) -> AnnotationTable:
        """Read the file, or that of a split."""
        name = options.split or ""
        if name not in self.places:
            raise FileNotFoundError(unknown_split(name, path, tuple(self.places)))
        return self._read(name, options)

    def with_class_names(self, options: ReadOptions) -> ReadOptions:
        """Return the options with the class names of all splits, if files only have those they use."""
        if options.class_names is not None or "class_names" not in self.OPTIONS:
            return options
        if len(self.places) < 2:
            return options
        with warnings.catch_warnings(action="ignore"):  # the split is read again
            silent = replace(options, report=lambda _: None)
            names = joined_class_names(self._read(one, silent) for one in self.places)
        return replace(options, class_names=names)

    def _read(self, name: str, options: ReadOptions) -> AnnotationTable:
        place = self.places[name]
        if name and options.images is not None and Path(options.images, name).is_dir():
            options = replace(options, images=Path(options.images, name))
        return self._reader.read(place, replace(options, split=None))


def find_in_folder(path: Path, readers: Sequence[Reader]) -> FolderReader | None:
    """Return a reader of the files in a folder, or None if there are none.

    Raises:
        AnnotationError: If it is not clear which files belong to the dataset.
    """
    names = _names_in(path)
    folders = {name: path / name for name in names if split_of(name) and (path / name).is_dir()}
    found = {name: one for name, folder in folders.items() if (one := _single(folder, readers))}
    if found:
        [*formats] = {reader.NAME: reader for reader in found.values()}.values()
        if len(formats) > 1:
            listed = ", ".join(f"{name} ({reader.NAME})" for name, reader in found.items())
            raise AnnotationError(
                f"The folders of {str(path)!r} are in different formats: {listed}. Pass one of them."
            )
        unread = [folder for name, folder in folders.items() if name not in found]
        return FolderReader(
            _Inside(formats[0], readers), {name: folders[name] for name in found}, unread
        )
    return _files_of(path, readers)


class _Inside:
    """Reads a folder as a single split, whether its reader knows the folder or a file in it."""

    def __init__(self, reader: Reader, readers: Sequence[Reader]) -> None:
        self.NAME = reader.NAME
        self.LAYOUT = reader.LAYOUT
        self.OPTIONS = reader.OPTIONS
        self._readers = readers

    def recognises(self, path: Path, /) -> bool:
        return _single(path, self._readers) is not None

    def splits(self, path: Path, /) -> None:  # noqa: ARG002  (of a reader)
        return None

    def read(self, path: Path, options: ReadOptions, /) -> AnnotationTable:
        reader = _single(path, self._readers)
        if reader is None:  # it was removed meanwhile
            raise AnnotationError(f"{str(path)!r} contains no annotations any more.")
        return reader.read(path, options)


def _single(folder: Path, readers: Sequence[Reader]) -> Reader | None:
    """Return the reader of a folder that is one split, or None."""
    reader = next((one for one in readers if one.recognises(folder)), None)
    if reader is None:
        reader = _files_of(folder, readers)
    return reader if reader is not None and reader.splits(folder) is None else None


def _files_of(path: Path, readers: Sequence[Reader]) -> FolderReader | None:
    """Return the reader of the annotation files in a folder, or None if there are none."""
    files: dict[Path, Reader] = {}
    for name in _names_in(path):
        file = path / name
        if file.suffix.lower() in _SUFFIXES and file.is_file():
            reader = next((one for one in readers if one.recognises(file)), None)
            if reader is not None:
                files[file] = reader
    by_split = {file: split_of_file(file.stem) for file in files}
    usual = [file for file, name in by_split.items() if split_of(name)]
    chosen = usual or list(files)
    if not chosen:
        return None
    formats = {files[file].NAME for file in chosen}
    if len(formats) > 1 or (not usual and len(chosen) > 1):
        listed = ", ".join(repr(file.name) for file in chosen[:_SHOWN])
        more = f" and {len(chosen) - _SHOWN} more" if len(chosen) > _SHOWN else ""
        raise AnnotationError(
            f"{str(path)!r} contains several annotation files: {listed}{more}. Pass one of them."
        )
    reader = files[chosen[0]]
    if not usual:
        return FolderReader(reader, {"": chosen[0]})
    # Files with other names, such as trainval.json, are splits, too, if they are of the same format.
    return FolderReader(
        reader,
        {by_split[file]: file for file, one in files.items() if one.NAME == reader.NAME},
    )


def describe_content(path: Path) -> str:
    """Return a sentence about what a folder contains, for errors, or "" for a file."""
    if not path.is_dir():
        return ""
    names = _names_in(path)
    if not names:
        return " The folder is empty."
    shown = [f"{name}/" if (path / name).is_dir() else name for name in names[:_SHOWN]]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f" The folder contains {', '.join(shown)}{more}."


def _names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if not is_hidden(entry.name))
