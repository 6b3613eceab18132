"""Conversion to torchvision's RetinaNet: equal detections, and the way back."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.ops import FrozenBatchNorm2d

from focaldet import RetinaNet, RetinaNetConfig
from focaldet import torchvision as drop_in
from tests.helpers.reference_torchvision import assert_same_detections, randomise

if TYPE_CHECKING:
    from pathlib import Path

V1, V2 = RetinaNetConfig.torchvision_v1, RetinaNetConfig.torchvision_v2


def built(config: RetinaNetConfig) -> RetinaNet:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # frozen norms without weights
        return RetinaNet.from_config(config)


def plain(model: RetinaNet) -> Any:
    """Return the converted model as torchvision's own class, whose own code runs."""
    theirs: Any = model.to_torchvision()
    assert type(theirs) is drop_in.RetinaNet
    theirs.__class__ = detection.RetinaNet
    return theirs


def small(preset: Any, **changes: Any) -> RetinaNetConfig:
    """Return a preset for three classes with a small pyramid and small images."""
    config: RetinaNetConfig = preset(3).replace(backbone_norm="batch", backbone="resnet18")
    return config.replace(**{"fpn_channels": 64, "min_size": 96, "max_size": 160} | changes)


CONFIGS = {
    "v1": small(V1),
    "v2": small(V2),
    "v1, frozen": small(V1, backbone_norm="frozen", backbone_norm_eps=0.0),
    "resnext": small(V2, backbone="resnext50_32x4d"),
    "mobilenet_v2": small(V1, backbone="mobilenet_v2"),
    "mobilenet_v3": small(V2, backbone="mobilenet_v3_large", backbone_norm="frozen"),
    "a square input": small(V1, keep_ratio=False, size_divisor=64),
    "other anchors": small(
        V1, octave_scales=(1.0, 1.5), aspect_ratios=(0.3, 1.0), anchor_sizes=(24, 48, 96, 192, 384)
    ),
    "other thresholds": small(
        V1, score_threshold=0.1, nms_threshold=0.3, pre_nms_top_k=40, max_detections=20
    ),
    "no limits": small(V1, pre_nms_top_k=None, max_detections=None),
    "no norm for classes": small(V2, head_norm=None, head_box_norm="group"),
    "no norm for boxes": small(V2, head_box_norm=None),
    "batch norm": small(V1, head_norm="batch", backbone_norm="frozen", backbone_norm_eps=1e-5),
    "a P2 level": small(
        V1, levels=(2, 3, 4, 5, 6, 7), anchor_sizes=(16, 32, 64, 128, 256, 512), pre_nms_top_k=100
    ),
    "a P2 level of a MobileNet": small(
        V2,
        backbone="mobilenet_v2",
        levels=(2, 3, 4, 5, 6, 7),
        anchor_sizes=(16, 32, 64, 128, 256, 512),
        pre_nms_top_k=100,
    ),
    "two maps": small(V1, levels=(4, 5, 6, 7), anchor_sizes=(64, 128, 256, 512)),
    "other colours": small(V1, in_channels=4, image_mean=(0.1,) * 4, image_std=(0.3,) * 4),
}

LONG_CONFIGS = ("resnext", "mobilenet_v3", "a P2 level of a MobileNet", "a P2 level", "no limits")


@pytest.mark.parity
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LONG_CONFIGS else name
        for name in CONFIGS
    ],
)
def test_detections_are_the_same_and_the_way_back_is_bitwise(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    channels = config.in_channels
    theirs = plain(built(config).eval())
    if channels == 3:
        randomise(theirs)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = RetinaNet.from_pretrained(tmp_path / "theirs.pth", config=config)
    again = plain(ours)
    wanted, state = theirs.state_dict(), again.state_dict()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)
    images = [torch.rand(channels, 80, 120), torch.rand(channels, 131, 97)]
    with torch.no_grad():
        expected = again(images)
        found = ours.detections(ours(images))
    if channels == 3:
        assert min(map(len, found)) >= 10
    assert_same_detections(found, expected)


@pytest.mark.parametrize(
    "name",
    [
        "v1",
        "v2",
        "mobilenet_v2",
        "mobilenet_v3",
        "no norm for classes",
        "no norm for boxes",
        "two maps",
    ],
)
def test_the_config_comes_back_as_far_as_the_tensors_show_it(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name].replace(min_size=800, max_size=1333)
    torch.save(built(config).to_torchvision().state_dict(), tmp_path / "theirs.pth")
    back = RetinaNet.from_pretrained(tmp_path / "theirs.pth").config
    if name == "mobilenet_v3":  # torchvision freezes its BatchNorm with another eps
        assert (config.backbone_norm_eps, back.backbone_norm_eps) == (None, 1e-5)
        back = back.replace(backbone_norm_eps=None)
    assert back == config.replace(trainable_stages=3)


