"""The backends of evaluate_coco, compared with pycocotools called directly, as in its demo."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from focaldet.evaluation import evaluate_coco
from tests.helpers.evaluation import truth
from tests.helpers.shared import SHARED

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet.evaluation import CocoResult

pytestmark = pytest.mark.parity

ORACLE = SHARED / "data" / "oracles" / "coco_demo"
EXACT = ["pycocotools", "hotcoco"]
BACKENDS = [*EXACT, "faster-coco-eval"]


def available(backend: str) -> Any:
    pytest.importorskip(backend.replace("-", "_"))
    return backend


def pycocotools_alone(annotations: dict[str, Any], entries: list[dict[str, Any]]) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        objects, found = COCO(), COCO()
        objects.dataset = copy.deepcopy(annotations)
        objects.createIndex()
        if entries:
            found = objects.loadRes(copy.deepcopy(entries))
        evaluation = COCOeval(objects, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def assert_same(result: CocoResult, evaluation: COCOeval, backend: str) -> None:
    assert_array_equal(result.recall, evaluation.eval["recall"])
    assert_array_equal(result.scores, evaluation.eval["scores"])
    if backend in EXACT:
        assert_array_equal(result.precision, evaluation.eval["precision"])
        assert_array_equal(result.stats, evaluation.stats)
    else:
        assert_allclose(result.precision, evaluation.eval["precision"], rtol=0, atol=2.3e-16)
        assert_allclose(result.stats, evaluation.stats, rtol=0, atol=1e-15)


def random_evaluation(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Build a small evaluation full of ties, exact IoUs, crowds, and empty images and classes.

    Boxes are on a coarse grid, so that many IoUs equal a threshold and many areas equal a limit of
    "small" or "medium". Scores have one digit. Some images have more than 100 detections of a
    class.
    """
    rng = np.random.default_rng(seed)
    images, classes = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    image_ids = rng.permutation(1000)[:images].tolist()
    category_ids = rng.permutation(90)[:classes].tolist()
    step = int(rng.choice([4, 8, 16, 32]))

    def box() -> list[float]:
        return [float(one * step) for one in (*rng.integers(0, 6, 2), *rng.integers(0, 6, 2))]

    objects: list[dict[str, Any]] = [
        {
            "id": i + 1,
            "image_id": int(rng.choice(image_ids)),
            "category_id": int(rng.choice(category_ids)),
            "bbox": box(),
            "area": float(rng.choice([500, 32**2, 5000, 96**2, 20000])),
            "iscrowd": int(rng.random() < 0.2),
        }
        for i in range(rng.integers(0, 20))
    ]
    many = int(rng.choice([0, 5, 40, 400]))
    entries = [
        {
            "image_id": int(rng.choice(image_ids)),
            "category_id": int(rng.choice(category_ids)),
            "bbox": box(),
            "score": float(rng.integers(0, 11) / 10),
        }
        for _ in range(many)
    ]
    for one in objects:  # some have a detection close to them
        if rng.random() < 0.5:
            moved = [edge + shift for edge, shift in zip(one["bbox"], (1, 0, 0, 2), strict=True)]
            near = {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": moved}
            entries.append({**near, "score": float(rng.random())})
    order = rng.permutation(len(entries))
    annotations = {
        "images": [{"id": i, "height": 300, "width": 300} for i in image_ids],
        "annotations": objects,
        "categories": [{"id": i, "name": f"class {i}"} for i in category_ids],
    }
    return annotations, [entries[i] for i in order]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_each_backend_agrees_with_pycocotools(backend: str, seed: int) -> None:
    annotations, entries = random_evaluation(seed)
    result = evaluate_coco(annotations, entries, backend=available(backend))
    assert_same(result, pycocotools_alone(annotations, entries), backend)
    assert result.backend == backend


def test_random_evaluations_cover_the_edge_cases() -> None:
    """Crowds, ties, empty images, classes without objects, over 100 detections of a class."""
    has = dict.fromkeys(("crowd", "tie", "empty", "no objects", "many", "found", "nothing"), 0)
    for seed in range(60):
        annotations, entries = random_evaluation(seed)
        objects, scores = annotations["annotations"], [one["score"] for one in entries]
        pairs = [(one["image_id"], one["category_id"]) for one in entries]
        has["crowd"] += any(one["iscrowd"] for one in objects)
        has["tie"] += len(set(scores)) < len(scores)
        has["empty"] += len({one["image_id"] for one in objects}) < len(annotations["images"])
        has["no objects"] += len({one["category_id"] for one in objects}) < len(
            annotations["categories"]
        )
        has["many"] += any(pairs.count(pair) > 100 for pair in set(pairs))
        has["found"] += evaluate_coco(annotations, entries).ap > 0
        has["nothing"] += not entries
    assert all(has.values()), has


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_published_numbers_of_cocos_demo_are_reproduced(backend: str) -> None:
    if not ORACLE.is_dir():
        pytest.skip("the demo of COCO's evaluation is not next to this checkout")
    annotations = ORACLE / "instances_val2014_100.json"
    results = ORACLE / "instances_val2014_fakebbox100_results.json"
    result = evaluate_coco(annotations, results, backend=available(backend))
    expected = [0.505, 0.697, 0.573, 0.586, 0.519, 0.501]
    expected += [0.387, 0.594, 0.595, 0.640, 0.566, 0.564]
    assert [round(value, 3) for value in result.stats] == expected
    evaluation = pycocotools_alone(
        json.loads(annotations.read_text()), json.loads(results.read_text())
    )
    assert_same(result, evaluation, backend)
    assert result.of_class("person").objects == sum(
        one["category_id"] == 1 and not one["iscrowd"]
        for one in json.loads(annotations.read_text())["annotations"]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_subset_of_images_agrees_with_pycocotools(backend: str) -> None:
    if not ORACLE.is_dir():
        pytest.skip("the demo of COCO's evaluation is not next to this checkout")
    annotations = json.loads((ORACLE / "instances_val2014_100.json").read_text())
    entries = json.loads((ORACLE / "instances_val2014_fakebbox100_results.json").read_text())
    some = [image["id"] for image in annotations["images"]][10:40]
    with contextlib.redirect_stdout(io.StringIO()):
        objects = COCO()
        objects.dataset = copy.deepcopy(annotations)
        objects.createIndex()
        evaluation = COCOeval(objects, objects.loadRes(copy.deepcopy(entries)), "bbox")
        evaluation.params.imgIds = some
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    result = evaluate_coco(annotations, entries, backend=available(backend), image_ids=some)
    assert_same(result, evaluation, backend)
    assert result.num_images == 30


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_accepts_empty_inputs(
    backend: str, capfd: pytest.CaptureFixture[str]
) -> None:
    objects = truth((4, 7, [10, 10, 40, 40]))
    name = available(backend)
    assert evaluate_coco(truth(), [], backend=name).stats == (-1,) * 12
    assert evaluate_coco(objects, [], backend=name).ap == 0
    only_wrong = [{"image_id": 9, "category_id": 30, "bbox": [1, 1, 5, 5], "score": 0.5}]
    assert evaluate_coco(truth(), only_wrong, backend=name).stats == (-1,) * 12
    assert evaluate_coco(objects, only_wrong, backend=name).ap == 0
    assert evaluate_coco({**truth(), "images": []}, [], backend=name).stats == (-1,) * 12
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("backend", "remedy"),
    [
        ("hotcoco", r"pip install 'focaldet\[fast\]'"),
        ("faster-coco-eval", "pip install 'faster-coco-eval'"),
    ],
)
def test_a_missing_backend_is_an_error_with_the_remedy(
    backend: Any, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, backend.replace("-", "_"), None)
    package = backend.replace("-", "_")
    with pytest.raises(ImportError, match=f"backend='{backend}' requires {package}.*{remedy}"):
        evaluate_coco(truth(), [], backend=backend)


def test_auto_uses_hotcoco_if_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hotcoco")
    assert evaluate_coco(truth(), [], backend="auto").backend == "hotcoco"
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert evaluate_coco(truth(), [], backend="auto").backend == "pycocotools"


def test_an_unknown_backend_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"backend 'matlab'; choose 'pycocotools', .*'auto'"):
        evaluate_coco(tmp_path / "none.json", [], backend="matlab")  # type: ignore[arg-type]


