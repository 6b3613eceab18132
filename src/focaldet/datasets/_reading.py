"""Annotations in any of the four forms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from focaldet._checks import must_be
from focaldet.datasets.readers._coco import read_coco
from focaldet.datasets.readers._csv import read_csv
from focaldet.datasets.readers._voc import read_voc
from focaldet.datasets.readers._yolo import read_yolo

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from focaldet.datasets._table import AnnotationTable

__all__ = ["read_annotations"]

_YAML = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_FORMS = (
    "a COCO file (.json), a folder of COCO with its split, a folder of Pascal VOC with its split, a "
    "YOLO data.yaml or its folder with its split, or a .csv"
)


def read_annotations(
    path: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    cache: bool = True,
) -> AnnotationTable:
    """Read annotations in the form that the path shows.

    Args:
        path: a COCO file (``.json``) or COCO's folder (``annotations/instances_<split>.json``); a
            folder of Pascal VOC (``ImageSets/Main/<split>.txt``); a YOLO ``data.yaml`` or its
            folder; or a ``.csv``.
        images: the folder of the images, for COCO and CSV; the others say where they are.
        split: such as "train"; needed for folders and YOLO.
        class_names: of labels 0, 1, ..., for VOC and CSV; the others name them.
        cache: of large COCO files; see :func:`read_coco`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no known form, an option that the form doesn't take, or a damaged file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(must_be("path", "an existing file or folder", repr(str(path))))
    suffix = path.suffix.lower()
    if path.is_dir():
        yaml_file = next((path / name for name in _YAML if (path / name).is_file()), None)
        if (path / "ImageSets").is_dir():
            _refuse("images", images, "Pascal VOC")
            return read_voc(path, _needed(split, path), class_names=class_names)
        if yaml_file is not None:
            path, suffix = yaml_file, ".yaml"
        elif (path / "annotations").is_dir():
            path, suffix = _coco_file(path, split), ".json"
            split = None
    if suffix == ".json":
        _refuse("split", split, "a COCO file")
        _refuse("class_names", class_names, "COCO")
        return read_coco(path, images, cache=cache)
    if suffix in (".yaml", ".yml"):
        _refuse("images", images, "YOLO")
        _refuse("class_names", class_names, "YOLO")
        return read_yolo(path, _needed(split, path))
    if suffix == ".csv":
        _refuse("split", split, "CSV")
        return read_csv(path, images, class_names=class_names)
    raise ValueError(must_be("path", _FORMS, repr(str(path))))


def _needed(split: str | None, path: Path) -> str:
    if split is None:
        remedy = "It names one part of the data, such as 'train' or 'val'."
        raise ValueError(must_be("split", "given for this form", f"none for {str(path)!r}", remedy))
    return split


def _coco_file(folder: Path, split: str | None) -> Path:
    file = folder / "annotations" / f"instances_{_needed(split, folder)}.json"
    if not file.is_file():
        names = sorted(found.stem for found in file.parent.glob("instances_*.json"))
        known = ", ".join(name.removeprefix("instances_") for name in names) or "none"
        got = f"{split!r}, but there is no {str(file)!r}"
        condition = "a split of the data set"
        raise FileNotFoundError(must_be("split", condition, got, f"Splits there: {known}."))
    return file


def _refuse(name: str, value: object, form: str) -> None:
    if value is not None:
        raise ValueError(must_be(name, f"left out for {form}, which says it itself", repr(value)))