@pytest.mark.parametrize(
    ("builder", "preset"),
    [("retinanet_resnet50_fpn", V1), ("retinanet_resnet50_fpn_v2", V2)],
)
def test_the_state_dict_fits_torchvisions_own_builders(builder: str, preset: Any) -> None:
    theirs = plain(built(preset(4).replace(backbone_norm="batch")))
    own = detection.__dict__[builder](weights=None, weights_backbone=None, num_classes=4)
    assert list(own.state_dict()) == list(theirs.state_dict())
    own.load_state_dict(theirs.state_dict())
    for name in ("score_thresh", "nms_thresh", "detections_per_img", "topk_candidates"):
        assert getattr(own, name) == getattr(theirs, name)
    assert own.anchor_generator.sizes == theirs.anchor_generator.sizes
    assert vars(own.proposal_matcher) == vars(theirs.proposal_matcher)
    assert own.head.regression_head._loss_type == theirs.head.regression_head._loss_type


@pytest.mark.parity
@pytest.mark.parametrize("box_loss", ["l1", "smooth_l1", "giou", "diou", "ciou"])
def test_losses_are_the_same_if_torchvision_has_them(
    box_loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = built(small(V2, box_loss=box_loss, smooth_l1_beta=1.0)).double()
    theirs = plain(model)
    assert not caplog.records
    images = [torch.rand(3, 80, 120).double()]
    boxes = torch.tensor([[10.0, 12, 60, 50], [40, 8, 110, 70]]).double()
    targets: Any = [{"boxes": boxes, "labels": torch.tensor([0, 2])}]
    for module in (model, theirs):
        module.train()
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
    expected = theirs(images, targets)
    losses = model(images, targets).losses
    torch.testing.assert_close(losses["classification"], expected["classification"])
    torch.testing.assert_close(losses["box_regression"], expected["bbox_regression"])


def test_other_losses_are_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="focaldet"):
        built(small(V1, normalizer="batch", focal_gamma=1.5)).to_torchvision()
    assert "no counterpart of focal_gamma=1.5, normalizer='batch'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="focaldet"):
        built(small(V1, classification_loss="quality_focal")).to_torchvision()
    assert "no counterpart of classification_loss='quality_focal'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="focaldet"):
        built(small(V1, box_loss="smooth_l1")).to_torchvision()
    assert "no counterpart of smooth_l1_beta=0.11" in caplog.text


def test_all_options_without_a_counterpart_are_in_one_message() -> None:
    config = RetinaNetConfig(num_classes=2, backbone="resnet18", backbone_norm="batch")
    config = config.replace(
        p7_relu=False,
        head_depth=2,
        box_weights=(1, 1, 2, 2),
        clip_to="batch",
        size_rounding="round",
        always_pad=True,
        suppression="linear",
        soft_nms_sigma=0.3,
        head_norm="group_with_bias",
        levels=(3, 4, 5, 6),
        anchor_sizes=(32, 64, 128, 256),
    )
    with pytest.raises(ValueError, match="torchvision's RetinaNet has no counterpart of") as caught:
        built(config).to_torchvision()
    message = str(caught.value)
    for option in (
        *("p7_relu=False", "head_depth=2", "anchor_offset=0.5", "anchor_mode='exact'"),
        *("box_weights=(1, 1, 2, 2)", "clip_to='batch'", "size_rounding='round'"),
        *(
            "always_pad=True",
            "suppression='linear'",
            "head_norm='group_with_bias'",
            r"levels=(3, 4, 5, 6), which do not end",
        ),
    ):
        assert option in message
    assert "normalizer" not in message  # it does not affect the detections
    assert "sigma" not in message  # nor does this, with linear suppression


def test_a_pyramid_that_torchvision_would_build_differently_is_an_error() -> None:
    config = small(V2, fpn_channels=512)  # C5 of a ResNet-18 has 512 channels
    with pytest.raises(ValueError, match="p6_from='c5' with fpn_channels=512, as many as C5 has"):
        built(config).to_torchvision()


def test_a_model_without_a_pyramid_is_an_error() -> None:
    config = small(V1, levels=(5,), anchor_sizes=(128,), fpn_channels=None)
    with pytest.raises(ValueError, match="levels=.*, fpn_channels=None"):
        built(config).to_torchvision()


def test_custom_backbones_are_an_error(tiny_config: RetinaNetConfig) -> None:
    class Tiny(nn.Module):
        channels, strides = (4, 4, 4), (8, 16, 32)

    model = RetinaNet.from_config(tiny_config.replace(backbone="custom"), backbone=Tiny())
    with pytest.raises(ValueError, match="backbone='custom'"):
        model.to_torchvision()


def test_weights_are_copies_with_the_dtype_the_mode_and_the_frozen_parameters() -> None:
    model = built(small(V1, backbone_norm="frozen")).double().eval()
    model.backbone.requires_grad_(requires_grad=False)
    model.postprocess.score_threshold = 0.25
    theirs: Any = model.to_torchvision()
    assert not theirs.training
    assert theirs.score_thresh == 0.25  # the model as it is now
    frozen = {name for name, p in theirs.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in theirs.named_parameters() if n.startswith("backbone.body.")}
    assert {type(m) for m in theirs.modules() if isinstance(m, FrozenBatchNorm2d)} == {
        FrozenBatchNorm2d
    }
    weight = theirs.head.classification_head.cls_logits.weight
    assert weight.dtype == torch.float64
    before = model.head.class_logits.weight.clone()
    with torch.no_grad():
        weight.fill_(7)
    assert torch.equal(model.head.class_logits.weight, before)
