"""The analysis of errors, the confusion matrix, the worst images, and the report."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from PIL import Image

from focaldet.cli import main
from focaldet.datasets import AnnotationTable, draw_errors, read_coco
from focaldet.evaluation import (
    CocoResult,
    ErrorAnalysis,
    analyse_errors,
    evaluate_coco,
    write_report,
)
from tests.helpers.evaluation import found, truth
from tests.helpers.shared import SHARED

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ORACLE = SHARED / "data" / "oracles" / "coco_demo"
CAT, DOG = 7, 30


def entry(image: int, category: int, box: Sequence[float], score: float) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": [*box], "score": score}


def one_of_each() -> ErrorAnalysis:
    """Analyse an error of each kind, a hit, and an object that is missed."""
    annotations = truth(
        (4, CAT, [0, 0, 20, 20]),
        (4, CAT, [40, 0, 20, 20]),
        (4, DOG, [0, 40, 20, 20]),
        (4, DOG, [40, 40, 20, 20]),
        (4, DOG, [70, 70, 20, 20]),
    )
    return analyse_errors(
        annotations,
        [
            entry(4, CAT, [0, 0, 20, 20], 0.9),  # a hit
            entry(4, CAT, [1, 0, 20, 20], 0.8),  # duplicate
            entry(4, CAT, [50, 0, 20, 20], 0.7),  # localisation, IoU 1/3
            entry(4, CAT, [0, 40, 20, 20], 0.6),  # classification
            entry(4, CAT, [50, 40, 20, 20], 0.5),  # both
            entry(9, DOG, [0, 0, 20, 20], 0.4),  # background
        ],
    )


def random_results(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Build objects and detections on a coarse grid, with crowds, ties and exact IoUs."""
    rng = np.random.default_rng(seed)

    def box() -> list[float]:
        return [float(8 * n) for n in (*rng.integers(0, 5, 2), *rng.integers(1, 5, 2))]

    ids, classes = (4, 9), (CAT, DOG, 31)
    objects = [
        (int(rng.choice(ids)), int(rng.choice(classes)), box()) for _ in range(rng.integers(0, 12))
    ]
    annotations = truth(*objects)
    annotations["categories"] = [{"id": n, "name": f"class {n}"} for n in classes]
    for one in annotations["annotations"]:
        one["iscrowd"] = int(rng.random() < 0.2)
    entries = [
        entry(int(rng.choice(ids)), int(rng.choice(classes)), box(), float(rng.integers(0, 9)) / 8)
        for _ in range(rng.integers(0, 25))
    ]
    return annotations, entries


def test_each_kind_of_false_positive_is_recognised() -> None:
    errors = one_of_each()
    counts = {one.name: one.count for one in errors.kinds}
    assert counts == {
        "classification": 1,
        "localisation": 1,
        "both": 1,
        "duplicate": 1,
        "background": 1,
        "missed": 2,
    }
    assert (errors.hits, errors.objects, errors.near_misses) == (1, 5, 2)
    assert (errors.false_positives.count, errors.false_negatives.count) == (5, 4)
    cat, dog = errors.classes
    assert (cat.name, cat.hits, cat.objects) == ("cat", 1, 2)
    assert (cat.counts["classification"], cat.counts["missed"]) == (1, 0)
    assert (dog.counts["background"], dog.counts["missed"]) == (1, 2)


def test_gains_can_be_worked_by_hand() -> None:
    errors = one_of_each()
    half = 51 / 101  # of the recalls 0, .01 ... 1, those up to .5
    third = 34 / 101
    # Cats: a hit, then four false positives, for two objects. Dogs: one false positive, three objects.
    assert errors.ap == pytest.approx(half / 2)
    cat, dog = errors.classes
    assert (cat.ap, dog.ap) == pytest.approx((half, 0))
    # With the class fixed, the dog's box is the first of the dogs, above the background.
    assert errors.kind("classification").gain == pytest.approx(third / 2)
    # With the box fixed, the second cat is found third: its precision is 2/3.
    assert errors.kind("localisation").gain == pytest.approx(50 / 101 * 2 / 3 / 2)
    assert errors.kind("both").gain == errors.kind("duplicate").gain == 0
    assert errors.kind("background").gain == 0
    # Two of the three dogs do not count any more; the third is still not found.
    assert errors.kind("missed").gain == 0
    assert errors.false_positives.gain == 0
    # One cat is to be found, and no dogs, of which there is one false positive.
    assert errors.false_negatives.gain == pytest.approx((1 - half) / 2)
    assert cat.gains["localisation"] == pytest.approx(50 / 101 * 2 / 3)
    assert dog.gains["localisation"] == 0
    assert sum(one.share for one in errors.kinds) == pytest.approx(1 - errors.ap)


