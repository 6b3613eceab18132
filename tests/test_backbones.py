from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.backbones import (
    BACKBONES,
    Backbone,
    MobileNet,
    ResNet,
    adapt_input_channels,
    build_backbone,
    freeze_stages,
)
from tests.helpers.shared import SHARED

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_gives_c3_to_c5_with_its_channels_and_strides(name: str) -> None:
    backbone = build_backbone(name, norm="batch").eval()
    assert isinstance(backbone, Backbone)
    with torch.no_grad():
        maps = backbone(torch.rand(1, 3, 64, 96))
    for feature, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        assert feature.shape == (1, channels, 64 // stride, 96 // stride)


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v2", "mobilenet_v3_large", "timm/resnet18"]
)
@pytest.mark.parametrize("levels", [(1, 2), (2, 3, 4, 5), (4,), (3, 5)])
def test_the_maps_of_any_levels_are_returned(name: str, levels: tuple[int, ...]) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    everything: Any = build_backbone(name, norm="batch", levels=(1, 2, 3, 4, 5)).eval()
    weights = (everything.body if name.startswith("timm/") else everything).state_dict()
    backbone = build_backbone(name, norm="batch", levels=levels, weights=weights).eval()
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected, maps = everything(image), backbone(image)
    assert backbone.strides == tuple(2**level for level in levels)
    for level, channels, feature in zip(levels, backbone.channels, maps, strict=True):
        assert_close(feature, expected[level - 1], rtol=0, atol=0)
        assert feature.shape[1] == channels
    # What lies above the last level is left out, so that nothing trains without a gradient.
    backbone.train()
    torch.autograd.backward([torch.stack([x.sum() for x in backbone(image)]).sum()])
    assert all(parameter.grad is not None for parameter in backbone.parameters())
    stages = [len(list(stage)) > 0 for stage in backbone.stages]
    assert stages == [level <= levels[-1] for level in range(1, 6)]


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((), r"ascending numbers in \[1, 5\], got \(\)"),
        ((4, 3), r"ascending numbers in \[1, 5\], got \(4, 3\)"),
        ((5, 6), r"levels\[1\] must be in \[1, 5\], got 6"),
    ],
)
def test_wrong_levels_are_errors(levels: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone("resnet18", levels=levels)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large"])
def test_features_equal_those_of_torchvisions_classifier(name: str) -> None:
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
    assert (resnet.bn1.eps, resnet.bn1.momentum) == (1e-5, 0.1)
    assert (mobilenet.features[0][1].eps, mobilenet.features[0][1].momentum) == (1e-3, 0.01)


def test_a_row_of_the_table_makes_a_torchvision_network_a_backbone() -> None:
    network = models.resnet18(weights=None)
    backbone = BACKBONES["resnet18"](network)
    assert isinstance(backbone, ResNet)
    assert backbone.layer4 is network.layer4
    assert all(row.name == name for name, row in BACKBONES.items())
    assert all(hasattr(models, row.weights) for row in BACKBONES.values() if row.weights)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_large"])
@pytest.mark.parametrize("trainable", range(6))
def test_the_last_stages_train(name: str, trainable: int) -> None:
    backbone = build_backbone(name, norm="batch")
    assert isinstance(backbone, ResNet | MobileNet)
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
        pytest.skip("the ImageNet weights are not next to this checkout")
    weights = torch.load(path, weights_only=True)
    backbone = build_backbone("mobilenet_v2", weights=weights)
    assert isinstance(backbone, MobileNet)
    assert_close(backbone.features[0][0].weight, weights["0.0.weight"])  # type: ignore[index]


def test_wrong_weights_and_names_are_named() -> None:
    weights = models.resnet34(weights=None).state_dict()
    message = (
        r"^weights do not fit a torchvision resnet50: \d+ keys are missing .*bn3.*; \d+ tensors"
    )
    with pytest.raises(ValueError, match=message):
        build_backbone("resnet50", weights=weights)
    with pytest.raises(ValueError, match="weights do not fit a torchvision mobilenet_v2: "):
        build_backbone("mobilenet_v2", weights=weights)
    with pytest.raises(ValueError, match="Unknown backbone 'resnet49'; did you mean 'resnet"):
        build_backbone("resnet49")
    with pytest.raises(ValueError, match="Unknown backbone 'vit'; choose 'resnet18', .*timm/NAME"):
        build_backbone("vit")
    with pytest.raises(ValueError, match="norm 'sync'.*'frozen' or 'batch'"):
        build_backbone("resnet18", norm="sync")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"norm_eps must be at least 0, got -1"):
        build_backbone("resnet18", norm_eps=-1)
    with pytest.raises(ValueError, match=r"trainable_stages must be in \[0, 5\], got 6"):
        freeze_stages(build_backbone("resnet18"), 6)


