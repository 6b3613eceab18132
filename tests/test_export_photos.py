"""An exported file finds the same objects in real photos as the model, in both runtimes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.boxes import box_iou
from focaldet.export import BOX_TOLERANCE, OnnxDetector, export_onnx
from focaldet.images import load_image
from tests.helpers.tiny_export import assert_rows, expected_of, photo, with_many_detections

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from focaldet import Detections
    from focaldet.export._sessions import RuntimeName

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.slow

_MARGIN = 1e-4  # around the lowest kept score, where OpenVINO may find other objects
_TIE = 1e-6  # around the NMS threshold, where rounding decides whether both boxes are kept
_BATCH = 4


class Exported(NamedTuple):
    """A model and its exported file."""

    model: RetinaNet
    path: Path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    config = RetinaNetConfig.torchvision_v2(num_classes=91).replace(
        backbone="resnet18",
        fpn_channels=32,
        head_depth=1,
        min_size=400,
        max_size=667,
    )
    torch.manual_seed(0)
    model = calibrated(with_many_detections(RetinaNet.from_config(config)))
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    export_onnx(model, path)
    return Exported(model, path)


@torch.no_grad()
def calibrated(model: RetinaNet) -> RetinaNet:
    """Scale the last convolutions, because otherwise all scores would be 1 and have no order."""
    pixels = load_image(photo(640, 480)).float() / 255
    coarse = (
        torch.nn.functional.avg_pool2d(pixels, 8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    )
    logits, box_deltas = model.forward_maps(model.preprocess([coarse]).tensor)
    for layer, maps, spread in (
        (model.head.class_logits, logits, 0.7),
        (model.head.box_deltas, box_deltas, 0.2),
    ):
        layer.weight /= torch.cat([level.flatten() for level in maps]).std() / spread
    torch.nn.init.constant_(model.head.class_logits.bias, -5.5)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_single_photos(coco_photos: list[Path], exported: Exported, runtime: RuntimeName) -> None:
    pytest.importorskip(runtime)
    detector = OnnxDetector(exported.path, runtime=runtime)
    total = 0
    for path in coco_photos:
        [found], [expected] = detector.predict(path), exported.model.predict(path)
        assert found.image_size == expected.image_size
        assert found.source == expected.source == str(path)
        rows = (found.boxes, found.scores, found.labels)
        total += assert_same_except_ties(rows, expected, exported.model, runtime)
    assert total > 10 * len(coco_photos)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_padded_batches_of_photos_of_different_sizes(
    coco_photos: list[Path], exported: Exported, runtime: RuntimeName
) -> None:
    pytest.importorskip(runtime)
    model, detector = exported.model, OnnxDetector(exported.path, runtime=runtime)
    total, padded = 0, 0
    for start in range(0, len(coco_photos), _BATCH):
        images = [load_image(path).float() / 255 for path in coco_photos[start : start + _BATCH]]
        batch = model.preprocess(images)
        sizes = torch.tensor(batch.sizes)
        padded += len(set(batch.sizes)) > 1
        outputs = detector.run(batch.tensor, sizes)
        for index, expected in enumerate(expected_of(model, batch.tensor, sizes)):
            count = int(outputs["count"][index])
            rows = [outputs[name][index, :count] for name in ("boxes", "scores", "labels")]
            total += assert_same_except_ties(rows, expected, model, runtime)
    assert total > 10 * len(coco_photos)
    assert padded > 10


def assert_same_except_ties(
    rows: Sequence[Tensor], expected: Detections, model: RetinaNet, runtime: RuntimeName
) -> int:
    """Assert that rows are the expected ones, except pairs whose IoU nearly equals the NMS threshold.

    For OpenVINO, only rows that score above the lowest kept score by more than the margin are compared.

    Returns:
        The number of rows compared.
    """
    boxes, scores, labels = rows
    if runtime == "openvino":
        full = len(expected) == model.config.max_detections
        last = float(expected.scores[-1]) if full else 0.0
        lowest = max(model.config.score_threshold, last) + _MARGIN
        boxes, scores, labels = (part[scores > lowest] for part in (boxes, scores, labels))
        expected = expected[expected.scores > lowest]
    threshold = model.config.nms_threshold
    sides = [Boxes(boxes, labels), Boxes(expected.boxes, expected.labels)]
    tied = [ties(side, threshold) for side in sides]
    untied, expected_untied = (~(is_in(side, tied[0]) | is_in(side, tied[1])) for side in sides)
    rows, expected = [part[untied] for part in (boxes, scores, labels)], expected[expected_untied]
    # A row that is missing because of a tie lets another one move up at the end.
    count = min(len(rows[0]), len(expected))
    assert max(len(rows[0]), len(expected)) - count <= len(tied[0].boxes) + len(tied[1].boxes)
    assert_rows([part[:count] for part in rows], expected[torch.arange(count)])
    return count


class Boxes(NamedTuple):
    """Boxes with their labels."""

    boxes: Tensor
    labels: Tensor


def ties(side: Boxes, threshold: float) -> Boxes:
    """Return the boxes that another box of the same label overlaps by the threshold."""
    near = (box_iou(side.boxes, side.boxes) - threshold).abs() < _TIE
    chosen = (near & (side.labels[:, None] == side.labels)).any(dim=1)
    return Boxes(side.boxes[chosen], side.labels[chosen])


def is_in(side: Boxes, others: Boxes) -> Tensor:
    """Return a mask of the boxes that are among the others."""
    distances = (side.boxes[:, None] - others.boxes).abs().amax(dim=2)
    return ((distances <= BOX_TOLERANCE) & (side.labels[:, None] == others.labels)).any(dim=1)
