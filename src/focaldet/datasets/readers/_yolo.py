"""YOLO's text files: a line an object, sides as fractions of the image's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from focaldet._checks import must_be
from focaldet.datasets._image_sizes import read_size
from focaldet.datasets.readers._rows import TableRows
from focaldet.images import IMAGE_EXTENSIONS

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from focaldet.datasets._table import AnnotationTable

__all__ = ["read_yolo"]


def read_yolo(data_yaml: str | os.PathLike[str], split: str) -> AnnotationTable:
    """Read one split of a data set in YOLO's form.

    Images are numbered 1, 2, ... in the order of their paths, or of the list that names them;
    categories have the numbers of the file. An image without a label file is one without objects.

    Args:
        data_yaml: names the folders and classes: ``path`` (what the others are relative to, itself
            relative to the file; its folder by default), ``train``, ``val``, ``test``, ``names``.
        split: such as "val": a folder of images (with folders inside), a text file with a path a
            line, or a list of such. Labels are looked for in ``labels`` where the images are in
            ``images``, else beside them.

    Convention:
        A line is ``class cx cy w h``, in fractions of the width and height of the upright image
        (or ``class x y x y x y ...``, an outline, of which the box is taken). Sizes are read from the
        images' headers. A list's paths are relative to it. ``../train/images`` that does not exist is
        looked for as ``train/images``, as Roboflow writes it.

    Raises:
        ImportError: PyYAML is not installed.
        FileNotFoundError: a file or folder is missing.
        ValueError: a file in another form; the message names it and the line.
        UnreadableImageError: an image whose size cannot be read.
    """
    path = Path(data_yaml)
    content = _parsed(path)
    names = _class_names(content, path)
    rows = TableRows()
    base = path.parent / content.get("path", "")
    for image in _images(content, split, base, path):
        height, width = read_size(image)
        name = image.relative_to(base) if image.is_relative_to(base) else image.absolute()
        index = rows.add_image(str(name), (height, width))
        labels = _label_file(image)
        if labels.is_file():
            for label, (x1, y1, x2, y2) in _objects(labels, len(names)):
                rows.add_box(index, label, (x1 * width, y1 * height, x2 * width, y2 * height))
    return rows.table(path, base, names)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        remedy = "pip install 'focaldet[train]' or pyyaml, or read another form of the data set."
        raise ImportError(must_be("data_yaml", "read with PyYAML", "none", remedy)) from error
    if not path.is_file():
        raise FileNotFoundError(must_be("data_yaml", "an existing file", repr(str(path))))
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        got = f"{str(path)!r} ({error})"
        raise ValueError(must_be("data_yaml", "a YAML file", got)) from error
    if not isinstance(content, dict) or "names" not in content:
        got = f"{str(path)!r}, which has no 'names'"
        raise ValueError(must_be("data_yaml", "a YOLO data file", got))
    return content


def _class_names(content: dict[str, Any], path: Path) -> list[str]:
    names = content["names"]
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            got = f"{list(names)} in {str(path)!r}"
            raise ValueError(must_be("names", "numbered 0, 1, 2, ...", got))
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list):
        got = f"{names!r} in {str(path)!r}"
        raise ValueError(must_be("names", "a list, or a mapping from numbers", got))
    if content.get("nc", len(names)) != len(names):
        got = f"{content['nc']} with {len(names)} names in {str(path)!r}"
        raise ValueError(must_be("nc", "the number of names", got))
    return [str(name) for name in names]


def _images(content: dict[str, Any], split: str, base: Path, path: Path) -> list[Path]:
    entries = content.get(split)
    if not entries:
        known = ", ".join(key for key in ("train", "val", "test") if content.get(key)) or "none"
        condition = "a split of the data set"
        got = f"{split!r}, which {str(path)!r} does not have"
        raise ValueError(must_be("split", condition, got, f"Splits there: {known}."))
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
            lines = place.read_text(encoding="utf-8").splitlines()
            images += [place.parent / line.strip() for line in lines if line.strip()]
        else:
            got = f"{str(base / str(entry))!r} in {str(path)!r}"
            raise FileNotFoundError(must_be(split, "an existing folder or list of images", got))
    return images


def _label_file(image: Path) -> Path:
    parts = list(image.parts)
    if "images" in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index("images")
        parts[last] = "labels"
    return Path(*parts).with_suffix(".txt")


def _objects(path: Path, num_classes: int) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Yield label and box, xyxy in fractions, of each line."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            first, *values = (float(field) for field in line.split())
            label = int(first)  # NaN and infinity have none
        except (ValueError, OverflowError):
            first, label, values = 0.5, 0, []
        outline = len(values) >= 6 and len(values) % 2 == 0
        if label != first or not (len(values) == 4 or outline):
            condition = "'class cx cy w h', or a class and an outline"
            got = f"{line.strip()[:80]!r} in line {number} of {str(path)!r}"
            raise ValueError(must_be("label", condition, got))
        if outline:
            xs, ys = values[::2], values[1::2]
            box = (min(xs), min(ys), max(xs), max(ys))
        else:
            cx, cy, width, height = values
            box = (cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2)
        yield (label if 0 <= label < num_classes else -1), box