def test_an_error_names_the_arguments_of_from_config() -> None:
    config = RetinaNetConfig(num_classes=1, backbone="resnet18")
    with pytest.raises(
        ValueError, match=r"^backbone_weights do not fit a torchvision resnet18: \d+"
    ):
        RetinaNet.from_config(config, backbone_weights={})
    with pytest.raises(ValueError, match="Unknown backbone 'resnet19'; did you mean 'resnet18'"):
        RetinaNet.from_config(config.replace(backbone="resnet19"))


@pytest.mark.filterwarnings("error")
def test_frozen_norms_that_start_at_random_are_warned_about() -> None:
    config = RetinaNetConfig(num_classes=1, backbone="resnet18")
    with pytest.warns(UserWarning, match="BatchNorm is frozen.*backbone_norm='batch'"):
        model = RetinaNet.from_config(config)
    assert model.config.trainable_stages == 5
    RetinaNet.from_config(config, backbone_weights=models.resnet18(weights=None).state_dict())


# ------------------------------------------------------------------ a module of the caller's own


class Own(nn.Module):
    channels = (8, 8, 8)
    strides = (8, 16, 32)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, stride=8)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        c3 = self.conv(images)
        return [c3, c3[..., ::2, ::2], c3[..., ::4, ::4]]


def test_a_module_alone_makes_the_config_custom(tmp_path: Path) -> None:
    config = RetinaNetConfig(num_classes=1, fpn_channels=32, min_size=64, max_size=64)
    model = RetinaNet.from_config(config, backbone=Own())
    assert model.config == config.replace(backbone="custom")
    model.save_pretrained(tmp_path)
    again = RetinaNet.from_pretrained(tmp_path, backbone=Own())
    assert again.config == model.config
    with pytest.raises(TypeError, match=r"config.backbone is 'custom', so backbone= is required"):
        RetinaNet.from_pretrained(tmp_path)


def test_a_module_and_another_name_contradict_each_other() -> None:
    config = RetinaNetConfig(num_classes=1, backbone="resnet18")
    with pytest.raises(
        TypeError, match=r"'resnet18', but backbone= was also given \(Own\).*'custom'"
    ):
        RetinaNet.from_config(config, backbone=Own())
    with pytest.raises(TypeError, match="backbone_weights.*backbone= is your own module"):
        RetinaNet.from_config(
            config.replace(backbone="custom"), backbone=Own(), backbone_weights={}
        )


def test_a_module_must_tell_its_channels_and_strides() -> None:
    config = RetinaNetConfig(num_classes=1)
    with pytest.raises(
        TypeError, match=r"backbone.*'channels' with one number per map.*Identity.channels is None"
    ):
        RetinaNet.from_config(config, backbone=nn.Identity())


# ------------------------------------------------------------------ numbers of input channels


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (1, [9.0]),
        (2, [4.5, 4.5]),
        (3, [1.0, 2.0, 6.0]),
        (4, [0.75, 1.5, 4.5, 2.25]),
        (6, [0.5, 1.0, 3.0, 1.5, 1.5, 1.5]),
    ],
)
def test_rgb_filters_are_adapted_by_hand(channels: int, expected: list[float]) -> None:
    weight = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1)
    assert adapt_input_channels(weight, channels).flatten().tolist() == expected


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "timm/resnet18"])
@pytest.mark.parametrize("channels", [1, 5])
def test_equal_channels_give_the_features_of_the_grey_rgb_image(name: str, channels: int) -> None:
    if name.startswith("timm/"):
        timm = pytest.importorskip("timm")
        weights = timm.create_model("resnet18", pretrained=False).state_dict()
    else:
        weights = models.get_model(name, weights=None).state_dict()
    grey = torch.rand(1, 1, 64, 64)
    rgb = build_backbone(name, weights=weights).eval()
    other = build_backbone(name, weights=weights, in_channels=channels).eval()
    with torch.no_grad():
        features = other(grey.expand(-1, channels, -1, -1))
        for ours, expected in zip(features, rgb(grey.expand(-1, 3, -1, -1)), strict=True):
            assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_weights_of_as_many_channels_are_loaded_unchanged() -> None:
    weights = build_backbone("resnet18", in_channels=4).state_dict()
    backbone: Any = build_backbone("resnet18", in_channels=4, weights=weights)
    assert_close(backbone.conv1.weight, weights["conv1.weight"], rtol=0, atol=0)
    assert backbone.conv1.stride == (2, 2)
    with pytest.raises(
        ValueError, match=r"conv1.weight \[64, 4, 7, 7\] instead of \[64, 3, 7, 7\]"
    ):
        build_backbone("resnet18", weights=weights)


