"""Options of ``predict`` at call time: classes, limits, augmentation, and tiles with every detector."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from focaldet import Detections, RetinaNet
from focaldet._tiles._views import iter_views, merge_views
from tests.helpers.bright_shapes import ShapeFinder, draw_shapes
from tests.helpers.tiny_export import assert_same, make_model

if TYPE_CHECKING:
    from pathlib import Path


def noise(height: int, width: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> RetinaNet:
    return make_model(pre_nms_top_k=300, score_threshold=0.05, max_detections=20)


def test_classes_are_chosen_before_the_limit_applies() -> None:
    model = make_model(pre_nms_top_k=None, score_threshold=0.05, max_detections=20)
    image = noise(64, 90)
    [everything] = model.predict(image, max_detections=10_000)
    assert len(everything) > 100
    choices: list[list[int | str]] = [["dog"], [1], ["owl", 1], [2, 2, "dog"]]
    for classes in choices:
        expected = everything.filter(labels=classes)
        [found] = model.predict(image, classes=classes, max_detections=10_000)
        assert_same(found, expected)
        [best] = model.predict(image, classes=classes)
        assert_same(best, expected[:20])


def test_the_limit_at_call_time_is_above_or_below_that_of_the_config(model: RetinaNet) -> None:
    image = noise(64, 90)
    [most] = model.predict(image, max_detections=30)
    [default] = model.predict(image)
    [few] = model.predict(image, max_detections=3)
    assert [len(most), len(default), len(few)] == [30, 20, 3]
    assert_same(default, most[:20])
    assert_same(few, most[:3])


def test_soft_suppression_is_chosen_when_a_model_is_loaded(
    model: RetinaNet, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    image = noise(64, 90)
    loaded = RetinaNet.from_pretrained(tmp_path, backbone=model.backbone, suppression="gaussian")
    [hard], [soft] = model.predict(image), loaded.predict(image)
    assert torch.equal(soft.boxes[0], hard.boxes[0])
    assert not torch.equal(soft.scores, hard.scores)
    [optimised] = loaded.optimize_for_inference(winograd=False).predict(image)
    assert_same(optimised, soft)


@pytest.mark.parametrize(
    ("options", "name"), [({"tile": (64, 64)}, "tile"), ({"augment": True}, "augment=True")]
)
def test_merging_requires_hard_suppression(options: dict[str, Any], name: str) -> None:
    model = make_model(suppression="linear")
    message = f"{name} cannot be combined .*suppression='linear'.* with suppression='hard'"
    with pytest.raises(ValueError, match=message):
        model.predict(noise(64, 90), **options)


def test_labels_that_the_maps_do_not_have_raise(model: RetinaNet) -> None:
    output = model([torch.rand(3, 64, 64)])
    with pytest.raises(ValueError, match="labels contains 3, but the maps have labels 0 to 2"):
        model.detections(output, labels=[3])
    with pytest.raises(TypeError, match="labels must be an integer, got 'cat'"):
        model.detections(output, labels=["cat"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="max_detections must be at least 1, got 0"):
        model.detections(output, max_detections=0)


def test_the_optimised_copy_finds_the_same_in_tiles(model: RetinaNet) -> None:
    image = noise(100, 150)
    options: Any = {"tile": (64, 96), "classes": ["cat", "owl"], "batch_size": 3}
    [expected] = model.predict(image, **options)
    assert len(expected) > 20  # more than one window keeps
    assert set(expected.label_names) == {"cat", "owl"}
    [found] = model.optimize_for_inference().predict(image, **options)
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("postprocess", [True, False])
def test_an_exported_file_finds_the_same_in_tiles(
    model: RetinaNet, tmp_path: Path, postprocess: bool
) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    from focaldet.export import OnnxDetector, export_onnx

    export_onnx(model, tmp_path / "model.onnx", postprocess=postprocess)
    detector = OnnxDetector(tmp_path / "model.onnx")
    image = noise(100, 150)
    for options in ({"tile": (64, 96)}, {"augment": True}):
        [expected] = model.predict(image, batch_size=2, **options)
        [found] = detector.predict(image, batch_size=2, **options)
        assert_same(found, expected)
    [expected] = detector.predict(image)
    [found] = detector.predict(image, classes=["dog"], max_detections=2)
    if postprocess:  # the file has kept the best 20 of all classes
        assert_same(found, expected.filter(labels=["dog"])[:2])
        with pytest.raises(ValueError, match="max_detections must be at most 20.* got 21"):
            detector.predict(image, max_detections=21)
    else:
        assert_same(found, model.predict(image, classes=["dog"], max_detections=2)[0])
        assert len(detector.predict(image, max_detections=30)[0]) == 30


def test_all_views_agree_on_where_an_object_is() -> None:
    boxes = [(8, 20, 48, 60), (60, 90, 100, 97)]
    detector = ShapeFinder(side=100)
    [found] = detector.predict(draw_shapes((100, 100), boxes), augment=True, batch_size=3)
    assert detector.model.batches == [3]
    rows = found.boxes[found.boxes[:, 1].argsort()]
    assert_close(rows, torch.tensor(boxes).float(), atol=1.0, rtol=0)


def test_augmentation_works_in_tiles() -> None:
    boxes = [(60, 20, 120, 50), (10, 100, 40, 240), (130, 130, 150, 150)]
    detector = ShapeFinder(side=100)
    [found] = detector.predict(draw_shapes((250, 250), boxes), tile=(100, 100), augment=True)
    assert len(detector.model.batches) == 3 * 9
    rows = found.boxes[found.boxes[:, 1].argsort()]
    assert_close(rows, torch.tensor(boxes).float(), atol=2.0, rtol=0)


@pytest.mark.parametrize("kind", ["array", "uint8", "float32"])
def test_views_are_the_image_its_mirror_image_and_the_image_on_a_canvas(kind: str) -> None:
    image = noise(8, 10)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    source: Any = {"array": image, "uint8": tensor, "float32": tensor / 255}[kind]
    views = [
        view if isinstance(view, torch.Tensor) else torch.from_numpy(view.copy()).permute(2, 0, 1)
        for view in iter_views(source, (0.0, 0.2, 1.0))
    ]
    plain, mirrored, canvas = (view * 255 if kind == "float32" else view.float() for view in views)
    assert_close(plain, tensor.float())
    assert_close(mirrored, plain.flip(-1))
    assert canvas.shape == (3, 10, 13)
    assert_close(canvas[:, :8, :10], plain)
    assert_close(canvas[:, 8:], torch.tensor([0.0, 51.0, 255.0])[:, None, None].expand(3, 2, 13))
    assert_close(canvas[:, :8, 10:], torch.tensor([0.0, 51, 255])[:, None, None].expand(3, 8, 3))


def test_boxes_of_views_are_averaged_by_score_and_keep_the_highest() -> None:
    def view(box: list[float], score: float, label: int = 0) -> Detections:
        return Detections(
            torch.tensor([box]), torch.tensor([score]), torch.tensor([label]), (100, 200)
        )

    plain = view([10.0, 20.0, 50.0, 80.0], 0.8)
    mirrored = view([146.0, 20.0, 190.0, 80.0], 0.4)  # 10 to 54 in the image
    small = view([10.0, 20.0, 50.0, 80.0], 0.6, label=1)
    small = replace(small, image_size=(125, 250))
    found = merge_views([plain, mirrored, small], nms_threshold=0.5)
    assert found.image_size == (100, 200)
    assert_close(found.scores, torch.tensor([0.8, 0.6]))
    assert found.labels.tolist() == [0, 1]
    expected = torch.tensor([[10, 20, (50 * 0.8 + 54 * 0.4) / 1.2, 80], [10, 20, 50, 80]])
    assert_close(found.boxes, expected)
    outside = replace(view([10.0, 101.0, 50.0, 120.0], 0.9), image_size=(125, 250))
    assert len(merge_views([plain[:0], mirrored[:0], outside], nms_threshold=0.5)) == 0
