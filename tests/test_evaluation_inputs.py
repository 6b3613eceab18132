"""How evaluate_coco treats unusual and wrong annotations and results."""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from focaldet import Detections
from focaldet.datasets import read_coco
from focaldet.errors import AnnotationError
from focaldet.evaluation import evaluate_coco
from tests.helpers.coco_files import annotation, coco_content, coco_file
from tests.helpers.evaluation import found, truth

if TYPE_CHECKING:
    from pathlib import Path

OBJECTS = ((4, 7, [10, 10, 40, 40]), (9, 30, [20, 20, 50, 50]))
ENTRY = {"image_id": 4, "category_id": 7, "bbox": [10, 10, 40, 40], "score": 0.9}


def test_results_that_do_not_fit_the_annotations_are_an_error() -> None:
    box = found([[1, 1, 5, 5]], [0.5], [2])
    with pytest.raises(ValueError, match=r"results\[4\] has the label 2, .* only 2 categories"):
        evaluate_coco(truth(), {4: box})
    with pytest.raises(ValueError, match=r"label 2, but category_ids has only 1 category\."):
        evaluate_coco(truth(), {4: box}, category_ids=[7])
    for detections in (found([[1, 1, 5, 5]], [0.5], [0]), found([], [], [])):
        with pytest.raises(ValueError, match=r"results: image id 5 is not in the annotations"):
            evaluate_coco(truth(), {5: detections})
    with pytest.raises(ValueError, match=r"image ids 100, 101, 102, 103, 104 and 3 more are not"):
        evaluate_coco(truth(), [{**ENTRY, "image_id": 100 + i % 8} for i in range(20)])
    with pytest.raises(ValueError, match=r"category_ids: category id 8 is not in the annotations"):
        evaluate_coco(truth(), {}, category_ids=[7, 8])
    with pytest.raises(ValueError, match=r"image_ids: image ids 8, 11 are not in the annotations"):
        evaluate_coco(truth(), [], image_ids=[4, 8, 11])


def test_an_inverted_box_is_named_with_its_corners() -> None:
    inverted = found([[1, 1, 5, 5], [9, 3, 5, 5]], [0.5, 0.4], [0, 0])
    usual = found([[1, 1, 5, 5]], [0.5], [0])
    message = r"boxes\[1\] of results\[9\] has a negative width or height .*\[9.0, 3.0, 5.0, 5.0\]"
    with pytest.raises(ValueError, match=message):
        evaluate_coco(truth(), {4: usual, 9: inverted})


def test_arguments_of_unsupported_types_are_an_error() -> None:
    with pytest.raises(TypeError, match=r"results\[4\] must be a Detections, got list"):
        evaluate_coco(truth(), {4: [ENTRY]})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"keys of results must be integer .*'a\.jpg'"):
        evaluate_coco(truth(), {"a.jpg": found([], [], [])})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"results must be the path .*got int"):
        evaluate_coco(truth(), 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"annotations must be the path .*got list"):
        evaluate_coco([ENTRY], [])  # type: ignore[arg-type]


def test_a_table_is_evaluated_as_its_file_is(tmp_path: Path) -> None:
    path = coco_file(tmp_path)
    results = [{"image_id": 10, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 0.5}]
    table = read_coco(path)
    assert evaluate_coco(table, results).stats == evaluate_coco(path, results).stats
    assert evaluate_coco(table, results).num_images == 2


def test_a_table_with_boxes_that_training_drops_is_evaluated_as_its_file_is(tmp_path: Path) -> None:
    boxes = ([1, 2, 0, 4], [5, 5, 0, 0], [1, 2, -3, 4], [math.nan, 2, 3, 4], [1, 2, 3, 4])
    rows = [annotation(i, 10, bbox=box) for i, box in enumerate(boxes, start=1)]
    path = coco_file(tmp_path, annotations=[*rows, annotation(6, 30, category_id=77)])
    results = [{"image_id": 10, "category_id": 9, "bbox": [1, 2, 3, 4], "score": 0.5}]
    table = read_coco(path)
    with pytest.warns(UserWarning, match="3 annotations are left out"):
        of_file = evaluate_coco(path, results)
    with pytest.warns(UserWarning, match="leaves out 3 of 6 annotations"):
        of_table = evaluate_coco(table, results)
    assert of_file.of_class("cat").objects == of_table.of_class("cat").objects == 3
    assert of_file.ap == of_table.ap == pytest.approx(0.337, abs=0.001)


