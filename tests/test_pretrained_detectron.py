"""Detectron's files: what is read from the blobs, from the settings inside, and from neither."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from focaldet import RetinaNet
from focaldet.errors import CheckpointError
from focaldet.pretrained import CheckpointFile, check_fit
from focaldet.pretrained.families import FAMILIES, _detectron
from tests.helpers import reference_models as plain
from tests.helpers.reference_detectron import NAMES, PIXEL_MEAN, blobs_of, config_text

if TYPE_CHECKING:
    from torch import Tensor


def blobs(body: plain.Body | None = None, *, classes: int = 80) -> dict[str, Tensor]:
    """Return blobs on the meta device."""
    shapes = plain.layout(NAMES, body or plain.Body(50), classes=classes)
    return blobs_of({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})


def file_of(tensors: dict[str, Tensor], cfg: Any = None) -> CheckpointFile:
    return CheckpointFile(tensors, {} if cfg is None else {"cfg": cfg}, "model_final.pkl")


@pytest.mark.parametrize(
    ("body", "backbone", "stride_in_1x1"),
    [
        (plain.Body(50), "resnet50", True),
        (plain.Body(101), "resnet101", True),
        (plain.Body(101, 64, 4), "resnext101_64x4d", False),
        (plain.Body(101, 32, 8), "resnext101_32x8d", False),
    ],
)
def test_every_published_architecture_is_recognised_and_fits(
    body: plain.Body, backbone: str, stride_in_1x1: bool
) -> None:
    tensors = blobs(body)
    assert [one.NAME for one in FAMILIES if not one.missing(tensors)] == ["Detectron"]
    file = file_of(tensors)
    config, assumed = _detectron.suggest(file)
    assert (config.backbone, config.stride_in_1x1) == (backbone, stride_in_1x1)
    assert {"stride_in_1x1", "image_mean", "min_size", "aspect_ratios"} <= set(assumed)
    assert (config.size_divisor, config.min_size, config.max_size) == (128, 800, 1333)
    assert config.backbone_norm_eps == 0
    with torch.device("meta"), pytest.warns(UserWarning, match="randomly initialised"):
        model = RetinaNet.from_config(config)
    check_fit(model.state_dict(), _detectron.convert(file, config))


def test_the_settings_in_a_file_are_read() -> None:
    config, assumed = _detectron.suggest(file_of(blobs(), config_text()))
    assert (config.min_size, config.max_size, config.size_divisor) == (160, 256, 128)
    assert config.aspect_ratios == (1.0, 2.0, 0.5)
    assert config.image_mean == tuple(round(value / 255, 12) for value in PIXEL_MEAN[::-1])
    assert set(assumed) == {"class_names", "pre_nms_top_k", "max_detections"}
    changed = config_text(
        **{"[1.0, 2.0, 0.5]": "[0.5, 1.0, 2.0]", "true": "false", "SCALES": "SCALE"},
        **{"!!python/tuple [160]": "240"},
    )
    config, _ = _detectron.suggest(file_of(blobs(), changed))
    assert config.aspect_ratios == (0.5, 1.0, 2.0)
    assert (config.stride_in_1x1, config.min_size) == (False, 240)


def test_boxes_whose_iou_equals_the_threshold_are_suppressed() -> None:
    config, _ = _detectron.suggest(file_of(blobs()))
    threshold = torch.tensor(config.nms_threshold, dtype=torch.float32)
    assert threshold < 0.5
    assert torch.nextafter(threshold, torch.tensor(1.0)) == 0.5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("NUM_CLASSES: 81", "NUM_CLASSES: 80", "is 80, which includes the background.* 80 classes"),
        ("RPN_MAX_LEVEL: 7", "RPN_MAX_LEVEL: 6", r"FPN\.RPN_MAX_LEVEL .* is 6, but only 7"),
        ("INFERENCE_TH: 0.05", "SOFTMAX: true", r"RETINANET\.SOFTMAX .* is True, but only False"),
        ("NMS: 0.5", "SOFT_NMS: {ENABLED: true}", r"TEST\.SOFT_NMS\.ENABLED"),
        ("[1.0, 2.0, 0.5]", "[1.0, 2.0]", "6 anchors per cell"),
        ("!!python/tuple [160]", "[160, 320]", r"TEST\.SCALES .* a list of 1 numbers"),
        ("state: !!python/tuple", "state: [1, 2]\n    other: !!python/tuple", "PIXEL_MEANS"),
        ("INFERENCE_TH: 0.05", "INFERENCE_TH: high", "INFERENCE_TH in the entry 'cfg' must be"),
    ],
)
def test_settings_that_contradict_or_are_not_supported_are_errors(
    old: str, new: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        _detectron.suggest(file_of(blobs(), config_text(**{old: new})))


def test_settings_of_another_type_are_an_error() -> None:
    with pytest.raises(CheckpointError, match="'cfg' of a Detectron file must be a text, got 3"):
        _detectron.suggest(file_of(blobs(), 3))


def test_a_shared_tower_and_unknown_blobs_are_errors() -> None:
    shared = {key: value for key, value in blobs().items() if "bbox_conv" not in key}
    with pytest.raises(CheckpointError, match="share a tower"):
        _detectron.suggest(file_of(shared))
    with pytest.raises(CheckpointError, match="1 unknown tensor .*'mask_w'"):
        _detectron.suggest(file_of(blobs() | {"mask_w": torch.zeros(1)}))


def test_means_in_a_list_are_read() -> None:
    text = "PIXEL_MEANS: [[[10.0, 20.0, 30.0]]]"
    config, assumed = _detectron.suggest(file_of(blobs(), text))
    assert config.image_mean == pytest.approx((30 / 255, 20 / 255, 10 / 255))
    assert "image_mean" not in assumed
