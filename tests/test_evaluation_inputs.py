"""What evaluate_coco says of annotations and results that are not as they must be."""

from __future__ import annotations

import copy
import json
import math
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from focaldet import Detections
from focaldet.evaluation import evaluate_coco
from tests.test_evaluation import found, truth

if TYPE_CHECKING:
    from pathlib import Path

OBJECTS = ((4, 7, [10, 10, 40, 40]), (9, 30, [20, 20, 50, 50]))
ENTRY = {"image_id": 4, "category_id": 7, "bbox": [10, 10, 40, 40], "score": 0.9}


def test_wrong_results_are_named() -> None:
    box = found([[1, 1, 5, 5]], [0.5], [2])
    with pytest.raises(ValueError, match=r"`labels` must be below .*\(2\); got 2 in image 4"):
        evaluate_coco(truth(), {4: box})
    with pytest.raises(
        ValueError, match=r"`labels` must be below .*`category_ids` \(1\); got 2 in"
    ):
        evaluate_coco(truth(), {4: box}, category_ids=[7])
    with pytest.raises(
        ValueError, match=r"`results` must be of images in the annotations; .*\[5\]"
    ):
        evaluate_coco(truth(), {5: found([[1, 1, 5, 5]], [0.5], [0])})
    with pytest.raises(
        ValueError, match=r"`results` must be of images in the annotations; .*\[5\]"
    ):
        evaluate_coco(truth(), {5: found([], [], [])})
    with pytest.raises(ValueError, match=r"ids \[100, 101, 102, 103, 104\] and 3 more\."):
        evaluate_coco(truth(), [{**ENTRY, "image_id": 100 + i % 8} for i in range(20)])
    with pytest.raises(ValueError, match=r"`category_ids` must be of categories in the .*\[8\]"):
        evaluate_coco(truth(), {}, category_ids=[7, 8])
    with pytest.raises(
        ValueError, match=r"`image_ids` must be of images in the annotations.*\[8\]"
    ):
        evaluate_coco(truth(), [], image_ids=[4, 8])


def test_detections_turned_inside_out_are_named() -> None:
    turned = found([[1, 1, 5, 5], [9, 3, 5, 5]], [0.5, 0.4], [0, 0])
    with pytest.raises(
        ValueError, match=r"`boxes` must be of width and height >= 0; got .* image 9"
    ):
        evaluate_coco(truth(), {9: turned})


def test_results_of_another_type_are_named() -> None:
    with pytest.raises(
        TypeError, match=r"`results` must be Detections by image id; got list for i"
    ):
        evaluate_coco(truth(), {4: [ENTRY]})  # type: ignore[dict-item]
    with pytest.raises(
        TypeError, match=r"`results` must be keyed by integer image ids; got 'a.jpg'"
    ):
        evaluate_coco(truth(), {"a.jpg": found([], [], [])})  # type: ignore[dict-item]
    with pytest.raises(
        ValueError, match=r"`results` must be a list of entries, .*; got int in the"
    ):
        evaluate_coco(truth(), 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 8}, r"`results` must be of categories in the annotations; got ids \[8\]"),
        ({"image_id": 5}, r"`results` must be of images in the annotations; got ids \[5\]"),
        ({"image_id": "4"}, r"`image_id` must be an integer; got '4' in entry number 1 of"),
        ({"image_id": 4.0}, r"`image_id` must be an integer; got 4\.0 in entry number 1 of"),
        ({"image_id": 2**63}, r"`image_id` must be an integer; got 9223372036854775808 in entry"),
        ({"category_id": None}, r"`category_id` must be an integer; got None in entry number 1 of"),
        ({"score": math.nan}, r"`score` must be a finite number; got nan in entry number 1 of"),
        ({"score": math.inf}, r"`score` must be a finite number; got inf in entry number 1 of"),
        ({"score": "0.5"}, r"`score` must be a finite number; got '0.5' in entry number 1 of"),
        (
            {"bbox": [1, 1, 5]},
            r"`bbox` must be x, y, width and height .*; got \[1, 1, 5\] in entry",
        ),
        (
            {"bbox": [1, 1, -5, 5]},
            r"`bbox` must .* not negative; got \[1, 1, -5, 5\] in entry numb",
        ),
        ({"bbox": [1, 1, math.nan, 5]}, r"`bbox` must be .* finite numbers, .*nan, 5\] in entry n"),
        ({"bbox": "1 1 5 5"}, r"`bbox` must be .*; got '1 1 5 5' in entry number 1 of"),
    ],
)
def test_a_wrong_value_in_results_is_named_with_its_entry(
    change: dict[str, Any], message: str, in_file: bool, tmp_path: Path
) -> None:
    entries: Any = [ENTRY, {**ENTRY, **change}]
    if in_file:
        path = tmp_path / "results.json"
        path.write_text(json.dumps(entries))
        entries = path
    if "entry number 1" in message:
        message += r".* results\.json\." if in_file else r".* the results\."
    with pytest.raises(ValueError, match=message):
        evaluate_coco(truth(*OBJECTS), entries)