def test_a_fixed_detection_replaces_a_worse_one_of_the_same_object() -> None:
    annotations = truth((4, CAT, [0, 0, 20, 20]), (9, CAT, [0, 0, 20, 20]))
    # The localisation error scores above the hit, so fixing it leaves one detection of the object.
    errors = analyse_errors(
        annotations,
        [
            entry(4, CAT, [10, 0, 20, 20], 0.9),
            entry(4, CAT, [0, 0, 20, 20], 0.8),
            entry(9, CAT, [60, 60, 20, 20], 0.7),
            entry(9, CAT, [0, 0, 20, 20], 0.6),
        ],
    )
    assert errors.ap == pytest.approx(0.5)  # precisions 1/2 and 2/4
    gain = errors.kind("localisation").gain
    assert errors.ap + gain == pytest.approx((51 + 50 * 2 / 3) / 101)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32 - 1))
def test_everything_is_counted_once_and_the_shares_sum_to_what_is_missing(seed: int) -> None:
    annotations, entries = random_results(seed)
    errors = analyse_errors(annotations, entries)
    result = evaluate_coco(annotations, entries)
    false = [one.count for one in errors.kinds if one.name != "missed"]
    assert errors.hits + errors.ignored + sum(false) == len(entries)
    assert sum(false) == errors.false_positives.count
    missed = errors.kind("missed").count
    assert errors.hits + errors.near_misses + missed == errors.objects
    assert errors.objects == sum(one.objects for one in result.classes)
    for one, other in zip(errors.classes, result.classes, strict=True):
        assert one.ap == pytest.approx(other.ap50, nan_ok=True)
    if errors.objects:
        assert errors.ap == pytest.approx(result.ap50)
        assert sum(one.share for one in errors.kinds) == pytest.approx(1 - errors.ap)
    matrix = errors.confusion_matrix(-1.0).counts
    assert matrix[:-1].sum() == errors.objects
    assert matrix[:, :-1].sum() == len(entries) - errors.ignored
    assert np.trace(matrix) == errors.hits


def test_every_threshold_gives_the_ap_of_the_evaluation() -> None:
    annotations, entries = random_results(3)
    result = evaluate_coco(annotations, entries)
    for index, threshold in enumerate((0.5, 0.55, 0.6, 0.75)):
        expected = result.precision_recall(iou_threshold=threshold).precision.mean()
        errors = analyse_errors(annotations, entries, iou_threshold=threshold)
        assert errors.ap == pytest.approx(expected), index


def test_the_errors_of_cocos_demo_sum_to_what_they_explain() -> None:
    if not ORACLE.is_dir():
        pytest.skip("the demo of COCO's evaluation is not next to this checkout")
    annotations = ORACLE / "instances_val2014_100.json"
    results = ORACLE / "instances_val2014_fakebbox100_results.json"
    errors = analyse_errors(annotations, results)
    assert errors.ap == pytest.approx(evaluate_coco(annotations, results).ap50)
    assert round(errors.ap, 3) == 0.697
    counts = [one.count for one in errors.kinds]
    assert counts == [83, 1, 0, 1, 0, 97]
    assert errors.hits + errors.ignored + sum(counts[:5]) == 734
    assert errors.hits + errors.near_misses + counts[5] == errors.objects == 830
    assert sum(one.share for one in errors.kinds) == pytest.approx(1 - errors.ap)
    hotcoco = pytest.importorskip("hotcoco")  # has an implementation of the same paper
    objects = hotcoco.COCO(str(annotations))
    evaluation = hotcoco.COCOeval(objects, objects.load_res(str(results)), "bbox")
    evaluation.evaluate()
    other = evaluation.tide_errors()["delta_ap"]
    for name, theirs in (("classification", "Cls"), ("localisation", "Loc"), ("duplicate", "Dupe")):
        assert errors.kind(name).gain == pytest.approx(other[theirs])
    assert errors.false_positives.gain == pytest.approx(other["FP"])


