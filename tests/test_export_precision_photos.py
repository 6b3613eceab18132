"""INT8 files find in real photos nearly what the model finds, whatever the sizes of the photos."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.export import OnnxDetector, Tolerances, export_onnx
from focaldet.export._agreement import agreement_of
from focaldet.images import list_images, load_image, read_image_size
from tests.helpers.shared import SHARED
from tests.helpers.tiny_export import with_many_detections

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet.export._sessions import RuntimeName

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.slow

_PHOTOS = SHARED / "data" / "coco_sample" / "val2017"
_CALIBRATION = SHARED / "data" / "coco_sample" / "train2017"
# Weights drawn at random lose more in INT8 than trained ones.
_TOLERANCES = Tolerances(unmatched=0.35, scores=0.1, boxes=0.2)


class Exported(NamedTuple):
    """A model and its INT8 file."""

    model: RetinaNet
    path: Path


@pytest.fixture(scope="module", params=["resnet18", "mobilenet_v2"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    if not _PHOTOS.is_dir() or not _CALIBRATION.is_dir():
        pytest.skip("There are no photos of COCO next to this checkout.")
    config = RetinaNetConfig(
        num_classes=3,
        backbone=request.param,
        backbone_norm="batch",
        fpn_channels=64,
        head_depth=2,
        head_norm="group",
        min_size=240,
        max_size=400,
    )
    torch.manual_seed(0)
    model = with_spread_scores(with_many_detections(RetinaNet.from_config(config)))
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    export_onnx(
        model,
        path,
        precision="int8",
        calibration=list_images([_CALIBRATION])[:24],
        error_budget=0.1,
        tolerances=_TOLERANCES,
    )
    return Exported(model, path)


@torch.no_grad()
def with_spread_scores(model: RetinaNet) -> RetinaNet:
    """Scale the last convolutions, because otherwise all scores would be nearly 0 or 1."""
    images = [load_image(path) for path in list_images([_CALIBRATION])[:2]]
    output = model(images)
    for layer, maps, spread in (
        (model.head.class_logits, output.logits, 1.0),
        (model.head.box_deltas, output.box_deltas, 0.2),
    ):
        layer.weight /= torch.cat([level.flatten() for level in maps]).std() / spread
    torch.nn.init.constant_(model.head.class_logits.bias, -4.0)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_an_int8_file_runs_on_photos_of_any_size(exported: Exported, runtime: RuntimeName) -> None:
    pytest.importorskip(runtime)
    photos = list_images([_PHOTOS])
    assert len({read_image_size(photo) for photo in photos}) > 10
    detector = OnnxDetector(exported.path, runtime=runtime, threads=2)
    found = detector.predict(photos)
    for photo, one in zip(photos, found, strict=True):
        assert one.image_size == read_image_size(photo)
        assert one.boxes.shape == (len(one), 4)
        assert one.boxes.isfinite().all()
    agreement = agreement_of(exported.model.predict(photos), found, exported.model.postprocess)
    assert agreement.detections > len(photos)
    assert agreement.within(_TOLERANCES), agreement
