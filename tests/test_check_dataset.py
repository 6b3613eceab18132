from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from focaldet.datasets.checks import KINDS, check_dataset
from tests.helpers.annotation_tables import GOOD_ROWS, Row, findings_of, table_of_rows


def test_a_box_without_area_is_an_error_with_its_ids() -> None:
    table = table_of_rows(*GOOD_ROWS, (1, 0, [30, 20, 30, 50]), (1, 0, [9, 60, 5, 50]))
    flat, reversed_ = findings_of(table, "box-no-area")
    assert (flat.file, flat.image_id, flat.annotation_id) == ("b.png", 12, 503)
    assert flat.severity == "error"
    assert str(flat) == (
        "b.png, image 12, annotation 503: x1 y1 x2 y2 = 30 20 30 50, width 0, height 30"
    )
    assert reversed_.message.endswith("width -4, height -10")
    assert not check_dataset(table, images="none").ok


def test_nan_and_infinity_are_found_once_each() -> None:
    table = table_of_rows(*GOOD_ROWS, (1, 0, [math.nan, 0, 5, 5]), (1, 0, [0, 0, math.inf, 5]))
    report = check_dataset(table, images="none")
    assert report.counts == {"box-not-finite": 2}
    assert report.findings[0].message == "x1 y1 x2 y2 = nan 0 5 5"


def test_boxes_outside_are_distinguished_from_overhanging_boxes_and_rounding() -> None:
    table = table_of_rows(
        *GOOD_ROWS,
        (1, 0, [100, 10, 120, 30]),
        (1, 0, [90, 10, 120, 30]),
        (1, 0, [-1, 10, 100.9, 30]),
        (1, 0, [-1.5, 10, 50, 30]),
    )
    (outside,) = findings_of(table, "box-outside")
    assert outside.annotation_id == 503
    assert outside.message == "x1 y1 x2 y2 = 100 10 120 30, image 100x80"
    assert [one.annotation_id for one in findings_of(table, "box-overhang")] == [504, 506]


def many_boxes() -> np.ndarray[Any, np.dtype[np.float64]]:
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, 60, (40, 2))
    return np.concatenate([corners, corners + rng.uniform(5, 20, (40, 2))], axis=1)


def test_width_and_height_read_as_a_corner_are_noticed() -> None:
    xyxy = many_boxes()
    as_xywh = np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], axis=1)
    (finding,) = findings_of(
        table_of_rows(*((0, 0, box) for box in as_xywh.tolist())), "box-format"
    )
    assert finding.message.startswith("the numbers in the file were read as x1 y1 x2 y2, and ")
    assert finding.message.endswith("read as x y width height, 100% would fit")
    assert finding.annotation_id is None


def test_a_corner_read_as_width_and_height_is_noticed() -> None:
    xyxy = many_boxes()
    too_far = np.concatenate([xyxy[:, :2], xyxy[:, :2] + xyxy[:, 2:]], axis=1)
    (finding,) = findings_of(
        table_of_rows(*((0, 0, box) for box in too_far.tolist())), "box-format"
    )
    assert finding.message.startswith("the numbers in the file were read as x y width height, and ")
    assert finding.message.endswith("read as x1 y1 x2 y2, 100% would fit")


def test_fractions_of_the_image_size_are_noticed() -> None:
    fractions = many_boxes() / 100
    (finding,) = findings_of(
        table_of_rows(*((0, 0, box) for box in fractions.tolist())), "box-format"
    )
    assert "fractions of the image width and height" in finding.message


def test_boxes_in_the_right_format_are_not_suspected() -> None:
    rows: list[Row] = [(0, 0, box) for box in many_boxes().tolist()]
    assert not findings_of(table_of_rows(*rows), "box-format")
    assert not findings_of(
        table_of_rows(*rows[:30], *[(1, 0, [5.0, 5.0, 5.0, 5.0])] * 10), "box-format"
    )


def test_unknown_and_unused_categories_are_found() -> None:
    table = table_of_rows((0, 0, [10, 10, 40, 40]), (1, -1, [20, 20, 90, 70]))
    (unknown,) = findings_of(table, "category-unknown")
    assert (unknown.annotation_id, unknown.severity) == (502, "error")
    (unused,) = findings_of(table, "category-unused")
    assert (unused.message, unused.severity) == ("dog", "warning")


def test_a_class_with_only_crowds_is_unused() -> None:
    assert [
        one.message for one in findings_of(table_of_rows(*GOOD_ROWS, crowd=(1,)), "category-unused")
    ] == ["dog"]


def test_an_object_annotated_twice_is_found_within_its_class_and_image() -> None:
    table = table_of_rows(
        (0, 0, [10, 10, 40, 40]),
        (0, 1, [10, 10, 40, 40]),
        (0, 0, [10, 10, 40, 40.1]),
        (0, 0, [10, 10, 40, 40]),
        (0, 0, [10, 10, 40, 41]),
        (1, 0, [10, 10, 40, 40]),
    )
    nearly, exactly = findings_of(table, "box-duplicate")
    assert (nearly.annotation_id, exactly.annotation_id) == (503, 504)
    assert nearly.message == "almost the same box (IoU 0.997) as annotation 501: 10 10 40 40.1"
    assert exactly.message.startswith("almost the same box (IoU 0.997) as annotation 503")


