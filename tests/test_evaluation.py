from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from focaldet.evaluation import CocoResult, evaluate_coco
from tests.helpers.evaluation import found, truth

if TYPE_CHECKING:
    from pathlib import Path


def one_found_of_two() -> CocoResult:
    """Find one of two cats, after a false positive with a higher score; there are no dogs."""
    annotations = truth((4, 7, [10, 10, 40, 40]), (9, 7, [20, 20, 50, 50]))
    results = {4: found([[10, 10, 50, 50], [60, 60, 90, 90]], [0.6, 0.8], [0, 0])}
    return evaluate_coco(annotations, results)


def test_labels_are_positions_among_ascending_category_ids(tmp_path: Path) -> None:
    annotations = truth((4, 7, [10, 10, 40, 40]), (9, 30, [20, 20, 50, 50]))
    results = {4: found([[10, 10, 50, 50]], [0.9], [0]), 9: found([[20, 20, 70, 70]], [0.8], [1])}
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(annotations))
    assert evaluate_coco(path, results).ap == pytest.approx(1)
    swapped = {4: found([[10, 10, 50, 50]], [0.9], [1]), 9: results[9]}
    assert evaluate_coco(annotations, swapped).ap == pytest.approx(
        0.25
    )  # a false positive has the higher score


def test_labels_can_be_given_other_categories() -> None:
    annotations = truth((4, 7, [10, 10, 40, 40]), (4, 30, [20, 20, 50, 50]))
    results = {4: found([[10, 10, 50, 50], [20, 20, 70, 70]], [0.9, 0.8], [1, 0])}
    assert evaluate_coco(annotations, results).ap == 0
    assert evaluate_coco(annotations, results, category_ids=[30, 7]).ap == pytest.approx(1)


def test_results_give_the_same_numbers_as_a_file_a_list_or_detections(tmp_path: Path) -> None:
    annotations = truth((4, 7, [10.3, 10, 40, 40]), (9, 30, [20, 20, 50, 50]))
    boxes: list[list[float]] = [[10.1, 10, 50.7, 50], [21, 22, 70, 70], [1.5, 2.3, 8.9, 9.7]]
    results = {
        4: found(boxes, [0.9, 0.8, 0.7], [0, 1, 1]),
        9: found(boxes, [0.5, 0.4, 0.3], [1, 1, 0]),
    }
    entries = [
        entry
        for image, detections in results.items()
        for entry in detections.to_coco(image, [7, 30])
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(entries))
    expected = evaluate_coco(annotations, results)
    assert 0 < expected.ap < 1
    for given in (entries, path, str(path)):
        got = evaluate_coco(annotations, given)
        assert got.stats == expected.stats
        assert_array_equal(got.precision, expected.precision)
        assert_array_equal(got.scores, expected.scores)


def test_every_image_counts_unless_image_ids_are_given() -> None:
    annotations = truth((4, 7, [10, 10, 40, 40]), (9, 7, [20, 20, 50, 50]))
    results = {4: found([[10, 10, 50, 50]], [0.9], [0])}
    everything = evaluate_coco(annotations, results)
    assert everything.ap == pytest.approx(51 / 101)  # recalls 0 to .5 of 0 to 1
    assert (everything.num_images, everything.of_class("cat").objects) == (2, 2)
    some = evaluate_coco(annotations, results, image_ids=[4])
    assert some.ap == pytest.approx(1)
    assert (some.num_images, some.of_class("cat").objects) == (1, 1)
    other = evaluate_coco(annotations, results, image_ids=iter([9]))
    assert (other.ap, other.of_class("cat").detections) == (0, 0)


def test_ap_is_0_without_detections_and_a_dash_without_objects() -> None:
    result = evaluate_coco(truth((4, 7, [10, 10, 40, 40])), {4: found([], [], [])})
    assert result.ap == 0
    assert str(result).startswith("AP 0.000  AP50 0.000  AP75 0.000  AP small -  AP medium 0.000")
    assert evaluate_coco(truth(), {}).stats == (-1,) * 12
    assert evaluate_coco(truth(), []).stats == (-1,) * 12


@pytest.mark.parametrize("missing", ["images", "categories"])
def test_without_images_or_categories_there_are_no_objects(missing: str) -> None:
    result = evaluate_coco({**truth(), missing: []}, [])
    assert set(result.stats) == {-1}
    assert result.num_images == (0 if missing == "images" else 2)
    assert len(result.classes) == (0 if missing == "categories" else 2)
    assert "all" in result.table()
    assert np.isnan(result.precision_recall().precision).all()


def test_a_class_is_selected_by_name_or_id() -> None:
    result = one_found_of_two()
    cat = result.of_class("cat")
    assert cat == result.of_class(7) == result.classes[0]
    assert (cat.id, cat.name, cat.objects, cat.detections) == (7, "cat", 2, 2)
    assert cat.ap == pytest.approx(51 / 101 / 2)  # precision is 0.5 up to recall 0.5
    assert cat.ap50 == pytest.approx(result.ap50)
    assert cat.ar100 == pytest.approx(0.5)
    dog = result.of_class(30)
    assert math.isnan(dog.ap)
    assert math.isnan(dog.ar100)
    assert dog.objects == 0
    assert result.ap_by_class == {"cat": cat.ap, "dog": pytest.approx(math.nan, nan_ok=True)}
    assert np.nanmean(list(result.ap_by_class.values())) == pytest.approx(result.ap)


