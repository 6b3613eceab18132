"""Annotation files ("instances"): the images, the categories and a box for every object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from focaldet._checks import existing_file, shortened
from focaldet._coco_json._file import decode_quickly, open_bytes, parse
from focaldet._coco_json._rows import (
    FLAGS,
    MAX_SIDE,
    Rows,
    as_boxes,
    as_sizes,
    describe_row,
    field_column,
    numbered,
)
from focaldet._coco_json._sound_rows import sound_rows
from focaldet.errors import AnnotationError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

__all__ = ["InstanceColumns", "read_instances"]

_SECTIONS = ("images", "annotations", "categories")


@dataclass(frozen=True, eq=False, kw_only=True)
class InstanceColumns:
    """The annotations of I images and K categories, N in all, in the order of the file.

    Attributes:
        source: The path of the file, for messages; None if its content was passed.
        file_names: File name of each image, None where it is missing.
        image_ids: ``[I]``, each once.
        image_sizes: ``[I, 2]``, ``(height, width)``, 0 where unknown.
        category_ids: ``[K]``, ascending.
        category_names: Name of each category; its id, as text, where it has none.
        supercategories: The supercategory of each category, None where it has none.
        boxes: ``[N, 4]``, x, y, width, height. They may be NaN, infinite or of negative size.
        areas: ``[N]``; that of the box where the file gives none, or a negative one such as -1.
        crowd: ``[N]``, whether the box is around a crowd.
        annotation_ids: ``[N]``. Missing ones get the lowest unused numbers, from 1.
        image_indices: ``[N]``, index into ``image_ids``.
        labels: ``[N]``, index into ``category_ids``; -1 for a category that is not declared.
        annotation_category_ids: ``[N]``, the category id that the file gives.
        repetitions: A sentence that counts the entries of ``images`` that repeat earlier ones and were
            left out; "" if there are none. Whoever reads the file gives it as a warning.
        has_annotation_ids: Whether the file gives all annotation ids.
    """

    source: str | None
    file_names: list[str | None]
    image_ids: npt.NDArray[np.int64]
    image_sizes: npt.NDArray[np.int32]
    category_ids: npt.NDArray[np.int64]
    category_names: tuple[str, ...]
    supercategories: tuple[str | None, ...]
    boxes: npt.NDArray[np.float64]
    areas: npt.NDArray[np.float64]
    crowd: npt.NDArray[np.bool_]
    annotation_ids: npt.NDArray[np.int64]
    image_indices: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    annotation_category_ids: npt.NDArray[np.int64]
    repetitions: str
    has_annotation_ids: bool

    def describe_annotation(self, index: int) -> str:
        """Name an annotation for a message."""
        row_id = self.annotation_ids[index].item() if self.has_annotation_ids else None
        return describe_row("annotations", index, self.source, row_id)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Fields:
    """The fields of a file, each checked by itself but not against the others."""

    file_names: list[str | None]
    image_ids: npt.NDArray[np.int64]
    image_sizes: npt.NDArray[np.int32]
    category_ids: npt.NDArray[np.int64]
    category_names: list[str | None]
    supercategories: list[Any]
    boxes: npt.NDArray[np.float64]
    areas: npt.NDArray[np.float64]
    crowd: npt.NDArray[np.bool_]
    annotation_ids: npt.NDArray[np.int64]
    has_annotation_ids: bool
    annotation_image_ids: npt.NDArray[np.int64]
    annotation_category_ids: npt.NDArray[np.int64]


def read_instances(
    annotations: str | os.PathLike[str] | Mapping[str, Any],
    *,
    report: Callable[[Exception], object] | None = None,
) -> InstanceColumns:
    """Read an annotation file, or its content.

    Args:
        annotations: The path of the file, or its content.
        report: Called with an error for each row of the file that is wrong, which is then left out. None
            raises the first.

    Raises:
        FileNotFoundError: If the file does not exist.
        AnnotationError: If the annotations are not in COCO format. The message names the file, the
            item, its id and the value.
    """
    if isinstance(annotations, Mapping):
        return _connected(_checked_fields(annotations, None, valid_text=True), None)
    path = existing_file("annotations", annotations)
    source = str(path)
    with open_bytes(path) as data:
        try:
            fields = _quick_fields(data)
            if fields is None:
                content, valid_text = parse(data, path)
                fields = _checked_fields(content, source, valid_text=valid_text)
            return _connected(fields, source)
        except AnnotationError:
            if report is None:
                raise
        content, valid_text = parse(data, path)
        sections = {name: _section(content, name, source) for name in _SECTIONS}
        sound = sound_rows(sections, _READ_FIELDS, source, report, valid_text=valid_text)
        return _connected(_checked_fields(sound, source, valid_text=valid_text), source)


def _quick_fields(data: memoryview) -> _Fields | None:
    """Read the fields with msgspec; None if that is not possible or anything is unusual."""
    content = decode_quickly(data, "Instances")
    if content is None:
        return None
    images, categories, annotations = content.images, content.categories, content.annotations
    heights = [image.height for image in images]
    widths = [image.width for image in images]
    crowd = [annotation.iscrowd for annotation in annotations]
    annotation_ids: list[int | None] = [annotation.id for annotation in annotations]
    known_sides = {*heights, *widths} - {None}
    if not set(crowd) <= FLAGS:
        return None
    if known_sides and not (min(known_sides) >= -1 and max(known_sides) <= MAX_SIDE):
        return None
    try:
        numbers, has_annotation_ids = numbered(annotation_ids)
        return _Fields(
            file_names=[image.file_name for image in images],
            image_ids=field_column(images, "id", np.int64),
            image_sizes=as_sizes(heights, widths),
            category_ids=field_column(categories, "id", np.int64),
            category_names=[category.name for category in categories],
            supercategories=[category.supercategory for category in categories],
            boxes=as_boxes(map(attrgetter("bbox"), annotations), len(annotations)),
            areas=field_column(annotations, "area", np.float64),
            crowd=np.array(crowd, np.bool_),
            annotation_ids=numbers,
            has_annotation_ids=has_annotation_ids,
            annotation_image_ids=field_column(annotations, "image_id", np.int64),
            annotation_category_ids=field_column(annotations, "category_id", np.int64),
        )
    except OverflowError:
        return None


def _checked_fields(content: object, source: str | None, *, valid_text: bool) -> _Fields:
    """Read the fields of parsed JSON, and report the first that is wrong."""
    values: dict[str, Any] = {}
    for name, read_fields in _READ_FIELDS.items():
        rows = Rows(_section(content, name, source), name, source, valid_text=valid_text)
        values |= read_fields(rows)
    return _Fields(**values)


def _image_fields(images: Rows) -> dict[str, Any]:
    return {
        "file_names": images.texts("file_name"),
        "image_ids": images.integers("id"),
        "image_sizes": as_sizes(images.sides("height"), images.sides("width")),
    }


def _annotation_fields(annotations: Rows) -> dict[str, Any]:
    annotation_ids, has_annotation_ids = annotations.numbered_ids()
    return {
        "boxes": annotations.boxes(),
        "areas": annotations.optional_numbers("area"),
        "crowd": np.array(annotations.flags("iscrowd"), np.bool_),
        "annotation_ids": annotation_ids,
        "has_annotation_ids": has_annotation_ids,
        "annotation_image_ids": annotations.integers("image_id"),
        "annotation_category_ids": annotations.integers("category_id"),
    }


def _category_fields(categories: Rows) -> dict[str, Any]:
    return {
        "category_ids": categories.integers("id"),
        "category_names": categories.texts("name", integers=True),
        "supercategories": [row.get("supercategory") for row in categories.rows],
    }


_READ_FIELDS = {
    "images": _image_fields,
    "annotations": _annotation_fields,
    "categories": _category_fields,
}


def _section(content: object, name: str, source: str | None) -> Sequence[Any]:
    section = content.get(name) if isinstance(content, Mapping) else None
    if isinstance(section, list | tuple):
        return section
    where = "annotations" if source is None else repr(source)
    remedy = "A COCO annotation file is an object with the lists images, annotations and categories"
    if isinstance(content, list):
        raise AnnotationError(f"{where} is a list, as results files are. {remedy}.")
    if not isinstance(content, Mapping):
        raise AnnotationError(f"{where} is not an object, but {shortened(content)}. {remedy}.")
    got = f"has no list {name!r}" if section is None else f"{name!r} is not a list"
    raise AnnotationError(f"{where} {got}. {remedy}.")


def _connected(fields: _Fields, source: str | None) -> InstanceColumns:
    """Check ids against each other, and return annotations with the index of image and category."""
    kept, repetitions = _kept_images(fields, source)
    image_ids = fields.image_ids[kept]
    image_indices = _indices(fields.annotation_image_ids, image_ids)
    if (image_indices < 0).any():
        index = int((image_indices < 0).argmax())
        row_id = fields.annotation_ids[index].item() if fields.has_annotation_ids else None
        where = describe_row("annotations", index, source, row_id)
        raise AnnotationError(
            f"{where}: image_id {fields.annotation_image_ids[index]} is not the id of an image. "
            "Add the image to images, or remove the annotation."
        )
    order = _category_order(fields.category_ids, source)
    category_ids = fields.category_ids[order]
    names = [fields.category_names[index] for index in order.tolist()]
    with np.errstate(invalid="ignore", over="ignore"):  # boxes may be infinite or NaN
        box_areas = fields.boxes[:, 2] * fields.boxes[:, 3]
    return InstanceColumns(
        source=source,
        file_names=[fields.file_names[index] for index in kept.tolist()],
        image_ids=image_ids,
        image_sizes=fields.image_sizes[kept],
        category_ids=category_ids,
        category_names=tuple(
            str(category_id) if name is None else name
            for category_id, name in zip(category_ids.tolist(), names, strict=True)
        ),
        supercategories=tuple(
            name if isinstance(name, str) else None
            for name in (fields.supercategories[index] for index in order.tolist())
        ),
        boxes=fields.boxes,
        areas=np.where(fields.areas >= 0, fields.areas, box_areas),
        crowd=fields.crowd,
        annotation_ids=fields.annotation_ids,
        image_indices=image_indices,
        labels=_indices(fields.annotation_category_ids, category_ids),
        annotation_category_ids=fields.annotation_category_ids,
        repetitions=repetitions,
        has_annotation_ids=fields.has_annotation_ids,
    )


def _kept_images(fields: _Fields, source: str | None) -> tuple[npt.NDArray[np.int64], str]:
    """Return the indices of the images without repetitions, and a sentence about these, or "".

    Raises:
        AnnotationError: If two images have the same id but a different file name or size.
    """
    first = _first_of_each(fields.image_ids)
    indices = np.arange(len(first))
    repeated = np.flatnonzero(first != indices)
    if not len(repeated):
        return indices, ""
    for index in repeated.tolist():
        earlier = int(first[index])
        if (
            fields.file_names[index] != fields.file_names[earlier]
            or (fields.image_sizes[index] != fields.image_sizes[earlier]).any()
        ):
            where = describe_row("images", index, source, fields.image_ids[index].item())
            raise AnnotationError(
                f"{where} has the same id as images[{earlier}], but a different file name or size. "
                "Give every image its own id."
            )
    where = describe_row("images", repeated[0].item(), source, fields.image_ids[repeated[0]].item())
    if len(repeated) == 1:
        message = f"An image that is listed twice is kept once: {where} repeats an earlier one."
    else:
        message = (
            f"{len(repeated)} entries of images repeat an earlier one and are ignored. "
            f"The first is {where}."
        )
    return np.flatnonzero(first == indices), message


def _category_order(ids: npt.NDArray[np.int64], source: str | None) -> npt.NDArray[np.int64]:
    """Return the indices that sort the category ids.

    Raises:
        AnnotationError: If two categories have the same id.
    """
    first = _first_of_each(ids)
    repeated = np.flatnonzero(first != np.arange(len(first)))
    if len(repeated):
        index = repeated[0].item()
        where = describe_row("categories", index, source, ids[index].item())
        raise AnnotationError(
            f"{where} has the same id as categories[{first[index]}]. "
            "Give every category its own id."
        )
    return np.argsort(ids, kind="stable")


def _first_of_each(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return, for each id, the index at which it occurs first."""
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    return first[inverse.reshape(-1)]


def _indices(ids: npt.NDArray[np.int64], known: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the index of each id among the known ones, -1 where it is not known."""
    if not len(known):
        return np.full(len(ids), -1, np.int64)
    order = np.argsort(known, kind="stable")
    ascending = known[order]
    places = np.searchsorted(ascending, ids).clip(max=len(known) - 1)
    return np.where(ascending[places] == ids, order[places], -1)