def test_duplicates_are_the_same_as_from_comparing_all_pairs() -> None:
    rng = np.random.default_rng(2)
    places = rng.integers(0, 4, (300, 2)) * 10.0
    boxes = np.concatenate([places, places + 30], axis=1) + rng.choice([0, 0.02, 0.5], (300, 1))
    images = np.sort(rng.integers(0, 2, 300))
    labels = rng.integers(0, 2, 300)
    table = table_of_rows(*zip(images.tolist(), labels.tolist(), boxes.tolist(), strict=True))
    wanted = set()
    for later in range(300):
        for first in range(later):
            if (images[first], labels[first]) == (images[later], labels[later]):
                shared = (30 - np.abs(boxes[first, :2] - boxes[later, :2])).clip(min=0).prod()
                if shared / (1800 - shared) > 0.99:
                    wanted.add(501 + later)
    assert {one.annotation_id for one in findings_of(table, "box-duplicate")} == wanted
    assert len(wanted) > 100


def test_duplicate_ids_are_found() -> None:
    table = table_of_rows(*GOOD_ROWS, annotation_ids=np.array([7, 7]), image_ids=np.array([4, 4]))
    (annotation,) = findings_of(table, "annotation-id-duplicate")
    assert str(annotation) == "b.png, image 4, annotation 7: same id as an annotation of a.png"
    (image,) = findings_of(table, "image-id-duplicate")
    assert image.message == "same id as image 4 (a.png)"


def test_positions_within_images_are_not_duplicate_ids() -> None:
    table = table_of_rows(*GOOD_ROWS, (1, 0, [1, 1, 9, 9]), annotation_ids=np.array([0, 0, 1]))
    assert not findings_of(table, "annotation-id-duplicate")


def test_a_file_listed_twice_is_found() -> None:
    (finding,) = findings_of(
        table_of_rows(*GOOD_ROWS, files=("a.png", "a.png")), "image-file-duplicate"
    )
    assert str(finding) == "a.png, image 12: same file as image 11 (a.png)"


def test_images_without_boxes_or_with_only_crowds_are_notes() -> None:
    report = check_dataset(
        table_of_rows(*GOOD_ROWS, files=("a.png", "b.png", "c.png"), crowd=(0,)), images="none"
    )
    assert report.ok
    assert report.counts == {"category-unused": 1, "image-empty": 1, "image-only-crowds": 1}
    assert [one.file for one in report.findings[1:]] == ["c.png", "a.png"]


def test_classes_and_sizes_are_counted_without_crowds() -> None:
    table = table_of_rows(
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


def test_the_report_starts_with_counts_and_shows_three_findings_per_kind() -> None:
    rows: list[Row] = [(1, 0, [30, 20 + i, 30, 50]) for i in range(5)]
    lines = str(check_dataset(table_of_rows(*GOOD_ROWS, *rows), images="none")).splitlines()
    assert lines[:2] == [
        "cells.json: 2 images, 7 boxes, 2 classes",
        "  error    box-no-area        5",
    ]
    assert lines[3].startswith("ERROR box-no-area (5): the box has no width or no height")
    assert lines[7] == "  and 2 more"


def test_a_long_table_of_classes_is_shortened_in_the_middle() -> None:
    names = tuple(f"class {i}" for i in range(30))
    table = table_of_rows(*GOOD_ROWS, class_names=names, category_ids=tuple(range(30)))
    text = str(check_dataset(table, images="none"))
    assert "(15 more classes)" in text
    assert "class 9\n" in text
    assert "class 20\n" not in text
    assert "class 29\n" in text


def test_the_json_contains_every_finding() -> None:
    table = table_of_rows(*GOOD_ROWS, (1, 0, [math.nan, 20, 30, 50]), (1, 0, [3, 20, 3, 50]))
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


def test_findings_are_in_the_order_of_their_kinds() -> None:
    table = table_of_rows((0, 0, [3, 20, 3, 50]), (0, -1, [3, 20, 8, 50]), (0, 0, [200, 1, 300, 5]))
    report = check_dataset(table, images="none")
    kinds = list(KINDS)
    places = [kinds.index(one.kind) for one in report.findings]
    assert places == sorted(places)
    assert [KINDS[kind].severity for kind in report.counts] == [
        *("error", "error", "error", "error"),
        *("warning", "note"),
    ]


def test_wrong_options_are_errors() -> None:
    with pytest.raises(ValueError, match="images 'all'.*'decode', 'headers' or 'none'"):
        check_dataset(table_of_rows(*GOOD_ROWS), images="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="workers.*1.*0"):
        check_dataset(table_of_rows(*GOOD_ROWS), workers=0)
