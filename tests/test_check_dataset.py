from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from focaldet.datasets import AnnotationTable
from focaldet.datasets.checks._check import check_dataset
from focaldet.datasets.checks._report import KINDS, DatasetReport, Finding

Row = tuple[int, int, list[float]]  # image, label, box


def table_of(
    *rows: Row,
    folder: Path = Path("images"),
    files: tuple[str, ...] = ("a.png", "b.png"),
    crowd: tuple[int, ...] = (),
    **changes: Any,
) -> AnnotationTable:
    """A table of images 11, 12, ... of 100x80 (width x height), annotations 501, 502, ..."""
    boxes = np.array([box for _, _, box in rows], np.float64).reshape(-1, 4)
    table = AnnotationTable(
        source=Path("cells.json"),
        image_folder=folder,
        file_names=files,
        image_ids=np.arange(11, 11 + len(files)),
        image_sizes=np.array([[80, 100]] * len(files), np.int32).reshape(-1, 2),
        class_names=("cat", "dog"),
        category_ids=(3, 5),
        boxes=boxes,
        labels=np.array([label for _, label, _ in rows], np.int64),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        crowd=np.isin(np.arange(len(rows)), crowd),
        annotation_ids=np.arange(501, 501 + len(rows)),
        image_indices=np.array([image for image, _, _ in rows], np.int64),
    )
    return replace(table, **changes)


GOOD: tuple[Row, ...] = ((0, 0, [10, 10, 40, 40]), (1, 1, [20, 20, 90, 70]))


def found(table: AnnotationTable, kind: str, **options: Any) -> list[Finding]:
    report = check_dataset(table, **{"images": "none", **options})
    return [finding for finding in report.findings if finding.kind == kind]


def test_a_box_without_area_is_an_error_with_its_ids() -> None:
    table = table_of(*GOOD, (1, 0, [30, 20, 30, 50]), (1, 0, [9, 60, 5, 50]))
    flat, reversed_ = found(table, "box-no-area")
    assert (flat.file, flat.image_id, flat.annotation_id) == ("b.png", 12, 503)
    assert flat.severity == "error"
    assert str(flat) == (
        "b.png, image 12, annotation 503: x1 y1 x2 y2 = 30 20 30 50, width 0, height 30"
    )
    assert reversed_.message.endswith("width -4, height -10")
    assert not check_dataset(table, images="none").ok


def test_nan_and_infinity_are_found_once_each() -> None:
    table = table_of(*GOOD, (1, 0, [math.nan, 0, 5, 5]), (1, 0, [0, 0, math.inf, 5]))
    report = check_dataset(table, images="none")
    assert report.counts == {"box-not-finite": 2}
    assert report.findings[0].message == "x1 y1 x2 y2 = nan 0 5 5"


def test_boxes_outside_are_told_from_those_that_overhang_and_from_rounding() -> None:
    table = table_of(
        *GOOD,
        (1, 0, [100, 10, 120, 30]),
        (1, 0, [90, 10, 120, 30]),
        (1, 0, [-1, 10, 100.9, 30]),
        (1, 0, [-1.5, 10, 50, 30]),
    )
    (outside,) = found(table, "box-outside")
    assert outside.annotation_id == 503
    assert outside.message == "x1 y1 x2 y2 = 100 10 120 30, image 100x80"
    assert [one.annotation_id for one in found(table, "box-overhang")] == [504, 506]


def many_boxes() -> np.ndarray[Any, np.dtype[np.float64]]:
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, 60, (40, 2))
    return np.concatenate([corners, corners + rng.uniform(5, 20, (40, 2))], axis=1)


def test_width_and_height_taken_for_a_corner_are_seen_over_the_data_set() -> None:
    xyxy = many_boxes()
    as_xywh = np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1)
    (finding,) = found(table_of(*((0, 0, box) for box in as_xywh.tolist())), "box-format")
    assert finding.message.startswith("the file's numbers were read as x1 y1 x2 y2, and ")
    assert finding.message.endswith("read as x y width height, 100% would")
    assert finding.annotation_id is None