def test_an_unknown_or_ambiguous_class_is_an_error() -> None:
    result = one_found_of_two()
    with pytest.raises(ValueError, match=r"name 'cow'. There are: 'cat', 'dog'\."):
        result.of_class("cow")
    with pytest.raises(ValueError, match=r"id 1\. There are: 7, 30\."):
        result.precision_recall(1)
    twins = {**truth(), "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]}
    with pytest.raises(ValueError, match=r"2 categories .*'cat'; choose one by its id: 1, 2\."):
        evaluate_coco(twins, []).of_class("cat")


def test_the_properties_are_the_twelve_numbers() -> None:
    result = one_found_of_two()
    assert (result.ap, result.ap50, result.ap75) == result.stats[:3]
    assert (result.ap_small, result.ap_medium, result.ap_large) == result.stats[3:6]
    assert result.ar100 == result.stats[8]
    assert repr(result).startswith("CocoResult(2 classes, 2 images: AP 0.252  AP50 0.252  ")


def test_the_table_has_a_row_for_each_class() -> None:
    assert one_found_of_two().table().splitlines() == [
        "class  objects  detections     AP   AP50   AP75  AR100",
        "cat          2           2  0.252  0.252  0.252  0.500",
        "dog          0           0      -      -      -      -",
        "all          2           2  0.252  0.252  0.252  0.500",
    ]


def test_json_has_null_where_there_are_no_objects() -> None:
    result = one_found_of_two()
    read = json.loads(result.to_json())
    assert read == result.to_dict()
    assert read["stats"]["AP"] == result.ap
    assert read["stats"]["AP small"] is None
    assert read["classes"][0]["name"] == "cat"
    assert read["classes"][1]["ap"] is None
    assert (read["backend"], read["num_images"]) == ("pycocotools", 2)


def test_a_precision_recall_curve_can_be_worked_by_hand() -> None:
    result = one_found_of_two()
    recall, precision, scores = result.precision_recall("cat")
    assert recall[:3].tolist() == pytest.approx([0, 0.01, 0.02])
    assert precision.tolist() == pytest.approx([0.5] * 51 + [0] * 50)
    assert scores.tolist() == pytest.approx([0.8] + [0.6] * 50 + [0] * 50)
    together = result.precision_recall(iou_threshold=0.95)
    assert together.precision.mean() == pytest.approx(51 / 101 / 2)
    assert np.isnan(together.scores).all()
    assert np.isnan(result.precision_recall("dog").precision).all()
    assert np.isnan(result.precision_recall("cat", area="small").precision).all()
    medium = result.precision_recall("cat", area="medium")  # the false positive, 30x30, is small
    assert medium.precision[0] == pytest.approx(1)


def test_curves_average_to_the_average_precision() -> None:
    annotations = truth((4, 7, [10, 10, 40, 40]), (9, 30, [20, 20, 50, 50]), (9, 7, [0, 0, 9, 9]))
    boxes: list[list[float]] = [[12, 10, 50, 50], [19, 22, 70, 70], [0, 0, 9, 10]]
    result = evaluate_coco(annotations, {9: found(boxes, [0.9, 0.8, 0.7], [0, 1, 0])})
    curves = [result.precision_recall(iou_threshold=0.5 + 0.05 * i) for i in range(10)]
    assert np.mean([curve.precision.mean() for curve in curves]) == pytest.approx(result.ap)
    assert curves[5].precision.mean() == pytest.approx(result.ap75)


def test_a_threshold_or_area_that_was_not_evaluated_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"iou_threshold 0\.4; choose 0\.5, 0\.55, .*0\.95"):
        one_found_of_two().precision_recall(iou_threshold=0.4)
    with pytest.raises(ValueError, match=r"area 'tiny'; choose 'all', .*'large'"):
        one_found_of_two().precision_recall(area="tiny")  # type: ignore[arg-type]


@pytest.mark.parametrize("category", [None, "cat", "dog"])
def test_the_curves_are_plotted(tmp_path: Path, category: str | None) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "curves.png"
    path.write_bytes(b"old content")
    figure = one_found_of_two().plot_precision_recall(path, category=category)
    [axes] = figure.axes
    assert len(axes.lines) == 10
    assert axes.get_title().startswith("Mean of classes" if category is None else category)
    with Image.open(path) as picture:
        assert picture.width > picture.height > 400
    assert list(tmp_path.iterdir()) == [path]


def test_a_plot_that_cannot_be_saved_leaves_the_old_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "curves.txt"
    path.write_bytes(b"old content")
    with pytest.raises(ValueError, match=r"curves\.txt'.*no format 'txt'.* png"):
        one_found_of_two().plot_precision_recall(path)
    assert path.read_bytes() == b"old content"
    with pytest.raises(FileNotFoundError, match=r"No such folder: '.*missing'"):
        one_found_of_two().plot_precision_recall(tmp_path / "missing" / "curves.png")


def test_plotting_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"requires matplotlib.*'focaldet\[plot\]'"):
        one_found_of_two().plot_precision_recall()


def test_the_callers_annotations_are_not_modified() -> None:
    annotations = truth((4, 7, [10, 10, 40, 40]))
    entries = found([[1, 1, 5, 5]], [0.5], [0]).to_coco(4, [7, 30])
    before = json.dumps([annotations, entries])
    evaluate_coco(annotations, entries)
    assert json.dumps([annotations, entries]) == before


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_coco(truth((4, 7, [10, 10, 40, 40])), {4: found([[1, 1, 5, 5]], [0.5], [0])})
    assert capsys.readouterr().out == ""
