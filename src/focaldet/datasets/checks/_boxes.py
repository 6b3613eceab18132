"""Checks of the boxes and categories of a dataset, which need no images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from focaldet.datasets.checks._report import BoxSizes, ClassCount, Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from focaldet.datasets._table import AnnotationTable

    Bools = npt.NDArray[np.bool_]
    Floats = npt.NDArray[np.float64]

__all__ = [
    "annotation_findings",
    "box_findings",
    "box_sizes",
    "class_counts",
    "format_findings",
    "has_area",
    "size_bins",
]

_SLACK = 1.0  # pixels beyond the image that rounding can explain
_SAME_BOX = 0.99  # IoU
_FEW_BOXES = 5  # too few to judge the format of a dataset
_GOOD = 0.95  # minimum share of boxes that fit their images in the right format
_BAD = 0.8  # maximum share in a wrong format
_SMALL, _MEDIUM = 32**2, 96**2  # COCO's limits of the area


def has_area(boxes: Floats) -> Bools:
    """Return which boxes ``[N, 4]`` are finite and have a width and a height."""
    x1, y1, x2, y2 = boxes.T
    area: Bools = np.isfinite(boxes).all(1) & (x2 > x1) & (y2 > y1)
    return area


def box_findings(table: AnnotationTable, sizes: npt.NDArray[np.int32]) -> Iterator[Finding]:
    """Find boxes that are not finite, have no area, or extend beyond their images.

    Args:
        table: The annotations.
        sizes: ``[I, 2]``, ``(height, width)`` of the images, 0 where unknown.
    """
    x1, y1, x2, y2 = table.boxes.T
    heights, widths = sizes[table.image_indices].T
    known = (heights > 0) & (widths > 0)
    finite: Bools = np.isfinite(table.boxes).min(1)
    area = has_area(table.boxes)
    outside = area & known & ((x2 <= 0) | (y2 <= 0) | (x1 >= widths) | (y1 >= heights))
    with np.errstate(invalid="ignore"):
        out = np.stack([-x1, -y1, x2 - widths, y2 - heights]).max(0)
    overhang = area & known & ~outside & (out > _SLACK)

    def numbers(row: int) -> str:
        return f"x1 y1 x2 y2 = {_box(table.boxes[row])}"

    def with_sides(row: int) -> str:
        return f"{numbers(row)}, width {x2[row] - x1[row]:g}, height {y2[row] - y1[row]:g}"

    def with_image(row: int) -> str:
        return f"{numbers(row)}, image {widths[row]}x{heights[row]}"

    yield from _findings(table, ~finite, "box-not-finite", numbers)
    yield from _findings(table, finite & ~area, "box-no-area", with_sides)
    yield from _findings(table, outside, "box-outside", with_image)
    yield from _findings(table, overhang, "box-overhang", with_image)


def _findings(
    table: AnnotationTable, wrong: Bools, kind: str, message: Callable[[int], str]
) -> Iterator[Finding]:
    for row in wrong.nonzero()[0].tolist():
        index = int(table.image_indices[row])
        yield Finding(
            kind=kind,
            message=message(row),
            file=table.file_names[index],
            image_id=int(table.image_ids[index]),
            annotation_id=int(table.annotation_ids[row]),
        )


def _box(box: Floats) -> str:
    return " ".join(f"{value:.7g}" for value in box.tolist())


def format_findings(table: AnnotationTable, sizes: npt.NDArray[np.int32]) -> Iterator[Finding]:
    """Find out whether all boxes were read in the wrong format.

    A box fits if it has an area and is inside its image. If many boxes do not fit as they are, but
    nearly all fit when their numbers are read in another format, then that format is probably the
    right one.
    """
    finite = np.isfinite(table.boxes).all(1)
    boxes, image_sizes = table.boxes[finite], sizes[table.image_indices[finite]]
    if len(boxes) < _FEW_BOXES:
        return
    now = _share_that_fits(boxes, image_sizes)
    if boxes.min() >= 0 and boxes.max() <= 1:
        message = (
            "all coordinates are in [0, 1]: they look like fractions of the image width and height, "
            "but must be in pixels"
        )
        yield Finding(kind="box-format", message=message)
        return
    for read_as, truth, other in (
        ("x1 y1 x2 y2", "x y width height", _plus_corner(boxes)),
        ("x y width height", "x1 y1 x2 y2", _minus_corner(boxes)),
    ):
        then = _share_that_fits(other, image_sizes)
        if now <= _BAD and then >= _GOOD:
            message = (
                f"the numbers in the file were read as {read_as}, and {now:.0%} of the boxes fit "
                f"their images; read as {truth}, {then:.0%} would fit"
            )
            yield Finding(kind="box-format", message=message)


def _plus_corner(boxes: Floats) -> Floats:
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def _minus_corner(boxes: Floats) -> Floats:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _share_that_fits(boxes: Floats, sizes: npt.NDArray[np.int32]) -> float:
    bounds = np.where((sizes > 0).all(1, keepdims=True), sizes[:, ::-1] + _SLACK, np.inf)
    fits = (boxes[:, :2] >= -_SLACK) & (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] <= bounds)
    return float(fits.all(1).mean())


def annotation_findings(table: AnnotationTable) -> Iterator[Finding]:
    """Find unknown and unused categories, duplicate ids, and objects annotated twice."""
    yield from _findings(
        table, table.labels < 0, "category-unknown", lambda _: "undeclared category"
    )
    for count in class_counts(table):
        if not count.boxes:
            yield Finding(kind="category-unused", message=count.name)
    yield from _equal_ids(table)
    first, later, ious = _equal_boxes(table)
    partner = dict(
        zip(later.tolist(), zip(first.tolist(), ious.tolist(), strict=True), strict=True)
    )

    def other(row: int) -> str:
        same, iou = partner[row]
        box = "same box" if iou == 1 else f"almost the same box (IoU {iou:.3f})"
        return f"{box} as annotation {table.annotation_ids[same]}: {_box(table.boxes[row])}"

    duplicate = np.zeros(len(table.boxes), bool)
    duplicate[later] = True
    yield from _findings(table, duplicate, "box-duplicate", other)


def _equal_ids(table: AnnotationTable) -> Iterator[Finding]:
    """Find duplicate ids, unless the ids are only positions within the images."""
    places = np.arange(len(table.boxes))
    places -= np.searchsorted(table.image_indices, table.image_indices)
    if (table.annotation_ids == places).all():
        return
    _, first, inverse = np.unique(table.annotation_ids, return_index=True, return_inverse=True)
    first_of = first[inverse]

    def other(row: int) -> str:
        index = table.image_indices[first_of[row]]
        return f"same id as an annotation of {table.file_names[index]}"

    wrong = first_of != np.arange(len(first_of))
    yield from _findings(table, wrong, "annotation-id-duplicate", other)


def _equal_boxes(
    table: AnnotationTable,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Floats]:
    """Return the rows of original boxes, the rows that repeat them, and their IoU.

    Only boxes with the same image and class are compared. The rows are sorted by these, and every row
    is compared with the next one, then with the second next, and so on, until no two rows belong to
    the same group.
    """
    (rows,) = has_area(table.boxes).nonzero()
    keys = np.stack([table.image_indices[rows], table.labels[rows], table.crowd[rows]])
    order = np.lexsort(keys[::-1])
    rows, keys = rows[order], keys[:, order]
    group = np.concatenate([[0], (keys[:, 1:] != keys[:, :-1]).any(0).cumsum()])[: len(rows)]
    found = []
    starts, step = np.arange(len(rows)), 0
    while len(starts):
        step += 1
        starts = starts[starts + step < len(rows)]
        starts = starts[group[starts] == group[starts + step]]
        ious = _paired_iou(table.boxes[rows[starts]], table.boxes[rows[starts + step]])
        same = ious > _SAME_BOX
        found.append((rows[starts[same]], rows[starts[same] + step], ious[same]))
    if not found:
        return rows, rows, np.empty(0)
    first, later, ious = (np.concatenate(column) for column in zip(*found, strict=True))
    _, once = np.unique(later, return_index=True)  # a third equal box is found twice
    return first[once], later[once], ious[once]


def _paired_iou(boxes1: Floats, boxes2: Floats) -> Floats:
    shared = np.minimum(boxes1[:, 2:], boxes2[:, 2:]) - np.maximum(boxes1[:, :2], boxes2[:, :2])
    both = shared.clip(min=0).prod(1)
    areas = (boxes1[:, 2:] - boxes1[:, :2]).prod(1) + (boxes2[:, 2:] - boxes2[:, :2]).prod(1)
    iou: Floats = both / (areas - both)
    return iou


def class_counts(table: AnnotationTable) -> tuple[ClassCount, ...]:
    """Count the objects and images of every class, without crowds."""
    counted = (table.labels >= 0) & ~table.crowd
    num_classes = len(table.class_names)
    boxes = np.bincount(table.labels[counted], minlength=num_classes)
    pairs = np.unique(table.image_indices[counted] * num_classes + table.labels[counted])
    images = np.bincount(pairs % max(num_classes, 1), minlength=num_classes)
    return tuple(map(ClassCount, table.class_names, boxes.tolist(), images.tolist()))


def size_bins(table: AnnotationTable, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return 0, 1 or 2 for objects that are small, medium or large by COCO's definition."""
    areas = table.areas[rows]
    sides = table.boxes[rows, 2:] - table.boxes[rows, :2]
    areas = np.where(np.isfinite(areas) & (areas >= 0), areas, sides.prod(1))
    return (areas >= _SMALL).astype(np.int64) + (areas > _MEDIUM)


def box_sizes(table: AnnotationTable) -> BoxSizes:
    """Measure how large the objects are."""
    (rows,) = (has_area(table.boxes) & ~table.crowd).nonzero()
    if not len(rows):
        return BoxSizes(0, 0, 0, (), ())
    small, medium, large = np.bincount(size_bins(table, rows), minlength=3).tolist()
    widths, heights = (table.boxes[rows, 2:] - table.boxes[rows, :2]).T
    spread = [
        tuple(np.quantile(values, (0, 0.05, 0.5, 0.95, 1)).round(3).tolist())
        for values in (np.sqrt(widths * heights), heights / widths)
    ]
    return BoxSizes(small, medium, large, spread[0], spread[1])
