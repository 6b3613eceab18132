"""YOLO text files: one object per line, with coordinates as fractions of the image size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from focaldet._checks import existing_file, shortened
from focaldet._extras import import_extra
from focaldet.datasets.readers._builder import TableBuilder
from focaldet.datasets.readers._splits import unknown_split
from focaldet.datasets.readers._text import read_text
from focaldet.errors import AnnotationError
from focaldet.images import IMAGE_EXTENSIONS, read_image_size

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from focaldet.datasets._table import AnnotationTable
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
    return read_yolo(_data_file(path), options.split or "")


def _data_file(path: Path) -> Path:
    if path.is_dir():
        return next(path / name for name in _FILES_IN_FOLDER if (path / name).is_file())
    return path


def read_yolo(data_yaml: str | os.PathLike[str], split: str) -> AnnotationTable:
    """Read one split of a dataset in YOLO format.

    Image ids are 1, 2, ... in the order of the paths, or of the list that names them. Category ids
    are the class numbers of the file. An image without a label file has no objects.

    Args:
        data_yaml: The file that names the folders and classes, with the keys ``path`` (the folder to
            which the splits are relative, itself relative to the file; by default the folder of the
            file), ``train``, ``val``, ``test`` and ``names``.
        split: Key of a split in the file, such as "val". Its value is a folder, which is searched for
            images together with the folders inside it, a text file with one path per line, or a list
            of these. The label files are in ``labels`` if the images are in ``images``, otherwise
            next to the images.

    Convention:
        A line is ``class cx cy w h``, in fractions of the width and height of the upright image, or
        ``class x y x y x y ...``, an outline, which is replaced by its bounding box. The image sizes
        are read from the headers of the images. Paths in a text file are relative to it. If
        ``../train/images`` does not exist, ``train/images`` is tried, because Roboflow writes the
        former for the latter.

    Raises:
        ImportError: If PyYAML is not installed.
        FileNotFoundError: If a file or folder does not exist.
        AnnotationError: If a file is in a different format. The message names the file and the line.
        ValueError: If the file does not have the split.
        UnreadableImageError: If the size of an image cannot be read.
    """
    path = existing_file("data_yaml", data_yaml)
    content = _parsed(path)
    names = _class_names(content, path)
    table = TableBuilder()
    base = path.parent / str(content.get("path") or "")
    for image in _images(content, split, base, path):
        height, width = read_image_size(image)
        name = image.relative_to(base) if image.is_relative_to(base) else image.absolute()
        index = table.add_image(str(name), (height, width))
        labels = _label_file(image)
        if labels.is_file():
            for label, (x1, y1, x2, y2) in _objects(labels, len(names)):
                table.add_box(index, label, (x1 * width, y1 * height, x2 * width, y2 * height))
    return table.build(path, base, names)


def _parsed(path: Path) -> dict[str, Any]:
    yaml = import_extra("yaml", purpose=f"Reading {path.name}", install="pyyaml")
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise AnnotationError(f"Cannot read {str(path)!r} as YAML ({reason}).") from error
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
    if content.get("nc", len(names)) != len(names):
        raise AnnotationError(
            f"nc is {shortened(content['nc'])} in {str(path)!r}, but names has {len(names)} "
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
        place = base / str(entry)
        if not place.exists() and str(entry).startswith("../"):
            place = base / str(entry)[3:]
        if place.is_dir():
            images += sorted(
                file for file in place.rglob("*") if file.suffix.lower() in IMAGE_EXTENSIONS
            )
        elif place.is_file():
            lines = read_text(place).splitlines()
            images += [place.parent / line.strip() for line in lines if line.strip()]
        else:
            raise FileNotFoundError(
                f"No such folder or list of images: {str(base / str(entry))!r} "
                f"({split} in {str(path)!r})."
            )
    return images


def _label_file(image: Path) -> Path:
    parts = list(image.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return Path(*parts).with_suffix(".txt")


def _objects(path: Path, num_classes: int) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Yield the label and the box (xyxy, in fractions of the image size) of each line."""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            first, *values = (float(field) for field in line.split())
            label = int(first)  # raises for NaN and infinity
        except (ValueError, OverflowError):
            first, label, values = 0.5, 0, []
        outline = len(values) >= 6 and len(values) % 2 == 0
        if label != first or not (len(values) == 4 or outline):
            raise AnnotationError(
                f"{str(path)!r}, line {number}: expected 'class cx cy w h', or a class and the "
                f"points of an outline, got {shortened(line.strip(), 80)}."
            )
        if outline:
            xs, ys = values[::2], values[1::2]
            box = (min(xs), min(ys), max(xs), max(ys))
        else:
            cx, cy, width, height = values
            box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
        yield (label if 0 <= label < num_classes else -1), box
