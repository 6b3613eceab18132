"""YOLO text files: one object per line, with coordinates as fractions of the image size."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

from focaldet._checks import existing_file, printable, shortened
from focaldet._files import list_files
from focaldet._yaml import parse_yaml
from focaldet.datasets.readers._builder import TableBuilder
from focaldet.datasets.readers._exif import read_annotated_size
from focaldet.datasets.readers._places import is_file
from focaldet.datasets.readers._problems import raise_or_warn, tell_of_missing_objects
from focaldet.datasets.readers._splits import USUAL_SPLITS, unknown_split
from focaldet.datasets.readers._text import read_text
from focaldet.datasets.readers._yolo_labels import KeypointShape, LabelFolders, LineReader
from focaldet.errors import AnnotationError, UnreadableImageError
from focaldet.images import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from pathlib import Path

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.readers._exif import Exif
    from focaldet.datasets.readers._problems import Report
    from focaldet.datasets.readers._reader import ReadOptions

__all__ = ["LAYOUT", "NAME", "OPTIONS", "read", "read_yolo", "recognises", "splits"]

NAME = "YOLO"
LAYOUT = "a .yaml or .data file, or a folder with data.yaml, obj.data or classes.txt"
OPTIONS: frozenset[str] = frozenset()

_SUFFIXES = (".yaml", ".yml")
_FILES_IN_FOLDER = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_DARKNET_SUFFIX = ".data"
_CLASS_FILES = ("classes.txt", "labels/classes.txt", "_darknet.labels")
_SPLIT_KEYS = (*USUAL_SPLITS, "valid", "validation")

_logger = logging.getLogger(__name__)


class _DataFile(NamedTuple):
    """What a data file says, or the layout of a folder without one.

    Attributes:
        path: The file or folder, for messages.
        base: The folder to which the entries of splits are relative.
        content: The values of the file; "names" and the entries of splits for other layouts.
        is_one_split: Whether there are no splits; the images are then those of the key "".
    """

    path: Path
    base: Path
    content: dict[str, Any]
    is_one_split: bool = False

    def splits(self) -> tuple[str, ...]:
        """Return which of the usual splits the file has, without those whose files do not exist."""
        named = [key for key in _SPLIT_KEYS if self.content.get(key)]
        found = [key for key in named if self._exists(key)]
        if found and len(found) < len(named):
            _logger.warning(
                "%s: skipped the splits %s, whose images do not exist.",
                printable(str(self.path)),
                ", ".join(repr(key) for key in named if key not in found),
            )
        return tuple(found or named)

    def _exists(self, key: str) -> bool:
        entries = self.content[key]
        entries = entries if isinstance(entries, list) else [entries]
        return any(
            not isinstance(entry, str) or _place(self.base, entry) is not None for entry in entries
        )


def recognises(path: Path) -> bool:
    """Return whether the path is a data file, or a folder with one or with a list of classes."""
    if path.is_dir():
        return _data_file(path) is not None
    return path.suffix.lower() in (*_SUFFIXES, _DARKNET_SUFFIX)


def splits(path: Path) -> tuple[str, ...] | None:
    """Return which of the usual splits the data file has; None if there is only a list of classes."""
    data = _opened(path)
    return None if data.is_one_split else data.splits()


def read(path: Path, options: ReadOptions) -> AnnotationTable:
    """Read one split of a data file or its folder."""
    say = options.report or raise_or_warn
    table, doubts = _read(_opened(path), options.split or "", say, options.exif)
    for doubt in doubts:
        say(UserWarning(doubt))
    tell_of_missing_objects(table, options.report, remedy=None)  # missing label files are counted
    return table


def _data_file(folder: Path) -> Path | None:
    """Return the data file in a folder, or else its list of classes, or None."""
    candidates = [folder / name for name in _FILES_IN_FOLDER]
    candidates += [folder / f"obj{_DARKNET_SUFFIX}", *(folder / name for name in _CLASS_FILES)]
    return next((file for file in candidates if file.is_file()), None)


def _opened(path: Path) -> _DataFile:
    """Read a data file, the one in a folder, or the list of classes in a folder."""
    file = _data_file(path) if path.is_dir() else path
    if file is None:
        raise AnnotationError(
            f"{str(path)!r} is not a YOLO folder: it has no {_FILES_IN_FOLDER[0]}."
        )
    if file.suffix.lower() == _DARKNET_SUFFIX:
        return _darknet(file)
    if path.is_dir() and file.suffix.lower() not in _SUFFIXES:
        return _folder_with_classes(path, file)
    content = _parsed(file)
    base = file.parent / _relative_folder(content, file)
    if not base.is_dir():
        _logger.warning(
            "%s: used the folder of the file, because path does not exist: %s.",
            printable(str(file)),
            printable(repr(str(base))),
        )
        base = file.parent
    return _DataFile(file, base, content)


def _darknet(path: Path) -> _DataFile:
    """Read an ``obj.data`` file: lines ``key = value`` that name the lists and the file of classes."""
    pairs = (line.partition("=") for line in read_text(path).splitlines())
    content: dict[str, Any] = {key.strip(): value.strip() for key, _, value in pairs}
    listing = _place(path.parent, content.get("names", ""))
    if listing is None or not listing.is_file():
        raise AnnotationError(
            f"{str(path)!r} must have a line 'names = FILE' with the file of the classes, got "
            f"{shortened(content.get('names'))}."
        )
    names = _lines(listing)
    content = {key: content[key] for key in _SPLIT_KEYS if key in content}
    return _DataFile(path, path.parent, {**content, "names": names})


def _folder_with_classes(folder: Path, classes: Path) -> _DataFile:
    """Return the layout of a folder with a list of classes, as Label Studio and labelImg write it."""
    names = {"names": _lines(classes)}
    for pattern in ("images/{}", "{}/images"):
        places = [folder / pattern.format(name) for name in _SPLIT_KEYS]
        found = {
            name: str(place.relative_to(folder))
            for name, place in zip(_SPLIT_KEYS, places, strict=True)
            if place.is_dir()
        }
        if found:
            return _DataFile(folder, folder, {**names, **found})
    images = "images" if (folder / "images").is_dir() else "."
    return _DataFile(folder, folder, {**names, "": images}, is_one_split=True)


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read_yolo(
    data_yaml: str | os.PathLike[str], split: str, *, report: Report | None = None
) -> AnnotationTable:
    """Read one split of a dataset in YOLO format.

    Image ids are 1, 2, ... in the order of the paths, or of the list that names them. Category ids
    are the class numbers of the file. An image without a label file has no objects. The label file of
    ``images/a.png`` is ``labels/a.txt``, or else ``images/a.txt``. If the path contains several folders
    ``images``, the last one is replaced first. The folders may also be called ``image`` and ``label``,
    and names of folders and suffixes may be in upper case. Hidden files are ignored.

    Args:
        data_yaml: The file that names the folders and classes, with the keys ``path`` (the folder to
            which the splits are relative, itself relative to the file; by default the folder of the
            file), ``train``, ``val``, ``test``, ``names`` and, for keypoints, ``kpt_shape``.
        split: Key of a split in the file, such as "val". Its value is a folder, which is searched for
            images together with the folders inside it, a text file with one path per line, or a list
            of these.
        report: A function that is called with each error or warning about a file, line or object, which
            is then left out, so that all can be listed. None raises the first error. See
            :func:`check_dataset`.

            .. versionadded:: 0.3.0

    Convention:
        A line is ``class cx cy w h``, in fractions of the width and height of the upright image, or
        ``class x y x y x y ...``, an outline, which is replaced by its bounding box. So is an oriented
        box, ``class x y x y x y x y``. With ``kpt_shape: [n, d]`` in the data file, ``n * d`` values of
        keypoints may follow ``class cx cy w h``; they are not used. Without it, keypoints are
        recognised by their visibility, and numbers that can be either an outline or keypoints
        in every long line of a split are an error. The image sizes are read from the headers of the
        images. Paths in a text file are relative to it; one that does not exist is tried without its
        first folders, which is logged, because CVAT writes ``data/obj_train_data/a.jpg`` for
        ``obj_train_data/a.jpg``. If ``../train/images`` does not exist, ``train/images`` is tried,
        because Roboflow writes the former for the latter. A ``path`` that does not exist is replaced
        by the folder of the file, which is logged.

    Raises:
        ImportError: If PyYAML is not installed.
        FileNotFoundError: If a file or folder does not exist.
        AnnotationError: If a file is in a different format. The message names the file and the line.
        ValueError: If the file does not have the split.
        UnreadableImageError: If the size of an image cannot be read.

    Warns:
        UserWarning: If images have no label file, which is different from an empty one. If lines are
            oriented boxes, or have keypoints that the data file does not mention. If there is no
            object that training could learn from.
    """
    data = _opened(existing_file("data_yaml", data_yaml))
    say = report or raise_or_warn
    table, doubts = _read(data, split, say, "upright")
    for doubt in doubts:  # here, so that a warning names the line of the caller
        say(UserWarning(doubt))
    tell_of_missing_objects(table, report, remedy=None)  # missing label files are counted
    return table


def _read(
    data: _DataFile, split: str, say: Report, exif: Exif
) -> tuple[AnnotationTable, list[str]]:
    """Return the table of a split, and what is doubtful about it."""
    path, base, content, _ = data
    names = _class_names(content, path)
    lines = LineReader(len(names), _keypoint_shape(content, path), say)
    folders = LabelFolders()
    unlabelled: list[Path] = []
    builder = TableBuilder()
    for image in _images(data, split):
        labels = folders.find(image)
        if labels is None:
            unlabelled.append(image)
        try:
            size = height, width = read_annotated_size(image, exif)
        except (AnnotationError, FileNotFoundError, UnreadableImageError) as error:
            say(error)
            if labels is not None:
                lines.read(labels, (1, 1))  # to report what is wrong in it, too
            continue
        name = image.relative_to(base) if image.is_relative_to(base) else image.absolute()
        index = builder.add_image(str(name), size)
        for label, (x1, y1, x2, y2) in () if labels is None else lines.read(labels, size):
            builder.add_box(index, label, (x1 * width, y1 * height, x2 * width, y2 * height))
    if ambiguity := lines.ambiguity():
        say(AnnotationError(ambiguity))
    return builder.build(path, base, names), list(_warnings(path, lines, unlabelled, folders))


def _warnings(
    path: Path, lines: LineReader, unlabelled: list[Path], folders: LabelFolders
) -> Iterator[str]:
    source = printable(str(path))
    if unlabelled:
        places = " and ".join(repr(str(place)) for place in folders.looked_for(unlabelled[0]))
        yield (
            f"{source}: images without a label file, which have no objects: {len(unlabelled)}. The "
            f"first is {str(unlabelled[0])!r}; looked for {places}. If an image has no objects, add an "
            "empty file for it."
        )
    if lines.num_poses:
        yield (
            f"{source}: lines with keypoints, of which only the box is used: {lines.num_poses}. Set "
            "kpt_shape in the file to say so."
        )
    if lines.num_oriented:
        yield (
            f"{source}: oriented boxes, replaced by their bounding boxes, which are larger: "
            f"{lines.num_oriented}."
        )


def _relative_folder(content: dict[str, Any], path: Path) -> str:
    folder = content.get("path")
    if folder is not None and not isinstance(folder, str):
        raise AnnotationError(
            f"path in {str(path)!r} must be the name of a folder, got {type(folder).__name__}."
        )
    return folder or ""


def _keypoint_shape(content: dict[str, Any], path: Path) -> KeypointShape | None:
    shape = content.get("kpt_shape")
    if shape is None:
        return None
    if (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(number) is int and 0 <= number < 10_000 for number in shape)
        and (shape[1] in (2, 3) or shape == [0, 0])
    ):
        return KeypointShape(*shape)
    raise AnnotationError(
        f"kpt_shape in {str(path)!r} must be [number of keypoints, 2 or 3], or [0, 0] for none."
    )


def _parsed(path: Path) -> dict[str, Any]:
    content = parse_yaml(
        read_text(path),
        purpose=f"Reading {path.name}",
        source=repr(str(path)),
        error=AnnotationError,
    )
    if not isinstance(content, dict) or "names" not in content:
        raise AnnotationError(
            f"{str(path)!r} is not a YOLO data file: it has no 'names', which lists the classes."
        )
    return content


def _class_names(content: dict[str, Any], path: Path) -> list[str]:
    names = content["names"]
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise AnnotationError(
                f"The class numbers of names in {str(path)!r} must be 0, 1, 2, ..., "
                f"got {shortened(list(names))}."
            )
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list):
        raise AnnotationError(
            f"names in {str(path)!r} must be a list, or a mapping from numbers to names, "
            f"got {shortened(names)}."
        )
    for number, name in enumerate(names):
        if isinstance(name, bool) or not isinstance(name, (str, int, float)):
            hint = " Put no, yes, on and off in quotes." if isinstance(name, bool) else ""
            raise AnnotationError(
                f"names[{number}] in {str(path)!r} must be text, got "
                f"{name if isinstance(name, bool) else type(name).__name__}.{hint}"
            )
    count = content.get("nc", len(names))
    if count != len(names):
        shown = shortened(count) if isinstance(count, (int, float, str)) else type(count).__name__
        raise AnnotationError(
            f"nc is {shown} in {str(path)!r}, but names has {len(names)} "
            f"{'entry' if len(names) == 1 else 'entries'}."
        )
    return [str(name) for name in names]


def _images(data: _DataFile, split: str) -> list[Path]:
    path, base, content, _ = data
    entries = content.get(split)
    if not entries:
        raise ValueError(unknown_split(split, path, data.splits()))
    images: list[Path] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, str):
            raise AnnotationError(
                f"{split} in {str(path)!r} must be a path or a list of paths, got "
                f"{type(entry).__name__}."
            )
        place = _place(base, entry)
        if place is None:
            raise FileNotFoundError(
                f"No such folder or list of images: {str(base / entry)!r} "
                f"({split} in {str(path)!r})."
            )
        if place.is_dir():
            images += list_files(place, IMAGE_EXTENSIONS, recursive=True)
        else:
            images += _listed(place, base)
    return images


def _place(base: Path, entry: str) -> Path | None:
    r"""Return the folder or file that an entry names, or None.

    ``/`` may be written as ``\``. Roboflow writes ``../train/images`` for ``train/images``, and CVAT
    ``data/train.txt`` for ``train.txt``.
    """
    for one in dict.fromkeys((entry, entry.replace("\\", "/"))):
        for start in ("", "../", "data/"):
            if one.startswith(start) and (place := base / one.removeprefix(start)).exists():
                return place
    return None


def _listed(listing: Path, base: Path) -> list[Path]:
    """Return the images in a list, whose paths may start with folders of another machine.

    CVAT writes ``data/obj_train_data/a.jpg`` for ``obj_train_data/a.jpg``. A path that does not exist is
    tried without its first folders, one after another, relative to the list and to the dataset.
    """
    images = []
    shortened_paths: list[tuple[str, Path]] = []
    dropped = 0  # of the last path; it is usually that of the next one, too
    for line in _lines(listing):
        image = listing.parent / line
        if not is_file(image):
            parts = [part for part in line.replace("\\", "/").split("/") if part not in ("", ".")]
            for count in dict.fromkeys((dropped, *range(len(parts)))):
                end = "/".join(parts[count:])
                places = (folder / end for folder in (listing.parent, base))
                found = next((place for place in places if end and is_file(place)), None)
                if found is not None:
                    image, dropped = found, count
                    if count:
                        shortened_paths.append((line, found))
                    break
        images.append(image)
    if shortened_paths:
        line, image = shortened_paths[0]
        _logger.warning(
            "%s: %d paths do not exist as they are written; left out their first folders. The first is "
            "%s for %s.",
            printable(str(listing)),
            len(shortened_paths),
            printable(str(image)),
            printable(line),
        )
    return images