def test_escape_sequences_of_names_never_reach_the_terminal(tmp_path: Path) -> None:
    odd = "\x1b[31m\n\u202e"
    surrogate = coco_content(categories=[{"id": 9, "name": "\ud800"}], annotations=[])
    assert r"\ud800" in evaluate_coco(surrogate, []).to_json().encode().decode()
    categories = [{"id": 9, "name": odd}, {"id": 2, "name": "dog"}]
    path = coco_file(tmp_path, categories=categories).rename(tmp_path / f"{odd}.json")
    result = evaluate_coco(path, [])
    assert all(line.isprintable() for line in result.table().splitlines())
    assert r"\x1b[31m\n\u202e " in result.table()
    box = found([[1, 1, 5, 5]], [0.5], [0])
    assert json.loads(result.to_json())["classes"][1]["name"] == odd
    swapped = replace(box, class_names=(odd, "dog"), image_size=(20, 30))
    wrong: list[tuple[Any, Any]] = [
        (path, {10: swapped}),
        (path, path),
        (path, tmp_path / odd),
        (path, {odd: box}),
        (path, {10: odd}),
        (path, [{**ENTRY, "image_id": odd}]),
        (path, [{"image_id": 10, odd: odd}, odd]),
        ({**coco_content(), "annotations": [{odd: odd, "id": odd}]}, []),
        ({**coco_content(), "images": [{"id": 1, "file_name": [odd]}]}, []),
        ({**coco_content(), "categories": [{"id": 1, "name": {odd: odd}}]}, []),
        ({**coco_content(), "categories": odd}, []),
        (tmp_path / f"{odd}.txt", []),
    ]
    (tmp_path / f"{odd}.txt").write_text(odd)
    for given, results in wrong:
        with pytest.raises((ValueError, TypeError, FileNotFoundError)) as raised:
            evaluate_coco(given, results)
        assert str(raised.value).isprintable(), raised.value
    with pytest.raises(ValueError, match="No category has the name") as raised:
        result.of_class(f"{odd}!")
    assert str(raised.value).isprintable()
    images = [*coco_content()["images"], coco_content()["images"][0]]
    content = coco_content(images=images, annotations=[annotation(1, 10, category_id=77)])
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.warns(UserWarning, match="left out|kept once") as caught:
        evaluate_coco(path, [])
    assert len(caught) == 2
    assert all(str(one.message).isprintable() for one in caught)


def test_detections_passed_as_annotations_are_an_error() -> None:
    with pytest.raises(TypeError, match=r"annotations must be .*AnnotationTable, got Detections"):
        evaluate_coco(found([], [], []), [])  # type: ignore[arg-type]


@pytest.mark.parametrize("area", [-1, -1.0, -300, math.nan, None])
def test_an_object_of_unknown_area_counts_with_the_area_of_its_box(
    tmp_path: Path, area: float | None
) -> None:
    content = truth((4, 7, [10, 10, 40, 40]))
    content["annotations"][0]["area"] = area
    for image in content["images"]:
        image["file_name"] = f"{image['id']}.png"
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    table = read_coco(path)
    assert table.areas.tolist() == [1600]
    unknown = replace(table, areas=np.full(1, np.nan if area is None else area))
    assert unknown.to_coco()["annotations"][0]["area"] == 1600
    for given in (content, path, table, unknown):
        assert evaluate_coco(given, [ENTRY]).ap_medium == pytest.approx(1)