def many_objects(count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Build an image with ``count`` objects of a class and one of another, all of them found."""
    boxes = [[10.0 * (i % 40), 10.0 * (i // 40), 8.0, 8.0] for i in range(count + 1)]
    categories = [7] * count + [30]
    annotations = {
        "images": [{"id": 4, "height": 500, "width": 500}],
        "categories": [{"id": 7, "name": "cell"}, {"id": 30, "name": "dog"}],
        "annotations": [
            {"id": i + 1, "image_id": 4, "category_id": c, "bbox": box}
            for i, (box, c) in enumerate(zip(boxes, categories, strict=True))
        ],
    }
    scores = np.linspace(0.9, 0.1, count + 1).tolist()
    entries = [
        {"image_id": 4, "category_id": c, "bbox": box, "score": score}
        for box, score, c in zip(boxes, scores, categories, strict=True)
    ]
    return annotations, entries


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_higher_limit_counts_more_than_100_objects_of_an_image(backend: str) -> None:
    annotations, entries = many_objects(297)
    name = available(backend)
    with pytest.warns(
        UserWarning,
        match=r"1 image has more than 100 objects of one class; the most are 297 of 'cell' in image "
        r"4\. .* an average recall of only 0\.668\. Pass a higher max_detections, such as 297\.",
    ):
        usual = evaluate_coco(annotations, entries, backend=name)
    assert usual.of_class("cell").ar100 == pytest.approx(100 / 297)
    assert usual.of_class("cell").ap == pytest.approx(34 / 101)  # recalls 0 to .33
    result = evaluate_coco(annotations, entries, backend=name, max_detections=300)
    assert result.ap == pytest.approx(1)
    assert (result.ar_max, result.of_class("cell").ar_max) == (1, 1)
    assert result.ar100 == usual.ar100 == usual.ar_max == pytest.approx((100 / 297 + 1) / 2)
    assert result.of_class("cell").ar100 == pytest.approx(100 / 297)
    assert_array_equal(result.precision[..., :3], usual.precision)
    assert_array_equal(result.recall[..., :3], usual.recall)
    assert result.stats[6:8] == usual.stats[6:8]
    assert "AR 10 0.517  AR 300 1.000" in str(result)
    assert "  AR300\n" in result.table()
    assert result.to_dict()["stats"]["AR 300"] == 1
    assert result.precision_recall("cell").precision.mean() == pytest.approx(1)
    empty = evaluate_coco({**annotations, "images": [], "annotations": []}, [], max_detections=300)
    assert empty.recall.shape == (10, 2, 4, 4)
    assert empty.ar100 == empty.ar_max == -1


def test_a_limit_below_cocos_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"max_detections must be at least 100, got 50\."):
        evaluate_coco(truth(), [], max_detections=50)
    with pytest.raises(TypeError, match=r"max_detections must be an integer, got 150\.5\."):
        evaluate_coco(truth(), [], max_detections=150.5)  # type: ignore[arg-type]