def test_perfect_results_have_no_errors_and_empty_inputs_are_accepted() -> None:
    annotations = truth((4, CAT, [0, 0, 20, 20]))
    errors = analyse_errors(annotations, [entry(4, CAT, [0, 0, 20, 20], 0.9)])
    assert errors.ap == pytest.approx(1)
    assert [one.count for one in errors.kinds] == [0] * 6
    assert [one.gain for one in errors.kinds] == pytest.approx([0] * 6)
    assert errors.worst_images() == ()
    nothing = analyse_errors(annotations, [])
    assert (nothing.ap, nothing.kind("missed").gain) == (0, 1)
    assert math.isnan(nothing.classes[0].threshold)
    assert nothing.confusion_matrix().counts.tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    empty = analyse_errors({**truth(), "images": [], "categories": []}, [])
    assert math.isnan(empty.ap)
    assert empty.to_dict()["ap"] is None
    assert empty.confusion_matrix().counts.tolist() == [[0]]


def test_the_best_threshold_separates_hits_from_false_positives() -> None:
    annotations = truth((4, CAT, [0, 0, 20, 20]), (9, CAT, [0, 0, 20, 20]))
    entries = [
        entry(4, CAT, [0, 0, 20, 20], 0.9),
        entry(9, CAT, [0, 0, 20, 20], 0.6),
        entry(9, CAT, [60, 60, 20, 20], 0.4),
        entry(4, CAT, [60, 60, 20, 20], 0.4),
    ]
    cat, dog = analyse_errors(annotations, entries).classes
    assert (cat.threshold, cat.f1, cat.precision, cat.recall) == pytest.approx((0.5, 1, 1, 1))
    assert math.isnan(dog.f1)
    tied = [{**one, "score": 0.4} for one in entries]  # no threshold separates them
    cat = analyse_errors(annotations, tied).classes[0]
    assert (cat.threshold, cat.precision, cat.recall) == pytest.approx((0.2, 0.5, 1))
    assert cat.f1 == pytest.approx(2 / 3)
    zero = [{**one, "score": 0.0} for one in entries[:2]]
    assert analyse_errors(annotations, zero).classes[0].threshold < 0


def test_the_confusion_matrix_has_a_background() -> None:
    annotations = truth((4, CAT, [0, 0, 20, 20]), (4, DOG, [40, 0, 20, 20]), (9, DOG, [0, 0, 9, 9]))
    entries = [
        entry(4, DOG, [0, 0, 20, 20], 0.9),  # a cat taken for a dog
        entry(4, DOG, [40, 0, 20, 20], 0.8),
        entry(4, DOG, [41, 0, 20, 20], 0.7),  # a duplicate is a false alarm
        entry(9, CAT, [50, 50, 20, 20], 0.2),
    ]
    errors = analyse_errors(annotations, entries)
    matrix = errors.confusion_matrix(0.1)
    assert matrix.counts.tolist() == [[0, 1, 0], [0, 1, 1], [1, 1, 0]]
    assert matrix.most_confused() == [("cat", "dog", 1)]
    assert matrix.table().splitlines() == [
        "            cat  dog  background",
        "cat           0    1           0",
        "dog           0    1           1",
        "background    1    1           0",
    ]
    high = errors.confusion_matrix(0.8)  # a score equal to the threshold does not count
    assert high.counts.tolist() == [[0, 1, 0], [0, 0, 2], [0, 0, 0]]
    best = errors.confusion_matrix()
    assert best.to_dict()["score_thresholds"] == [None, errors.classes[1].threshold]
    # A detection of the right class counts first, even if its score is lower.
    both = analyse_errors(annotations, [entries[0], entry(4, CAT, [0, 0, 20, 20], 0.3)])
    assert both.confusion_matrix(0.1).counts[0].tolist() == [1, 0, 0]