@pytest.mark.parametrize("side", [-1, 0, None])
def test_an_unknown_size_of_an_image_is_compared_with_no_detections(side: int | None) -> None:
    content = copy.deepcopy(truth((4, 7, [10, 10, 40, 40])))
    for image in content["images"]:
        image["width"] = side
    box = found([[10, 10, 50, 50]], [0.9], [0])
    assert evaluate_coco(content, {4: box}).ap == pytest.approx(1)  # a warning would be an error


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (4, TypeError, r"image_ids must be a list of integer ids, got 4"),
        ("49", TypeError, r"image_ids must be a list of integer ids, got '49'"),
        (["4"], TypeError, r"image_ids must contain only integer ids, got '4'"),
        ([4.5], TypeError, r"image_ids must contain only integer ids, got 4.5"),
        ([True], TypeError, r"image_ids must contain only integer ids, got True"),
        ([10**30], ValueError, r"image_ids: the id 10+ does not fit into 64 bits"),
        ([10**5000], ValueError, r"image_ids: the id <int> does not fit into 64 bits"),
    ],
)
def test_wrong_image_ids_are_an_error_in_words(
    ids: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate_coco(truth(), [], image_ids=ids)


def test_wrong_category_ids_and_huge_keys_are_an_error_in_words() -> None:
    with pytest.raises(TypeError, match=r"category_ids must contain only integer ids, got 7.5"):
        evaluate_coco(truth(), {}, category_ids=[7.5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"category_ids: the id 10+ does not fit"):
        evaluate_coco(truth(), {}, category_ids=[10**30])
    with pytest.raises(ValueError, match=r"results: the id 10+ does not fit into 64 bits"):
        evaluate_coco(truth(), {10**30: found([], [], [])})


def test_ids_of_numpy_and_torch_are_accepted() -> None:
    ids: Any
    for ids in (np.array([4]), torch.tensor([4]), [np.int32(4)], iter([4]), {4: "x"}):
        assert evaluate_coco(truth(), [], image_ids=ids).num_images == 1


def test_huge_boxes_are_evaluated_without_a_warning() -> None:
    huge = [1e300, 1e300, 1e300, 1e300]
    content = truth((4, 7, huge), (9, 7, [1, 1, 5, 5]))
    del content["annotations"][0]["area"]
    result = evaluate_coco(content, [{**ENTRY, "bbox": huge}])
    assert result.of_class("cat").objects == 2


def test_values_that_python_cannot_print_are_named_by_their_type() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    content = truth((4, 7, [1, 1, 5, 5]))
    for value in (deep, 10**5000):
        content["annotations"][0]["bbox"] = value
        with pytest.raises(AnnotationError, match=r"annotations\[0\] \(id 1\).* got <(list|int)>"):
            evaluate_coco(content, [])
    content = copy.deepcopy(truth())
    content["categories"][0]["name"] = 10**5000
    with pytest.raises(AnnotationError, match=r"categories\[0\] \(id 30\).*got <int>"):
        evaluate_coco(content, [])


@pytest.mark.usefixtures("json_parser")
@pytest.mark.parametrize("in_file", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_id": 8}, r"results: category id 8 is not in the annotations"),
        ({"image_id": 5}, r"results: image id 5 is not in the annotations"),
        ({"image_id": "4"}, r"results\[1\].*: image_id must be an integer, got '4'"),
        ({"image_id": 4.5}, r"results\[1\].*: image_id must be an integer, got 4\.5"),
        ({"image_id": True}, r"results\[1\].*: image_id must be an integer, got True"),
        ({"image_id": 2**63}, r"results\[1\].*: image_id must fit into 64 bits, got 922337"),
        ({"category_id": None}, r"results\[1\].*: category_id is missing"),
        ({"score": math.nan}, r"results\[1\].*: score must be a finite number, got nan"),
        ({"score": math.inf}, r"results\[1\].*: score must be a finite number, got inf"),
        ({"score": "0.5"}, r"results\[1\].*: score must be a finite number, got '0\.5'"),
        ({"score": None}, r"results\[1\].*: score is missing"),
        ({"bbox": [1, 1, 5]}, r"results\[1\].*: bbox must be four numbers .*\[1, 1, 5\]"),
        ({"bbox": "1 1 5 5"}, r"results\[1\].*: bbox must be four numbers .*'1 1 5 5'"),
        ({"bbox": [1, 1, -5, 5]}, r"results\[1\].*: bbox must be finite .*at least 0.*-5"),
        ({"bbox": [1, 1, math.nan, 5]}, r"results\[1\].*: bbox must be finite .*nan"),
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
        message = message.replace(".*:", r" in '.*results\.json':", 1)
    with pytest.raises(ValueError, match=message):
        evaluate_coco(truth(*OBJECTS), entries)


@pytest.mark.usefixtures("json_parser")
def test_whole_floats_are_accepted_as_ids_in_results(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{**ENTRY, "image_id": 4.0, "category_id": 7.0}]))
    expected = evaluate_coco(truth(*OBJECTS), [ENTRY])
    assert evaluate_coco(truth(*OBJECTS), path).stats == expected.stats


def test_an_entry_without_a_field_is_named() -> None:
    no_box = {key: value for key, value in ENTRY.items() if key != "bbox"}
    with pytest.raises(AnnotationError, match=r"results\[1\]: bbox is missing"):
        evaluate_coco(truth(), [ENTRY, no_box])
    with pytest.raises(AnnotationError, match=r"results\[1\] must be an object .*got 5"):
        evaluate_coco(truth(), [ENTRY, 5])  # type: ignore[list-item]


@pytest.mark.usefixtures("json_parser")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{", r"r\.json': it is not valid JSON \(Expecting property name"),
        ("", r"r\.json': it is not valid JSON \(Expecting value"),
        ('{"annotations": []}', r"r\.json' is not a results file: .*got {'annotations': \[\]}"),
        ('"text"', r"r\.json' is not a results file: .*got 'text'"),
    ],
)
def test_a_file_that_is_not_a_results_file_is_named(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(AnnotationError, match=message):
        evaluate_coco(truth(), path)


def test_a_file_that_does_not_exist_is_named_with_its_argument(tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    with pytest.raises(FileNotFoundError, match=r"none\.json' \(results\)"):
        evaluate_coco(truth(), path)
    with pytest.raises(FileNotFoundError, match=r"none\.json' \(annotations\)"):
        evaluate_coco(path, [])


def test_results_files_give_the_same_numbers_without_msgspec(
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


def test_an_empty_results_file_has_no_detections(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text("[]")
    assert evaluate_coco(truth(*OBJECTS), path).ap == 0


def test_annotations_left_out_of_the_ground_truth_are_not_objects() -> None:
    annotations = copy.deepcopy(truth(*OBJECTS, (9, 7, [1, 1, 0, 0]), (9, 8, [1, 1, 5, 5])))
    annotations["annotations"][1]["bbox"] = [20, 20, -5, 50]
    message = r"2 annotations are left out .*annotations\[1\] \(id 2\), whose bbox .*-5"
    with pytest.warns(UserWarning, match=message) as caught:
        result = evaluate_coco(annotations, [ENTRY])
    assert caught[0].filename == __file__
    assert result.of_class("dog").objects == 0
    assert result.of_class("cat").objects == 2  # a box without size counts, as in pycocotools
    assert result.of_class("cat").ar100 == pytest.approx(0.5)


def test_optional_fields_may_be_missing() -> None:
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
def test_annotation_ids_do_not_change_the_result(ids: tuple[int, int]) -> None:
    annotations = truth(*OBJECTS)
    for row, one in zip(annotations["annotations"], ids, strict=True):
        row["id"] = one
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


def test_class_names_in_a_different_order_are_an_error() -> None:
    annotations = truth((4, 7, [10, 10, 40, 40]))
    assert evaluate_coco(annotations, {4: named(("cat", "dog"))}).ap == pytest.approx(1)
    assert evaluate_coco(annotations, {4: named(("Felis", "Canis"))}).ap == pytest.approx(1)
    message = r"label 0 is 'dog', but category 7 is 'cat'\. Pass category_ids=\[30, 7\]\."
    with pytest.raises(ValueError, match=message):
        evaluate_coco(annotations, {4: named(("dog", "cat"))})
    with pytest.raises(ValueError, match=r"label 1 is 'cat', .*Pass category_ids, the category id"):
        evaluate_coco(annotations, {4: named(("cow", "cat"))})
    given = evaluate_coco(annotations, {4: named(("dog", "cat"))}, category_ids=[30, 7])
    assert given.ap == 0


def test_detections_for_a_different_image_size_cause_a_warning() -> None:
    resized = Detections(
        torch.tensor([[10.0, 10, 50, 50]]), torch.tensor([0.9]), torch.tensor([0]), (800, 1066)
    )
    message = r"1 image differs .*image 4: .* 800x1066 .* 100x100\."
    with pytest.warns(UserWarning, match=message) as caught:
        evaluate_coco(truth(*OBJECTS), {4: resized})
    assert caught[0].filename == __file__
