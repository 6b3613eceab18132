"""YOLO text files: one object per line, with coordinates as fractions of the image size."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from focaldet._checks import printable
from focaldet.datasets.writers._places import (
    check_suffixes,
    image_paths,
    known_sizes,
    place_images,
    places_of,
    without_suffix,
)
from focaldet.datasets.writers._table_parts import leave_out_crowds, lose_outlines
from focaldet.errors import AnnotationError
from focaldet.images import read_image_size

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from focaldet.datasets._table import AnnotationTable
    from focaldet.datasets.writers._writer import ImageFiles, Output

__all__ = ["FILE_SUFFIX", "HOLDS_IDS", "IMAGE_FILES", "NAME", "write"]

NAME = "YOLO"
FILE_SUFFIX: str | None = None
IMAGE_FILES: ImageFiles = "link"
HOLDS_IDS = False

_DECIMALS = 9
_SPLITS = ("train", "val", "test")
_STANDARD = re.compile(r"(train|val|test)[-_]?\d*\Z")  # "train2017"
_OTHER_KEYS = frozenset({"path", "names", "nc", "kpt_shape", "flip_idx", "download"})

_logger = logging.getLogger(__name__)


def write(tables: Mapping[str, AnnotationTable], output: Output) -> None:
    """Write ``data.yaml`` and the folders ``images`` and ``labels`` with a folder for each split."""
    keys = _split_keys(tables)
    for split, every in tables.items():
        key = keys[split]
        paths = image_paths(every)
        check_suffixes(paths)
        places = places_of(paths, flat=True)
        output.folder.make_folder(f"images/{key}")
        place_images(every, paths, places, f"images/{key}", output)
        sizes = known_sizes(every, paths, missing="raise")
        if output.image_files != "keep":
            _check_sizes(sizes, paths)
        table = leave_out_crowds(every, output.losses)
        table = lose_outlines(_clip(table, sizes, output.losses), output.losses)
        fractions = _fractions(table, sizes)
        for index, place in enumerate(places):
            rows = table.boxes_of(index)
            labels = table.labels[rows].tolist()
            lines = [
                f"{label} {' '.join(map(_fraction_text, row))}\n"
                for label, row in zip(labels, fractions[rows].tolist(), strict=True)
            ]
            output.folder.write_text(f"labels/{key}/{without_suffix(place)}.txt", "".join(lines))
    class_names = next(iter(tables.values())).class_names
    lines = [f"{key}: images/{key}\n" for key in keys.values()]
    lines += [f"nc: {len(class_names)}\n", "names:\n" if class_names else "names: []\n"]
    lines += [f"  {label}: {_yaml_text(name)}\n" for label, name in enumerate(class_names)]
    output.folder.write_text("data.yaml", "".join(lines))
    if output.image_files == "keep":
        _logger.warning(
            "The images were left where they are. Readers of YOLO look for those of each split in %s.",
            output.folder.path / "images",
        )


def _split_keys(tables: Mapping[str, AnnotationTable]) -> dict[str, str]:
    """Return the key of each split in ``data.yaml``."""
    if list(tables) == ["all"]:
        return {"all": "train"}
    keys: dict[str, str] = {}
    for split in tables:
        match = _STANDARD.match(split)
        key = split if match is None or match[1] in keys.values() else match[1]
        if key in _OTHER_KEYS or key in keys.values():
            raise ValueError(
                f"The split {split!r} cannot have this name in data.yaml, because the key {key!r} is "
                "taken. Rename the split."
            )
        keys[split] = key
        if key != split:
            _logger.warning("The split %r is written as %r.", split, key)
    if unusual := [key for key in keys.values() if key not in _SPLITS]:
        _logger.warning(
            "Splits that programs do not look for in data.yaml, unlike train, val and test: %s.",
            ", ".join(map(repr, unusual)),
        )
    return keys


def _check_sizes(sizes: npt.NDArray[np.int32], paths: Sequence[Path]) -> None:
    """Raise if an image does not have the annotated size, by which readers will not divide."""
    for path, (height, width) in zip(paths, sizes.tolist(), strict=True):
        actual = read_image_size(path)
        if actual != (height, width):
            raise AnnotationError(
                f"{printable(repr(str(path)))} is {actual[0]}x{actual[1]} (height x width), but annotated "
                f"as {height}x{width}. YOLO's fractions are of the size of the file. Correct the "
                "annotations."
            )


def _clip(
    table: AnnotationTable, sizes: npt.NDArray[np.int32], losses: Counter[str]
) -> AnnotationTable:
    """Clip boxes to their images, because many readers reject fractions outside [0, 1]."""
    limits = np.tile(sizes[:, ::-1], 2)[table.image_indices].astype(np.float64)
    boxes = np.clip(table.boxes, 0, limits)
    had_area = (table.boxes[:, 2:] > table.boxes[:, :2]).all(axis=1)
    without_area = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1)
    outside: npt.NDArray[np.bool] = np.logical_and(had_area, without_area)
    changed = (boxes != table.boxes).any(axis=1) & ~outside
    if outside.any():
        losses["boxes outside their image left out"] += int(outside.sum())
    if changed.any():
        losses["boxes clipped to their image"] += int(changed.sum())
    areas = np.where(changed, (boxes[:, 2:] - boxes[:, :2]).prod(axis=1), table.areas)
    inside: npt.NDArray[np.bool] = np.logical_not(outside)
    return replace(table, boxes=boxes, areas=areas).take_boxes(inside)


def _fractions(table: AnnotationTable, sizes: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Return centres, widths and heights in fractions of the image sizes, ``[N, 4]``."""
    low, high = table.boxes[:, :2], table.boxes[:, 2:]
    widths_heights = np.tile(sizes[:, ::-1], 2)[table.image_indices]
    return np.concatenate([(low + high) / 2, high - low], axis=1) / widths_heights


def _fraction_text(value: float) -> str:
    return f"{value:.{_DECIMALS}f}".rstrip("0").rstrip(".")


def _yaml_text(text: str) -> str:
    r"""Return a text as a double-quoted scalar of YAML.

    >>> print(_yaml_text('a "b"\n'))
    "a \"b\"\u000a"
    """
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(map(_yaml_character, escaped)) + '"'


def _yaml_character(one: str) -> str:
    if one.isprintable():
        return one
    return f"\\u{ord(one):04x}" if ord(one) < 2**16 else f"\\U{ord(one):08x}"