def test_tables_and_json_have_all_numbers() -> None:
    errors = one_of_each()
    assert errors.table().splitlines()[:3] == [
        "error             count   gain  share",
        f"classification        1  0.168  {errors.kind('classification').share:.3f}",
        f"localisation          1  0.165  {errors.kind('localisation').share:.3f}",
    ]
    assert errors.table().splitlines()[-1].endswith("      -")
    assert errors.class_table().splitlines()[1].startswith("cat          2  0.505  0.000  0.330")
    read = json.loads(errors.to_json())
    assert read == errors.to_dict()
    assert read["false_positives"] == {
        "name": "false positive",
        "count": 5,
        "gain": 0.0,
        "share": None,
    }
    assert read["classes"][1]["threshold"] is None
    assert str(errors).startswith("AP 0.252 at IoU 0.5; gain if fixed: classification 0.168")
    with pytest.raises(ValueError, match=r"Unknown kind of error 'typo'; choose .*'missed'"):
        errors.kind("typo")


def test_wrong_thresholds_are_errors() -> None:
    with pytest.raises(ValueError, match=r"iou_threshold must be in \(0, 1\], got 0\."):
        analyse_errors(truth(), [], iou_threshold=0)
    with pytest.raises(ValueError, match=r"background_iou must be in \(0, 0\.5\], got 0\.6\."):
        analyse_errors(truth(), [], background_iou=0.6)
    with pytest.raises(ValueError, match=r"max_detections must be at least 100"):
        analyse_errors(truth(), [], max_detections=10)
    with pytest.raises(ValueError, match=r"count must be at least 1"):
        one_of_each().worst_images(0)


def test_images_and_labels_can_be_chosen() -> None:
    annotations = truth((4, CAT, [0, 0, 20, 20]), (9, DOG, [0, 0, 20, 20]))
    results = {4: found([[0, 0, 20, 20]], [0.9], [1])}
    errors = analyse_errors(annotations, results, image_ids=[4], category_ids=[DOG, CAT])
    assert errors.ap == pytest.approx(1)
    assert (errors.num_images, errors.objects) == (1, 1)


@pytest.fixture
def files(tmp_path: Path) -> tuple[AnnotationTable, list[dict[str, Any]]]:
    """Two images, of which the second has more errors, in a table; and results."""
    annotations = truth(
        (4, CAT, [10, 10, 30, 30]), (9, DOG, [20, 20, 50, 50]), (9, CAT, [5, 60, 20, 30])
    )
    annotations["images"] = [
        {**one, "file_name": f"{one['id']}.png"} for one in annotations["images"]
    ]
    for name in ("4.png", "9.png"):
        Image.new("RGB", (100, 100), "gray").save(tmp_path / name)
    (tmp_path / "truth.json").write_text(json.dumps(annotations))
    entries = [
        entry(4, CAT, [10, 10, 30, 30], 0.9),
        entry(4, DOG, [60, 10, 30, 30], 0.2),
        entry(9, DOG, [22, 20, 50, 50], 0.8),
        entry(9, DOG, [60, 5, 30, 30], 0.7),
    ]
    (tmp_path / "results.json").write_text(json.dumps(entries))
    return read_coco(tmp_path / "truth.json", tmp_path), entries


