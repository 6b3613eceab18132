from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from focaldet.backbones import BACKBONES, Backbone, MobileNet, build_backbone, freeze_stages
from tests.helpers.shared import SHARED


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_gives_c3_to_c5_of_its_channels_and_strides(name: str) -> None:
    backbone = build_backbone(name, norm="batch").eval()
    assert isinstance(backbone, Backbone)
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 64, 96))
    for feature, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        assert feature.shape == (1, channels, 64 // stride, 96 // stride)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large"])
def test_features_are_those_of_torchvisions_classifier(name: str) -> None:
    classifier = models.get_model(name, weights=None).eval()
    nodes = {
        "mobilenet_v2": ["features.6", "features.13", "features.17"],
        "mobilenet_v3_large": ["features.6", "features.12", "features.15"],
    }.get(name, ["layer2", "layer3", "layer4"])
    peer = create_feature_extractor(classifier, return_nodes=nodes)
    image = torch.rand(1, 3, 64, 64)
    for norm in ("frozen", "batch"):
        ours = build_backbone(name, norm=norm, weights=classifier.state_dict()).eval()
        with torch.no_grad():
            for a, b in zip(ours(image), peer(image).values(), strict=True):
                assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_norms_are_frozen_or_train_with_the_eps_asked_for() -> None:
    frozen: Any = build_backbone("resnet18", norm="frozen", norm_eps=0.0)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    assert frozen.bn1.eps == 0
    resnet: Any = build_backbone("resnet18", norm="batch")
    mobilenet: Any = build_backbone("mobilenet_v3_large", norm="batch")
    assert resnet.bn1.eps == 1e-5
    assert mobilenet.features[0][1].eps == 1e-3


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_large"])
@pytest.mark.parametrize("trainable", range(6))
def test_the_last_stages_train(name: str, trainable: int) -> None:
    backbone = build_backbone(name, norm="batch")
    freeze_stages(backbone, 0)
    freeze_stages(backbone, trainable)
    trains = [
        {p.requires_grad for module in stage for p in module.parameters()}
        for stage in backbone.stages
    ]
    assert trains == [{False}] * (5 - trainable) + [{True}] * trainable
    assert sum(len(list(m.parameters())) for stage in backbone.stages for m in stage) == len(
        list(backbone.parameters())
    )


def test_features_saved_alone_load_too() -> None:
    path = SHARED / "weights" / "mobilenet_v2_features_imagenet_tv.pth"
    if not path.is_file():
        pytest.skip("the ImageNet weights are not beside this checkout")
    weights = torch.load(path, weights_only=True)
    backbone = build_backbone("mobilenet_v2", weights=weights)
    assert isinstance(backbone, MobileNet)
    assert_close(backbone.features[0][0].weight, weights["0.0.weight"])  # type: ignore[index]


def test_wrong_weights_and_names_are_named() -> None:
    weights = models.resnet34(weights=None).state_dict()
    with pytest.raises(ValueError, match=r"`weights` must be those of a torchvision resnet50; got"):
        build_backbone("resnet50", weights=weights)
    with pytest.raises(ValueError, match="`weights` must be those of a torchvision mobilenet_v2"):
        build_backbone("mobilenet_v2", weights=weights)
    with pytest.raises(ValueError, match="`name` must be one of 'resnet18'.*got 'resnet49'"):
        build_backbone("resnet49")
    with pytest.raises(ValueError, match="`norm` must be one of 'frozen', 'batch'; got 'sync'"):
        build_backbone("resnet18", norm="sync")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`trainable_stages` must be in \[0, 5\]; got 6"):
        freeze_stages(build_backbone("resnet18"), 6)


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_strides_can_lie_in_the_first_convolution_of_a_stage(name: str) -> None:
    torch.manual_seed(0)
    second: Any = build_backbone(name, norm="batch").eval()
    first: Any = build_backbone(name, norm="batch", stride_in_1x1=True).eval()
    first.load_state_dict(second.state_dict())
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        stem = first.maxpool(first.relu(first.bn1(first.conv1(image))))
        c2 = first.layer1(stem)
        block = first.layer2[0]
        by_hand = block.relu(block.bn1(torch.conv2d(c2, block.conv1.weight, stride=2)))
        groups = block.conv2.groups
        by_hand = torch.conv2d(by_hand, block.conv2.weight, padding=1, groups=groups)
        by_hand = block.conv3(block.relu(block.bn2(by_hand)))
        by_hand = block.relu(block.bn3(by_hand) + block.downsample(c2))
        assert_close(block(c2), by_hand)
        assert [m.shape for m in first(image)] == [m.shape for m in second(image)]
        assert float((first(image)[0] - second(image)[0]).abs().max()) > 0.01


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_strides_of_other_blocks_cannot_be_moved(name: str) -> None:
    with pytest.raises(ValueError, match=f"`stride_in_1x1` must be False .*got True for '{name}'"):
        build_backbone(name, norm="batch", stride_in_1x1=True)
