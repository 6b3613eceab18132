"""Conversions of the drop-in for torchvision's RetinaNet: to focaldet and back, and for inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.testing import assert_close
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator

from focaldet import RetinaNet, RetinaNetConfig
from focaldet import torchvision as drop_in
from focaldet.detections import Detections
from tests.helpers.reference_torchvision import assert_same_detections
from tests.helpers.torchvision_pairs import build_pair, images, targets

if TYPE_CHECKING:
    from pathlib import Path


def assert_equal_detections(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert sum(len(one["scores"]) for one in expected) > 20
    as_ours = [Detections(**one, image_size=(1, 1)) for one in found]
    assert_same_detections(as_ours, expected, boxes_atol=0.05, scores_atol=1e-4)


def detections_of(model: RetinaNet) -> list[dict[str, Any]]:
    found = model.detections(model(images()))
    return [{"boxes": d.boxes, "scores": d.scores, "labels": d.labels} for d in found]


@pytest.mark.parametrize("name", ["v1", "v2"])
@torch.no_grad()
def test_to_focaldet_shares_weights_and_has_the_present_settings(name: str, tmp_path: Path) -> None:
    theirs, mine = build_pair(name)
    for model in (theirs, mine):
        model.nms_thresh, model.detections_per_img = 0.4, 50
        model.transform.min_size = (80,)
        sizes = tuple((6 * 2**i, 7 * 2**i) for i in range(5))
        model.anchor_generator = AnchorGenerator(sizes, ((0.4, 1.0, 1.5, 2.5),) * 5)
        torch.manual_seed(1)
        head = detection.retinanet.RetinaNetHead(64, 8, 3)
        torch.nn.init.normal_(head.classification_head.cls_logits.weight, std=0.3)
        torch.nn.init.constant_(head.classification_head.cls_logits.bias, -2)
        model.head = head if name == "v1" else model.head
    if name == "v2":
        for model in (theirs, mine):
            model.anchor_generator = detection.retinanet._default_anchorgen()
    ours = mine.to_focaldet()
    assert (ours.config.nms_threshold, ours.config.max_detections) == (0.4, 50)
    assert ours.config.min_size == 80
    mine.head.classification_head.cls_logits.bias.add_(0.1)
    theirs.head.classification_head.cls_logits.bias.add_(0.1)
    assert_equal_detections(detections_of(ours), theirs(images()))
    ours.save_pretrained(tmp_path)
    assert_equal_detections(detections_of(RetinaNet.from_pretrained(tmp_path)), theirs(images()))


def test_to_focaldet_keeps_what_trains_and_gives_equal_losses() -> None:
    theirs, mine = build_pair()
    for part in (mine.backbone.body.conv1, mine.backbone.body.bn1, mine.backbone.body.layer1):
        part.requires_grad_(requires_grad=False)
    trains = [parameter.requires_grad for parameter in mine.parameters()]
    ours = mine.to_focaldet()
    assert [parameter.requires_grad for parameter in mine.parameters()] == trains
    assert {id(p) for p in ours.parameters()} == {id(p) for p in mine.parameters()}
    assert not any(p.is_meta for p in [*ours.parameters(), *ours.buffers()])
    assert ours.config.trainable_stages == 3
    expected = theirs.train()(images(), targets(3))
    theirs.eval()
    ours.train()
    losses = ours(images(), targets(3)).losses
    assert losses is not None
    assert_close(losses["classification"], expected["classification"], rtol=1e-4, atol=1e-5)
    assert_close(losses["box_regression"], expected["bbox_regression"], rtol=1e-4, atol=1e-5)


def test_to_focaldet_names_what_has_no_counterpart() -> None:
    _, mine = build_pair()
    mine.anchor_generator = AnchorGenerator(((8,), (16,), (30,), (64,), (128,)), ((1.0,),) * 5)
    mine.head = detection.retinanet.RetinaNetHead(64, 1, 3)
    assert mine.to_focaldet().config.anchor_sizes == (8, 16, 30, 64, 128)
    mine.anchor_generator = AnchorGenerator(
        ((8, 12), (16, 20), (32, 40), (64, 80), (128, 160)), ((1.0,),) * 5
    )
    with pytest.raises(ValueError, match=r"anchors have no counterpart.*\(16, 20\)"):
        mine.to_focaldet()
    mine.detections_per_img = 0
    mine.transform.fixed_size = (64, 96)
    with pytest.raises(ValueError, match=r"fixed_size is set; detections_per_img is 0"):
        mine.to_focaldet()


@torch.no_grad()
def test_a_square_fixed_size_becomes_a_ratio_that_is_not_kept() -> None:
    theirs, mine = build_pair()
    for model in (theirs, mine):
        model.transform.fixed_size = (96, 96)
    ours = mine.to_focaldet()
    assert (ours.config.keep_ratio, ours.config.min_size) == (False, 96)
    assert_equal_detections(detections_of(ours), theirs(images()))


@pytest.mark.parametrize("name", ["v1", "v2"])
@torch.no_grad()
def test_the_optimised_copy_is_called_like_the_model(name: str) -> None:
    theirs, mine = build_pair(name)
    fast = mine.optimize_for_inference()
    assert_equal_detections(fast(images()), theirs(images()))
    mine.head.classification_head.cls_logits.bias.fill_(-50)
    assert_equal_detections(fast(images()), theirs(images()))  # a copy
    assert len(mine(images())[0]["scores"]) == 0


@torch.no_grad()
def test_a_focaldet_model_becomes_the_drop_in_and_comes_back() -> None:
    torch.manual_seed(0)
    config = RetinaNetConfig.torchvision_v2(3).replace(
        backbone="resnet18", fpn_channels=32, min_size=96, max_size=128, score_threshold=0.01
    )
    ours = RetinaNet.from_config(config).eval()
    torch.nn.init.normal_(ours.head.class_logits.weight, std=0.1)
    converted: Any = ours.to_torchvision()
    assert type(converted) is drop_in.RetinaNet
    assert set(converted.uses_focaldet.values()) == {"yes"}
    assert_equal_detections(detections_of(ours), converted(images()))
    again = converted.to_focaldet()
    assert again.config == ours.current_config()
    assert_close(again.state_dict(), ours.state_dict(), rtol=0, atol=0)