def test_the_best_detections_are_drawn_where_none_is_above_the_threshold(tmp_path: Path) -> None:
    Image.new("RGB", (100, 100)).save(tmp_path / "9.png")
    low = [entry(9, DOG, [9 * i, 5, 8, 8], 0.1 + i / 100) for i in range(7)]
    errors = analyse_errors(
        truth((9, CAT, [50, 50, 40, 40])), [entry(4, CAT, [0, 0, 9, 9], 0.8), *low]
    )
    by_id = {one.image_id: one for one in errors.worst_images(score_threshold=0.5)}
    assert by_id[9].below_texts == ("dog 0.12", "dog 0.13", "dog 0.14", "dog 0.15", "dog 0.16")
    assert by_id[9].below[-1].tolist() == [54, 5, 62, 13]
    assert by_id[9].summary == "1 miss; best 5 below the threshold"
    assert len(by_id[4].below) == 0
    assert by_id[4].summary == "0 hits, 0 misses, 1 false alarm"
    picture = by_id[9].draw_file(tmp_path / "9.png")
    assert by_id[9].COLORS["below the threshold"] in {
        picture.getpixel((x, y)) for x in range(52, 64) for y in range(3, 15)
    }
    above = {one.image_id: one for one in errors.worst_images(score_threshold=0.155)}
    assert len(above[9].below) == 0  # one detection is above


def test_the_worst_images_come_first_and_are_drawn(
    files: tuple[AnnotationTable, list[dict[str, Any]]], tmp_path: Path
) -> None:
    table, entries = files
    errors = analyse_errors(table, entries)
    worst = errors.worst_images(score_threshold=0.1)
    assert [one.image_id for one in worst] == [9, 4]
    assert worst[0].summary == "1 hit, 1 miss, 1 false alarm"
    assert worst[0].hits.tolist() == [[22, 20, 72, 70]]
    assert worst[0].false_alarm_texts == ("dog 0.70",)
    assert worst[0].miss_texts == ("cat",)
    assert [one.image_id for one in errors.worst_images(1, score_threshold=0.1)] == [9]
    picture = worst[0].draw_file(tmp_path / "9.png")
    colors = worst[0].COLORS
    assert picture.getpixel((22, 40)) == colors["hit"]
    assert picture.getpixel((24, 75)) == colors["missed"]
    assert picture.getpixel((60, 30)) == colors["false alarm"]
    draw_errors(worst, table, tmp_path / "worst.png")
    with Image.open(tmp_path / "worst.png") as sheet:
        used = set(map(tuple, np.asarray(sheet.convert("RGB")).reshape(-1, 3).tolist()))
    assert set(colors.values()) - {colors["below the threshold"]} <= used
    with pytest.raises(ValueError, match="errors is empty"):
        draw_errors([], table, tmp_path / "none.png")
    with pytest.raises(ValueError, match=r"no image with the id 9 \(errors\)"):
        draw_errors(worst, table.select([0]), tmp_path / "none.png")


def report(result: CocoResult, errors: ErrorAnalysis, path: Path, **options: Any) -> str:
    pytest.importorskip("matplotlib")
    write_report(path, result, errors, **options)
    return path.read_text(encoding="utf-8")


def test_a_report_is_one_file_that_opens_offline(
    files: tuple[AnnotationTable, list[dict[str, Any]]], tmp_path: Path
) -> None:
    table, entries = files
    result, errors = evaluate_coco(table, entries), analyse_errors(table, entries)
    images = {4: tmp_path / "4.png", 9: tmp_path / "9.png"}
    text = report(
        result, errors, tmp_path / "a.html", images=images, score_threshold=0.1, title="A <b>"
    )
    sources = re.findall(r'src="([^"]*)"', text)
    assert len(sources) == 3 + 2  # three plots and two images
    assert all(re.match(r"data:image/(png|jpeg);base64,", one) for one in sources)
    assert "<script" not in text
    assert "http" not in re.sub(r'src="[^"]*"', "", text)
    assert "<title>A &lt;b&gt;</title>" in text
    assert "9.png: 1 hit, 1 miss, 1 false alarm" in text
    assert text.index("9.png: ") < text.index("4.png: ")
    assert f"<td>{result.ap:.3f}</td>" in text


def test_a_report_says_which_images_it_could_not_read(
    files: tuple[AnnotationTable, list[dict[str, Any]]], tmp_path: Path
) -> None:
    table, entries = files
    result, errors = evaluate_coco(table, entries), analyse_errors(table, entries)
    (tmp_path / "9.png").write_text("no image")
    with pytest.warns(UserWarning, match=r"2 images are left out of the report .*9\.png"):
        text = report(
            result,
            errors,
            tmp_path / "a.html",
            images={9: tmp_path / "9.png"},
            score_threshold=0.1,
        )
    assert "2 images are left out of the report" in text
    other = evaluate_coco(table, entries, image_ids=[4])
    with pytest.raises(ValueError, match="different evaluations: they have 1 and 2 images"):
        write_report(tmp_path / "b.html", other, errors)