def test_a_corner_taken_for_width_and_height_is_seen_over_the_data_set() -> None:
    xyxy = many_boxes()
    too_far = np.concatenate([xyxy[:, :2], xyxy[:, :2] + xyxy[:, 2:]], axis=1)
    (finding,) = found(table_of(*((0, 0, box) for box in too_far.tolist())), "box-format")
    assert finding.message.startswith("the file's numbers were read as x y width height, and ")
    assert finding.message.endswith("read as x1 y1 x2 y2, 100% would")


def test_fractions_of_the_image_are_seen_over_the_data_set() -> None:
    fractions = many_boxes() / 100
    (finding,) = found(table_of(*((0, 0, box) for box in fractions.tolist())), "box-format")
    assert "fractions of the image's width and height" in finding.message


def test_right_boxes_are_never_taken_for_another_format() -> None:
    rows: list[Row] = [(0, 0, box) for box in many_boxes().tolist()]
    assert not found(table_of(*rows), "box-format")
    assert not found(table_of(*rows[:30], *[(1, 0, [5.0, 5.0, 5.0, 5.0])] * 10), "box-format")


def test_unknown_and_unused_categories_are_found() -> None:
    table = table_of((0, 0, [10, 10, 40, 40]), (1, -1, [20, 20, 90, 70]))
    (unknown,) = found(table, "category-unknown")
    assert (unknown.annotation_id, unknown.severity) == (502, "error")
    (unused,) = found(table, "category-unused")
    assert (unused.message, unused.severity) == ("dog", "warning")


def test_a_class_of_crowds_alone_is_unused() -> None:
    assert [one.message for one in found(table_of(*GOOD, crowd=(1,)), "category-unused")] == ["dog"]


def test_an_object_annotated_twice_is_found_and_other_classes_and_images_are_not() -> None:
    table = table_of(
        (0, 0, [10, 10, 40, 40]),
        (0, 1, [10, 10, 40, 40]),
        (0, 0, [10, 10, 40, 40.1]),
        (0, 0, [10, 10, 40, 40]),
        (0, 0, [10, 10, 40, 41]),
        (1, 0, [10, 10, 40, 40]),
    )
    nearly, exactly = found(table, "box-duplicate")
    assert (nearly.annotation_id, exactly.annotation_id) == (503, 504)
    assert nearly.message == "almost the box (IoU 0.997) of annotation 501: 10 10 40 40.1"
    assert exactly.message.startswith("almost the box (IoU 0.997) of annotation 503")


def test_duplicates_are_those_that_comparing_all_pairs_finds() -> None:
    rng = np.random.default_rng(2)
    places = rng.integers(0, 4, (300, 2)) * 10.0
    boxes = np.concatenate([places, places + 30], axis=1) + rng.choice([0, 0.02, 0.5], (300, 1))
    images = np.sort(rng.integers(0, 2, 300))
    labels = rng.integers(0, 2, 300)
    table = table_of(*zip(images.tolist(), labels.tolist(), boxes.tolist(), strict=True))
    wanted = set()
    for later in range(300):
        for first in range(later):
            if (images[first], labels[first]) == (images[later], labels[later]):
                shared = (30 - np.abs(boxes[first, :2] - boxes[later, :2])).clip(min=0).prod()
                if shared / (1800 - shared) > 0.99:
                    wanted.add(501 + later)
    assert {one.annotation_id for one in found(table, "box-duplicate")} == wanted
    assert len(wanted) > 100


def test_ids_given_twice_are_found() -> None:
    table = table_of(*GOOD, annotation_ids=np.array([7, 7]), image_ids=np.array([4, 4]))
    (annotation,) = found(table, "annotation-id-duplicate")
    assert str(annotation) == "b.png, image 4, annotation 7: the id of an annotation of a.png, too"
    (image,) = found(table, "image-id-duplicate")
    assert image.message == "the id of image 4, a.png, too"


