"""The annotated objects that detections are compared with."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from focaldet._checks import shortened
from focaldet._coco_json import InstanceColumns, read_instances, usable_boxes
from focaldet.detections import Detections

if TYPE_CHECKING:
    import numpy.typing as npt

_MAX_IDS_SHOWN = 5
_INT64 = np.iinfo(np.int64)


class SupportsToCoco(Protocol):
    """Annotations that can be written in COCO format, such as an ``AnnotationTable``."""

    def to_coco(self) -> dict[str, Any]:
        """Return the annotations as the content of a COCO file."""


@dataclass(frozen=True, eq=False, kw_only=True)
class GroundTruth:
    """The objects of I images and K categories, N in all, in the order of the file.

    Attributes:
        image_ids: ``[I]``, ascending.
        image_sizes: ``(height, width)`` by image id, for images whose size is known.
        category_ids: ``[K]``, ascending.
        category_names: Name of each category.
        images: ``[N]``, index of each object's image in ``image_ids``.
        categories: ``[N]``, index of each object's category in ``category_ids``.
        boxes: ``[N, 4]``, x, y, width, height.
        areas: ``[N]``, by which objects are small, medium or large.
        crowd: ``[N]``, whether the box is around a crowd.
    """

    image_ids: npt.NDArray[np.int64]
    image_sizes: Mapping[int, tuple[int, int]]
    category_ids: npt.NDArray[np.int64]
    category_names: tuple[str, ...]
    images: npt.NDArray[np.int64]
    categories: npt.NDArray[np.int64]
    boxes: npt.NDArray[np.float64]
    areas: npt.NDArray[np.float64]
    crowd: npt.NDArray[np.bool_]

    def only(self, image_ids: Iterable[int]) -> GroundTruth:
        """Return the ground truth of some of the images.

        Raises:
            ValueError: If an id is not in the annotations.
        """
        kept = np.unique(checked_ids("image_ids", image_ids))
        check_known("image_ids", kept, self.image_ids, "image")
        new_index = np.full(len(self.image_ids), -1)
        new_index[np.searchsorted(self.image_ids, kept)] = np.arange(len(kept))
        rows = new_index[self.images] >= 0
        return replace(
            self,
            image_ids=kept,
            images=new_index[self.images][rows],
            categories=self.categories[rows],
            boxes=self.boxes[rows],
            areas=self.areas[rows],
            crowd=self.crowd[rows],
        )


def read_ground_truth(
    annotations: str | os.PathLike[str] | Mapping[str, Any] | SupportsToCoco,
) -> GroundTruth:
    """Read annotations in COCO format from a file, its content or an ``AnnotationTable``.

    Raises:
        FileNotFoundError: If the file does not exist.
        TypeError: If ``annotations`` is neither a path, a mapping nor a table.
        AnnotationError: If the annotations are not in COCO format.

    Warns:
        UserWarning: If annotations cannot be evaluated and are left out, or images are listed twice.
    """
    given: Any = annotations
    if hasattr(given, "to_coco") and not isinstance(given, Detections):
        given = given.to_coco()
    if not isinstance(given, str | os.PathLike | Mapping):
        raise TypeError(
            "annotations must be the path of a COCO file, its content as a dictionary or an "
            f"AnnotationTable, got {type(given).__name__}."
        )
    columns = read_instances(given)
    if columns.repetitions:
        warnings.warn(columns.repetitions, UserWarning, stacklevel=5)
    rows = _usable_rows(columns)
    ascending = np.argsort(columns.image_ids)
    new_index = np.empty_like(ascending)
    new_index[ascending] = np.arange(len(ascending))
    sizes = zip(columns.image_ids.tolist(), columns.image_sizes.tolist(), strict=True)
    return GroundTruth(
        image_ids=columns.image_ids[ascending],
        image_sizes={
            image_id: (height, width) for image_id, (height, width) in sizes if height and width
        },
        category_ids=columns.category_ids,
        category_names=columns.category_names,
        images=new_index[columns.image_indices[rows]],
        categories=columns.labels[rows],
        boxes=columns.boxes[rows],
        areas=columns.areas[rows],
        crowd=columns.crowd[rows],
    )


def _usable_rows(columns: InstanceColumns) -> npt.NDArray[np.int64]:
    """Return the indices of the annotations that can be evaluated, and warn about the others."""
    valid_box = usable_boxes(columns.boxes)
    declared = columns.labels >= 0
    unusable = np.flatnonzero(~(valid_box & declared))
    if len(unusable):
        first = unusable[0].item()
        if valid_box[first]:
            fault = f"category_id {columns.annotation_category_ids[first]} is not declared"
        else:
            fault = f"bbox {columns.boxes[first].tolist()} is not finite or has a negative size"
        if len(unusable) == 1:
            total = "1 annotation is left out of the ground truth. It is"
        else:
            total = f"{len(unusable)} annotations are left out of the ground truth. The first is"
        message = f"{total} {columns.describe_annotation(first)}, whose {fault}."
        warnings.warn(message, UserWarning, stacklevel=6)
    return np.flatnonzero(valid_box & declared)


def checked_ids(name: str, ids: Iterable[object]) -> npt.NDArray[np.int64]:
    """Return the ids passed as argument ``name`` as an array.

    Raises:
        TypeError: If they are not integers.
        ValueError: If one does not fit into 64 bits.
    """
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise TypeError(f"{name} must be a list of integer ids, got {shortened(ids)}.")
    checked = []
    for one in ids:
        value = one.item() if isinstance(one, Tensor) and one.numel() == 1 else one
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must contain only integer ids, got {shortened(value)}.")
        if not _INT64.min <= value <= _INT64.max:
            raise ValueError(f"{name}: the id {shortened(value)} does not fit into 64 bits.")
        checked.append(int(value))
    return np.array(checked, np.int64)


def check_known(
    name: str, ids: npt.NDArray[np.int64], known: npt.NDArray[np.int64], kind: str
) -> None:
    """Raise ``ValueError`` unless all ids are among the known ones of the annotations.

    Args:
        name: The argument that has the ids.
        ids: The ids to check.
        known: The ids in the annotations.
        kind: "image" or "category".
    """
    missing = np.setdiff1d(ids, known).tolist()
    if missing:
        noun = f"{kind} id" if len(missing) == 1 else f"{kind} ids"
        listed = ", ".join(map(str, missing[:_MAX_IDS_SHOWN]))
        more = len(missing) - _MAX_IDS_SHOWN
        rest = f" and {more} more" if more > 0 else ""
        are = "is" if len(missing) == 1 else "are"
        raise ValueError(f"{name}: {noun} {listed}{rest} {are} not in the annotations.")