def test_seeds_give_the_weights_they_gave_before() -> None:
    torch.manual_seed(0)
    expected = models.resnet18(weights=None).conv1.weight
    torch.manual_seed(0)
    backbone: Any = build_backbone("resnet18")
    assert_close(backbone.conv1.weight, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"in_channels": 4},
            "image_mean has 3 values, but in_channels is 4; give one value per channel",
        ),
        (
            {"in_channels": 1, "image_mean": (0.5,)},
            "image_std has 3 values, but in_channels is 1",
        ),
        ({"image_mean": (0.5,)}, "image_mean has 1 value, but in_channels is 3"),
        ({"in_channels": 0}, r"in_channels must be in \[1, 65536\], got 0"),
    ],
)
def test_mean_and_std_need_a_value_for_each_channel(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetinaNetConfig(num_classes=1, **changes)


def tiny_config(channels: int, **changes: Any) -> RetinaNetConfig:
    options: dict[str, Any] = {
        "backbone": "resnet18",
        "backbone_norm": "batch",
        "fpn_channels": 32,
        "head_depth": 1,
        "min_size": 64,
        "max_size": 96,
    }
    options |= {"image_mean": (0.5,) * channels, "image_std": (0.25,) * channels, **changes}
    return RetinaNetConfig(num_classes=2, in_channels=channels, **options)


def train_steps(model: RetinaNet, channels: int, steps: int = 4) -> list[float]:
    """Train on one random image and return the losses."""
    image = torch.rand(channels, 64, 96)
    target: Any = {"boxes": torch.tensor([[8.0, 8.0, 56.0, 56.0]]), "labels": torch.tensor([1])}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    losses = []
    for _ in range(steps):
        output = model([image], [target])
        assert output.losses is not None
        loss = sum(output.losses.values(), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_of_other_channels_trains_saves_loads_and_predicts(
    channels: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = RetinaNet.from_config(tiny_config(channels))
    losses = train_steps(model, channels)
    assert losses[-1] < losses[0]

    model.save_pretrained(tmp_path)
    loaded = RetinaNet.from_pretrained(tmp_path)
    assert loaded.config == model.config

    array = np.random.default_rng(0).integers(0, 256, (50, 70, channels), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    batch = torch.stack([tensor, tensor])
    expected = model.eval().predict(array, score_threshold=0.0)[0]
    optimized = loaded.optimize_for_inference(winograd=False)
    assert len(expected)
    for found in (
        *loaded.predict([array, tensor / 255], score_threshold=0.0),
        *loaded.predict(batch, score_threshold=0.0),
        *optimized.predict(tensor, score_threshold=0.0),
    ):
        assert_close(found.scores, expected.scores, rtol=0, atol=1e-4)
        assert_close(found.boxes[0], expected.boxes[0], rtol=0, atol=0.05)
    assert expected.draw(tensor[:3] if channels == 4 else tensor).size == (70, 50)
    with pytest.raises(
        ValueError, match=rf"sources must have shape .*{channels}?.*got \[50, 70, 3\]"
    ):
        loaded.predict(np.zeros((50, 70, 3), dtype=np.uint8))


def test_files_are_greyscale_for_one_channel_and_an_error_for_four(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    grey = RetinaNet.from_config(tiny_config(1)).eval()
    [from_file, from_array] = grey.predict(
        [path, np.asarray(Image.open(path).convert("L"))], score_threshold=0.0
    )
    assert_close(from_file.boxes, from_array.boxes)
    assert from_file.draw().size == (70, 50)
    with pytest.raises(ValueError, match=r"sources is the image file '.*a.png'.*4 channels"):
        RetinaNet.from_config(tiny_config(4)).predict(path)


def test_a_trained_rgb_model_can_be_adapted_to_other_channels(tmp_path: Path) -> None:
    rgb = RetinaNet.from_config(tiny_config(3)).eval()
    rgb.save_pretrained(tmp_path)
    grey = RetinaNet.from_pretrained(tmp_path, config=tiny_config(1, trainable_stages=5))
    image = torch.rand(1, 50, 70)
    with torch.no_grad():
        expected, logits = rgb([image.expand(3, -1, -1)]).logits, grey([image]).logits
    for ours, theirs in zip(logits, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_the_first_convolution_of_a_stage_can_have_the_stride(name: str) -> None:
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
    with pytest.raises(ValueError, match=f"stride_in_1x1 is True, but '{name}' is not"):
        build_backbone(name, norm="batch", stride_in_1x1=True)