def test_plots_are_saved_and_large_matrices_are_cut(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    one_of_each().plot(tmp_path / "errors.png")
    with Image.open(tmp_path / "errors.png") as picture:
        assert picture.width > 800
    many = truth(*((4, i, [2.0 * i, 0, 9, 9]) for i in range(40)))
    many["categories"] = [{"id": i, "name": f"a class called {i:020d}"} for i in range(40)]
    # Classes 35 to 39 are taken for one another.
    entries = [entry(4, 35 + (i + 1) % 5, [2 * i, 0, 9, 9], 0.9) for i in range(35, 40)]
    matrix = analyse_errors(many, entries, iou_threshold=0.9).confusion_matrix(0.5)
    axes = matrix.plot(tmp_path / "matrix.svg").axes[0]
    labels = [one.get_text() for one in axes.get_xticklabels()]
    assert len(labels) == 31
    assert labels[-1] == "background"
    assert axes.get_title() == "IoU 0.9, the 30 most confused of 40 classes"
    assert "a class called 00000000…" in labels
    assert (tmp_path / "matrix.svg").is_file()


def test_plots_without_matplotlib_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plot requires matplotlib.*focaldet\[plot\]"):
        one_of_each().plot()
    with pytest.raises(ImportError, match=r"focaldet\[plot\]"):
        one_of_each().confusion_matrix().plot()


def test_the_command_writes_a_report(
    files: tuple[AnnotationTable, list[dict[str, Any]]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    table, entries = files
    names = [str(tmp_path / one) for one in ("results.json", "truth.json", "out")]
    arguments = ["evaluate", *names[:2], "--images", str(tmp_path), "--output", names[2]]
    options = ["--report", "--iou", "0.6", "--score-threshold", "0.1", "--max-detections", "200"]
    assert main([*arguments, *options]) == 0
    printed = capsys.readouterr().out
    errors = analyse_errors(table, entries, iou_threshold=0.6, max_detections=200)
    assert errors.table() in printed
    assert "errors.json, report.html to" in printed
    assert "  AR 200 " in printed
    assert json.loads((tmp_path / "out" / "errors.json").read_text()) == errors.to_dict()
    assert "9.png: 1 hit, 1 miss, 1 false alarm" in (tmp_path / "out" / "report.html").read_text()
    assert main([*arguments, "--max-detections", "50"]) == 2
    assert "error: --max-detections must be at least 100, got 50.\n" in capsys.readouterr().err
    assert main([*arguments, "--report", "--iou", "0"]) == 2
    assert "error: --iou must be in (0, 1], got 0.0.\n" in capsys.readouterr().err


def test_colors_of_boxes_are_checked() -> None:
    from focaldet.visualization import draw_boxes

    image, boxes = torch.zeros(3, 20, 20), torch.tensor([[2.0, 2, 18, 18]])
    assert draw_boxes(image, boxes, colors=[(9, 8, 7)]).getpixel((2, 9)) == (9, 8, 7)
    with pytest.raises(ValueError, match=r"colors must have one entry per box \(1\), got 0"):
        draw_boxes(image, boxes, colors=[])
    with pytest.raises(ValueError, match=r"colors\[0\] must be red, green and blue"):
        draw_boxes(image, boxes, colors=[(300, 0, 0)])


def test_the_analysis_is_the_same_for_equal_inputs_in_other_forms(
    files: tuple[AnnotationTable, list[dict[str, Any]]], tmp_path: Path
) -> None:
    table, entries = files
    one = analyse_errors(table, entries)
    other = analyse_errors(str(tmp_path / "truth.json"), tmp_path / "results.json")
    assert one.to_dict() == other.to_dict()
    assert_array_equal(one.confusion_matrix().counts, other.confusion_matrix().counts)
