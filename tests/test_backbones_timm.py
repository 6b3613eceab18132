"""Backbones of timm, by name."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.backbones import (
    Backbone,
    FrozenBatchNorm2d,
    ResNet,
    TimmBackbone,
    build_backbone,
    freeze_stages,
)
from focaldet.backbones._norms import FrozenBatchNormAct2d

if TYPE_CHECKING:
    from pathlib import Path

timm = pytest.importorskip("timm")

# A plain ResNet, LayerNorm, and two with norms that apply their activation. Swin is channels last.
NAMES = ("resnet18", "convnext_atto", "mobilenetv3_small_050", "regnety_002")
SWIN = "swin_tiny_patch4_window7_224"


def tiny_config(name: str, **changes: Any) -> RetinaNetConfig:
    options: dict[str, Any] = {
        "backbone_norm": "batch",
        "fpn_channels": 32,
        "head_depth": 1,
        "min_size": 64,
        "max_size": 96,
    }
    return RetinaNetConfig(num_classes=2, backbone=f"timm/{name}", **(options | changes))


@pytest.mark.parametrize("name", [*NAMES, SWIN])
def test_maps_have_the_channels_and_strides_that_timm_says(name: str) -> None:
    backbone = build_backbone(f"timm/{name}").eval()
    assert isinstance(backbone, Backbone)
    assert backbone.strides == (8, 16, 32)
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 96, 160))
    for feature, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        assert feature.shape == (1, channels, 96 // stride, 160 // stride)


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_features_equal_those_of_timms_classifier(name: str, norm: Any) -> None:
    torch.manual_seed(0)
    classifier = timm.create_model(name, pretrained=False)
    for module in classifier.modules():
        if isinstance(module, nn.BatchNorm2d):  # so that statistics and scales matter
            nn.init.uniform_(module.running_mean, -0.1, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.8, 1.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.bias, -0.1, 0.1)
    image = torch.rand(1, 3, 64, 96)
    backbone = build_backbone(f"timm/{name}", norm=norm, weights=classifier.state_dict()).eval()
    with torch.no_grad():
        expected = classifier.eval().forward_intermediates(image, intermediates_only=True)[-3:]
        for ours, theirs in zip(backbone(image), expected, strict=True):
            assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_means_that_no_batchnorm_trains_or_follows_the_data(name: str) -> None:
    backbone: Any = build_backbone(f"timm/{name}", norm="frozen").train()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    sum(feature.sum() for feature in backbone(torch.rand(2, 3, 64, 64))).backward()
    norms = [module for module in backbone.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert bool(norms) == (name != "convnext_atto")
    assert not [parameter for norm in norms for parameter in norm.parameters()]
    for key, value in backbone.state_dict().items():
        assert_close(value, before[key], rtol=0, atol=0)


def test_norm_eps_is_that_of_each_batchnorm() -> None:
    backbone = build_backbone("timm/resnet18", norm="frozen", norm_eps=0.0)
    norms = [module for module in backbone.modules() if isinstance(module, FrozenBatchNorm2d)]
    assert {norm.eps for norm in norms} == {0.0}
    with pytest.raises(
        ValueError, match=r"backbone_norm_eps is 0.001.*convnext_atto' has no BatchNorm"
    ):
        build_backbone("timm/convnext_atto", norm_eps=0.001)


def test_stages_of_a_resnet_are_those_of_torchvision() -> None:
    ours, peer = build_backbone("timm/resnet18"), build_backbone("resnet18")
    assert isinstance(ours, TimmBackbone)
    assert isinstance(peer, ResNet)
    counts = [
        sum(parameter.numel() for module in stage for parameter in module.parameters())
        for stage in peer.stages
    ]
    assert [sum(parameter.numel() for parameter in stage) for stage in ours.stages] == counts


@pytest.mark.parametrize("name", NAMES)
def test_stages_divide_the_parameters_and_the_last_ones_train(name: str) -> None:
    backbone: Any = build_backbone(f"timm/{name}")
    parameters = [id(parameter) for stage in backbone.stages for parameter in stage]
    assert sorted(parameters) == sorted(map(id, backbone.parameters()))
    for trainable in range(6):
        freeze_stages(backbone, trainable)
        trains = [{parameter.requires_grad for parameter in stage} for stage in backbone.stages]
        frozen, training = trains[: 5 - trainable], trains[5 - trainable :]
        assert all(flags <= {False} for flags in frozen)
        assert all(flags <= {True} for flags in training)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tiny_patch16_224", "maps of stride 16, 16, 16, but a RetinaNet needs 8, 16 and 32"),
        ("levit_128s", "maps of stride 16, 32, 64"),
        ("maxvit_rmlp_pico_rw_256", "does not accept images of any size.*divisible by window"),
        ("resnet5O", r"timm .* has no network 'resnet5O' .*did you mean 'resnet50'"),
        ("hf_hub:timm/resnet18", "has no network 'hf_hub:timm/resnet18'"),
    ],
)
def test_networks_that_make_no_backbone_are_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(f"timm/{name}")


def test_a_network_without_a_map_of_a_level_is_named() -> None:
    with pytest.raises(ValueError, match="stride 4, 8, 16, 32, but a RetinaNet needs 2, 4 and 8"):
        build_backbone("timm/convnext_atto", levels=(1, 2, 3))


def test_wrong_weights_and_options_are_named() -> None:
    config = tiny_config("resnet18")
    with pytest.raises(ValueError, match="^backbone_weights do not fit timm/resnet18: "):
        RetinaNet.from_config(config, backbone_weights={})
    with pytest.raises(ValueError, match="stride_in_1x1 is True, but 'timm/resnet18' is not"):
        RetinaNet.from_config(config.replace(stride_in_1x1=True))


def test_a_missing_timm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm/resnet18.* requires timm.*'focaldet\[timm\]'"):
        build_backbone("timm/resnet18")


def test_only_a_frozen_batchnorm_that_starts_at_random_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="BatchNorm is frozen"):
        RetinaNet.from_config(tiny_config("resnet18", backbone_norm="frozen"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RetinaNet.from_config(tiny_config("convnext_atto", backbone_norm="frozen"))


@pytest.mark.parametrize(("name", "channels"), [("convnext_atto", 3), ("regnety_002", 4)])
def test_a_model_over_timm_trains_saves_loads_and_predicts(
    name: str, channels: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = tiny_config(
        name,
        in_channels=channels,
        image_mean=(0.5,) * channels,
        image_std=(0.25,) * channels,
    )
    model = RetinaNet.from_config(config)
    image = torch.rand(channels, 64, 96)
    target: Any = {"boxes": torch.tensor([[8.0, 8.0, 56.0, 56.0]]), "labels": torch.tensor([1])}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        output = model.train()([image], [target])
        assert output.losses is not None
        loss = sum(output.losses.values(), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    model.save_pretrained(tmp_path)
    loaded = RetinaNet.from_pretrained(tmp_path)
    assert loaded.config.backbone == f"timm/{name}"
    [expected] = model.eval().predict(image, score_threshold=0.0)
    [found] = loaded.predict(image, score_threshold=0.0)
    assert_close(found.boxes, expected.boxes)
    assert_close(found.scores, expected.scores)


@pytest.mark.parametrize("name", ["resnet18", "regnety_002", "mobilenetv3_small_050"])
@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_norms_are_folded_for_inference_with_the_same_result(name: str, norm: Any) -> None:
    torch.manual_seed(0)
    weights = timm.create_model(name, pretrained=False).state_dict()
    weights = {
        key: torch.rand_like(value) + 0.5 if key.endswith("running_var") else value
        for key, value in weights.items()
    }
    model = RetinaNet.from_config(tiny_config(name, backbone_norm=norm), backbone_weights=weights)
    image = torch.rand(1, 3, 64, 96)
    optimized = model.eval().optimize_for_inference(winograd=False)
    with torch.no_grad():
        for ours, expected in zip(optimized.backbone(image), model.backbone(image), strict=True):
            assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    kinds = (nn.BatchNorm2d, FrozenBatchNorm2d)
    assert not [module for module in optimized.backbone.modules() if isinstance(module, kinds)]
    assert [module for module in model.backbone.modules() if isinstance(module, kinds)]


def test_frozen_norms_with_activations_keep_their_keys() -> None:
    backbone = build_backbone("timm/regnety_002", norm="frozen")
    assert any(isinstance(module, FrozenBatchNormAct2d) for module in backbone.modules())
    trained = build_backbone("timm/regnety_002", norm="batch").state_dict()
    keys = {key for key in trained if not key.endswith("num_batches_tracked")}
    assert backbone.state_dict().keys() == keys


class Maps(nn.Module):
    def __init__(self, model: RetinaNet) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return self.model.forward_maps(images)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_the_network_exports(name: str) -> None:
    maps = Maps(RetinaNet.from_config(tiny_config(name)).eval())
    image = torch.rand(1, 3, 64, 96)
    program = torch.export.export(maps, (image,))
    with torch.no_grad():
        for ours, expected in zip(program.module()(image)[0], maps(image)[0], strict=True):
            assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_network_traces_as_one_graph() -> None:
    model = RetinaNet.from_config(tiny_config("regnety_002")).eval()
    torch.compiler.reset()
    forward = torch.compile(model.forward_maps, fullgraph=True, backend="eager")
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert_close(forward(image)[0], model.forward_maps(image)[0])