def test_places_in_the_image_are_no_ids_given_twice() -> None:
    table = table_of(*GOOD, (1, 0, [1, 1, 9, 9]), annotation_ids=np.array([0, 0, 1]))
    assert not found(table, "annotation-id-duplicate")


def test_a_file_listed_twice_is_found() -> None:
    (finding,) = found(table_of(*GOOD, files=("a.png", "a.png")), "image-file-duplicate")
    assert str(finding) == "a.png, image 12: the file of image 11, a.png, too"


def test_images_without_boxes_and_with_crowds_alone_are_notes() -> None:
    report = check_dataset(
        table_of(*GOOD, files=("a.png", "b.png", "c.png"), crowd=(0,)), images="none"
    )
    assert report.ok
    assert report.counts == {"category-unused": 1, "image-empty": 1, "image-only-crowds": 1}
    assert [one.file for one in report.findings[1:]] == ["c.png", "a.png"]


def test_classes_and_sizes_are_counted_without_crowds() -> None:
    table = table_of(
        (0, 0, [0, 0, 10, 20]),
        (0, 0, [20, 0, 30, 10]),
        (0, 1, [0, 0, 100, 80]),
        (1, 1, [0, 0, 32, 32]),
        (1, 1, [0, 0, 100, 80]),
        crowd=(4,),
        areas=np.array([200, 100, 9217, 1024, 8000.0]),
    )
    report = check_dataset(table, images="none")
    assert report.classes == (("cat", 2, 1), ("dog", 2, 2))
    sizes = report.box_sizes
    assert (sizes.small, sizes.medium, sizes.large) == (2, 1, 1)
    assert sizes.sides[0] == 10
    assert sizes.aspect_ratios[-1] == 2
    assert report.num_crowds == 1


def test_the_print_counts_first_shows_three_of_a_kind_and_says_how_many_more() -> None:
    rows: list[Row] = [(1, 0, [30, 20 + i, 30, 50]) for i in range(5)]
    lines = str(check_dataset(table_of(*GOOD, *rows), images="none")).splitlines()
    assert lines[:2] == [
        "cells.json: 2 images, 7 boxes, 2 classes",
        "  error    box-no-area        5",
    ]
    assert lines[3].startswith("ERROR box-no-area (5): no width or no height")
    assert lines[7] == "  and 2 more"


def test_a_long_table_of_classes_is_cut_in_the_middle() -> None:
    names = tuple(f"class {i}" for i in range(30))
    table = table_of(*GOOD, class_names=names, category_ids=tuple(range(30)))
    text = str(check_dataset(table, images="none"))
    assert "(15 classes between)" in text
    assert "class 9\n" in text
    assert "class 20\n" not in text
    assert "class 29\n" in text


def test_the_json_holds_every_finding_and_reads_back() -> None:
    table = table_of(*GOOD, (1, 0, [math.nan, 20, 30, 50]), (1, 0, [3, 20, 3, 50]))
    values = json.loads(check_dataset(table, images="none").to_json())
    assert not values["ok"]
    assert values["counts"] == {"box-not-finite": 1, "box-no-area": 1}
    assert values["findings"][1] == {
        "severity": "error",
        "kind": "box-no-area",
        "message": "x1 y1 x2 y2 = 3 20 3 50, width 0, height 30",
        "file": "b.png",
        "image_id": 12,
        "annotation_id": 504,
    }


def test_findings_come_in_the_order_of_their_kinds() -> None:
    table = table_of((0, 0, [3, 20, 3, 50]), (0, -1, [3, 20, 8, 50]), (0, 0, [200, 1, 300, 5]))
    report: DatasetReport = check_dataset(table, images="none")
    kinds = list(KINDS)
    places = [kinds.index(one.kind) for one in report.findings]
    assert places == sorted(places)
    assert [KINDS[kind].severity for kind in report.counts] == [
        *("error", "error", "error"),
        *("warning", "note"),
    ]


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ValueError, match="`images` must be one of 'decode', 'headers', 'none'"):
        check_dataset(table_of(*GOOD), images="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`workers` must be >= 1; got 0"):
        check_dataset(table_of(*GOOD), workers=0)