def test_results_without_a_value_are_named() -> None:
    no_box = {key: value for key, value in ENTRY.items() if key != "bbox"}
    with pytest.raises(
        ValueError, match=r"`bbox` must be in every entry; got none in entry number 1"
    ):
        evaluate_coco(truth(), [ENTRY, no_box])
    with pytest.raises(
        ValueError, match=r"`entry` must be an object with named values; got 5 as num"
    ):
        evaluate_coco(truth(), [ENTRY, 5])  # type: ignore[list-item]


@pytest.mark.parametrize("with_msgspec", [True, False])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", r"`results` must be a JSON file; got .*r\.json \(Expecting property name"),
        ("", r"`results` must be a JSON file; got .*r\.json \(Expecting value"),
        ('{"annotations": []}', r"`results` must be a list of entries, .*; got dict in r\.json\."),
        ('"text"', r"`results` must be a list of entries, .*; got str in r\.json\."),
    ],
)
def test_a_file_that_is_no_results_file_is_named(
    text: str,
    message: str,
    with_msgspec: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not with_msgspec:
        monkeypatch.setitem(sys.modules, "msgspec", None)
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        evaluate_coco(truth(), path)


def test_a_file_that_is_not_text_or_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(b"\x89PNG\xff\x00")
    with pytest.raises(ValueError, match=r"`results` must be a JSON file; got .*r\.json \('utf-8'"):
        evaluate_coco(truth(), path)
    with pytest.raises(ValueError, match=r"`annotations` must be a JSON file; got .*r\.json"):
        evaluate_coco(path, [])
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        evaluate_coco(truth(), tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        evaluate_coco(tmp_path / "none.json", [])


def test_a_results_file_is_read_the_same_without_msgspec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("msgspec")
    entries = [
        {**ENTRY, "segmentation": [[1, 2, 3]]},
        {
            **ENTRY,
            "image_id": 9,
            "category_id": 30,
            "bbox": [19.123456789, 20, 50, 52.5],
            "score": 1,
        },
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(entries))
    with_it = evaluate_coco(truth(*OBJECTS), path)
    monkeypatch.setitem(sys.modules, "msgspec", None)
    without_it = evaluate_coco(truth(*OBJECTS), path)
    assert with_it.stats == without_it.stats
    assert 0.8 < with_it.ap < 1


def test_an_empty_results_file_found_nothing(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("[]")
    assert evaluate_coco(truth(*OBJECTS), path).ap == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"bbox": [1, 1, -5, 5]},
            r"`bbox` must be .*; got \[1, 1, -5, 5\] in annotation 2 of the a",
        ),
        (
            {"area": math.nan},
            r"`area` must be a finite number; got nan in annotation 2 of the annot",
        ),
        ({"image_id": 5}, r"`image_id` must be one of the images' ids; got 5 in annotation 2 of"),
        ({"category_id": 8}, r"`category_id` must be one of the categories' ids; got 8 in annotat"),
    ],
)
def test_a_wrong_annotation_is_named_by_its_id(change: dict[str, Any], message: str) -> None:
    annotations = copy.deepcopy(truth(*OBJECTS))
    annotations["annotations"][1].update(change)
    with pytest.raises(ValueError, match=message):
        evaluate_coco(annotations, [])


