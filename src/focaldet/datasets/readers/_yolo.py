"""YOLO text files: one object per line, with coordinates as fractions of the image size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from focaldet._checks import existing_file, printable, shortened
from focaldet._files import list_files
from focaldet._yaml import parse_yaml
from focaldet.datasets.readers._builder import TableBuilder
from focaldet.datasets.readers._problems import raise_or_warn, tell_of_missing_objects
from focaldet.datasets.readers._splits import unknown_split
from focaldet.datasets.readers._text import read_text
from focaldet.datasets.readers._yolo_labels import KeypointShape, LabelFolders, LineReader
from focaldet.errors import AnnotationError, UnreadableImageError
from focaldet.images import IMAGE_EXTENSIONS, read_image_size

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from pathlib import Path

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.readers._problems import Report
    from focaldet.datasets.readers._reader import ReadOptions

__all__ = ["LAYOUT", "NAME", "OPTIONS", "read", "read_yolo", "recognises", "splits"]

NAME = "YOLO"
LAYOUT = "a .yaml file, or a folder with data.yaml"
OPTIONS: frozenset[str] = frozenset()

_SUFFIXES = (".yaml", ".yml")
_FILES_IN_FOLDER = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_USUAL_SPLITS = ("train", "val", "test")


def recognises(path: Path) -> bool:
    """Return whether the path is a YAML file or a folder with a ``data.yaml``."""
    if path.is_dir():
        return any((path / name).is_file() for name in _FILES_IN_FOLDER)
    return path.suffix.lower() in _SUFFIXES


def splits(path: Path) -> tuple[str, ...]:
    """Return which of the usual splits the data file has."""
    return _splits_in(_parsed(_data_file(path)))


def read(path: Path, options: ReadOptions) -> AnnotationTable:
    """Read one split of a data file or its folder."""
    return read_yolo(_data_file(path), options.split or "", report=options.report)


def _data_file(path: Path) -> Path:
    if path.is_dir():
        return next(path / name for name in _FILES_IN_FOLDER if (path / name).is_file())
    return path


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
        images. Paths in a text file are relative to it. If
        ``../train/images`` does not exist, ``train/images`` is tried, because Roboflow writes the
        former for the latter.

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
    path = existing_file("data_yaml", data_yaml)
    content = _parsed(path)
    names = _class_names(content, path)
    say = report or raise_or_warn
    base = path.parent / _relative_folder(content, path)
    lines = LineReader(len(names), _keypoint_shape(content, path), say)
    folders = LabelFolders()
    unlabelled: list[Path] = []
    builder = TableBuilder()
    for image in _images(content, split, base, path):
        labels = folders.find(image)
        if labels is None:
            unlabelled.append(image)
        try:
            size = height, width = read_image_size(image)
        except (FileNotFoundError, UnreadableImageError) as error:
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
    for warning in _warnings(path, lines, unlabelled, folders):
        say(UserWarning(warning))
    table = builder.build(path, base, names)
    tell_of_missing_objects(table, report, remedy=None)  # missing label files are counted above
    return table


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


def _splits_in(content: dict[str, Any]) -> tuple[str, ...]:
    return tuple(key for key in _USUAL_SPLITS if content.get(key))


def _images(content: dict[str, Any], split: str, base: Path, path: Path) -> list[Path]:
    entries = content.get(split)
    if not entries:
        raise ValueError(unknown_split(split, path, _splits_in(content)))
    images: list[Path] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        if not isinstance(entry, str):
            raise AnnotationError(
                f"{split} in {str(path)!r} must be a path or a list of paths, got "
                f"{type(entry).__name__}."
            )
        place = base / entry
        if not place.exists() and entry.startswith("../"):
            place = base / entry[3:]
        if place.is_dir():
            images += list_files(place, IMAGE_EXTENSIONS, recursive=True)
        elif place.is_file():
            lines = read_text(place).splitlines()
            images += [place.parent / line.strip() for line in lines if line.strip()]
        else:
            raise FileNotFoundError(
                f"No such folder or list of images: {str(base / entry)!r} "
                f"({split} in {str(path)!r})."
            )
    return images
