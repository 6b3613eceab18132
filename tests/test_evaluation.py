from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from focaldet import Detections
from focaldet.evaluation import evaluate_coco
from tests.conftest import SHARED

if TYPE_CHECKING:
    from pathlib import Path

IMAGES = [{"id": 4, "height": 100, "width": 100}, {"id": 9, "height": 100, "width": 100}]
CATEGORIES = [{"id": 30, "name": "dog"}, {"id": 7, "name": "cat"}]


def truth(*boxes: tuple[int, int, list[float]]) -> dict[str, Any]:
    annotations = [
        {
            "id": i + 1,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for i, (image, category, box) in enumerate(boxes)
    ]
    return {"images": IMAGES, "annotations": annotations, "categories": CATEGORIES}


def found(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(scores),
        torch.tensor(labels, dtype=torch.int64),
        (100, 100),
    )


def test_labels_are_positions_among_ascending_category_ids(tmp_path: Path) -> None:
    annotations = truth((4, 7, [10, 10, 40, 40]), (9, 30, [20, 20, 50, 50]))
    results = {4: found([[10, 10, 50, 50]], [0.9], [0]), 9: found([[20, 20, 70, 70]], [0.8], [1])}
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(annotations))
    assert evaluate_coco(path, results).ap == pytest.approx(1)
    swapped = {4: found([[10, 10, 50, 50]], [0.9], [1]), 9: results[9]}
    assert evaluate_coco(annotations, swapped).ap == pytest.approx(0.25)  # a false one comes first


def test_nothing_found_is_0_and_no_objects_are_a_dash() -> None:
    result = evaluate_coco(truth((4, 7, [10, 10, 40, 40])), {4: found([], [], [])})
    assert result.ap == 0
    assert str(result).startswith("AP 0.000  AP50 0.000  AP75 0.000  AP small -  AP medium 0.000")
    assert evaluate_coco(truth(), {}).stats == (-1,) * 12


def test_the_callers_annotations_stay_as_they_are() -> None:
    annotations = truth((4, 7, [10, 10, 40, 40]))
    before = json.dumps(annotations)
    evaluate_coco(annotations, {4: found([[1, 1, 5, 5]], [0.5], [0])})
    assert json.dumps(annotations) == before


def test_it_prints_nothing_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_coco(truth((4, 7, [10, 10, 40, 40])), {4: found([[1, 1, 5, 5]], [0.5], [0])})
    assert capsys.readouterr().out == ""


def test_wrong_results_are_named() -> None:
    box = found([[1, 1, 5, 5]], [0.5], [2])
    with pytest.raises(ValueError, match=r"`labels` must be below .*\(2\); got 2 in image 4"):
        evaluate_coco(truth(), {4: box})
    with pytest.raises(
        ValueError, match=r"`results` must be of images in the annotations; .*\[5\]"
    ):
        evaluate_coco(truth(), {5: found([[1, 1, 5, 5]], [0.5], [0])})


@pytest.mark.parity
def test_the_published_numbers_of_cocos_demo_come_out() -> None:
    folder = SHARED / "data" / "oracles" / "coco_demo"
    if not folder.is_dir():
        pytest.skip("the demo of COCO's evaluation is not beside this checkout")
    annotations = folder / "instances_val2014_100.json"
    results = folder / "instances_val2014_fakebbox100_results.json"
    result = evaluate_coco(annotations, json.loads(results.read_text()))
    expected = [0.505, 0.697, 0.573, 0.586, 0.519, 0.501]
    expected += [0.387, 0.594, 0.595, 0.640, 0.566, 0.564]
    assert list(result.stats) == pytest.approx(expected, abs=6e-4)