def test_annotations_that_are_not_in_cocos_form_are_named(tmp_path: Path) -> None:
    for key in ("images", "annotations", "categories"):
        with pytest.raises(
            ValueError, match=rf"`annotations` must be .* without a list of {key}\. A"
        ):
            evaluate_coco({**truth(), key: None}, [])
    path = tmp_path / "results.json"
    path.write_text(json.dumps([ENTRY]))
    with pytest.raises(ValueError, match=r"in COCO's form; got list .* is the second argument\."):
        evaluate_coco(path, [])
    twice = {**truth(), "categories": [{"id": 7, "name": "cat"}, {"id": 7, "name": "dog"}]}
    with pytest.raises(
        ValueError, match=r"`id` must be each category's own; got 7 twice in the ann"
    ):
        evaluate_coco(twice, [])
    with pytest.raises(
        ValueError, match=r"`id` must be in every image; got none in image number 0"
    ):
        evaluate_coco({**truth(), "images": [{"file_name": "a.jpg"}]}, [])


def test_area_and_iscrowd_may_be_absent_and_names_too() -> None:
    annotations = truth(*OBJECTS)
    bare = {
        "images": [{"id": 4}, {"id": 9}],
        "categories": [{"id": 30}, {"id": 7}],
        "annotations": [
            {key: row[key] for key in ("id", "image_id", "category_id", "bbox")}
            for row in annotations["annotations"]
        ],
    }
    bare_result = evaluate_coco(bare, [ENTRY])
    assert bare_result.stats == evaluate_coco(annotations, [ENTRY]).stats
    assert [one.name for one in bare_result.classes] == ["7", "30"]


@pytest.mark.parametrize("ids", [(0, 1), (5, 5)])
def test_annotation_ids_of_0_or_given_twice_change_nothing(ids: tuple[int, int]) -> None:
    annotations = truth(*OBJECTS)
    for annotation, one in zip(annotations["annotations"], ids, strict=True):
        annotation["id"] = one
    other = {**ENTRY, "image_id": 9, "category_id": 30, "bbox": [20, 20, 50, 50]}
    assert evaluate_coco(annotations, [ENTRY, other]).ap == pytest.approx(1)


def named(names: tuple[str, ...]) -> Detections:
    return Detections(
        torch.tensor([[10.0, 10, 50, 50]]),
        torch.tensor([0.9]),
        torch.tensor([0]),
        (100, 100),
        class_names=names,
    )


def test_class_names_in_another_order_than_the_categories_are_told() -> None:
    annotations = truth((4, 7, [10, 10, 40, 40]))
    assert evaluate_coco(annotations, {4: named(("cat", "dog"))}).ap == pytest.approx(1)
    assert evaluate_coco(annotations, {4: named(("Felis", "Canis"))}).ap == pytest.approx(1)
    with pytest.raises(
        ValueError,
        match=r"`class_names` must be in the order of the category ids; got label 0, 'dog', where "
        r"category 7 is 'cat'\. Pass category_ids=\[30, 7\]\.",
    ):
        evaluate_coco(annotations, {4: named(("dog", "cat"))})
    with pytest.raises(ValueError, match=r"got label 1, 'cat', .*Say with `category_ids` which"):
        evaluate_coco(annotations, {4: named(("cow", "cat"))})
    given = evaluate_coco(annotations, {4: named(("dog", "cat"))}, category_ids=[30, 7])
    assert given.ap == 0


def test_detections_of_images_of_another_size_are_warned_of() -> None:
    resized = Detections(
        torch.tensor([[10.0, 10, 50, 50]]), torch.tensor([0.9]), torch.tensor([0]), (800, 1066)
    )
    with pytest.warns(UserWarning, match=r"1 images are .*image 4: 800x1066 against 100x100"):
        evaluate_coco(truth(*OBJECTS), {4: resized})
