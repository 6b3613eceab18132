"""TensorFlow's padding of layers with stride 2, by its own definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from focaldet import FPN, RetinaNet
from focaldet._padding import SameConv2d, SameMaxPool2d
from focaldet.backbones import build_backbone
from tests.helpers.reference_keras import tensorflow_padded
from tests.helpers.tiny_model import TINY_CONFIG, TinyBackbone


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from([3, 5, 7]))
def test_windows_lie_where_tensorflow_puts_them(height: int, width: int, kernel: int) -> None:
    x = torch.rand(1, 2, height, width, requires_grad=True)
    conv = SameConv2d(2, 3, kernel, stride=2, padding=kernel // 2)
    expected = F.conv2d(tensorflow_padded(x, kernel), conv.weight, conv.bias, stride=2)
    assert_close(conv(x), expected)
    assert_close(conv.eval()(x), expected)
    pool = SameMaxPool2d(kernel, 2, kernel // 2)
    assert_close(pool(x), F.max_pool2d(tensorflow_padded(x, kernel, -torch.inf), kernel, 2))


def test_an_odd_side_is_padded_as_in_pytorch() -> None:
    x = torch.rand(1, 3, 9, 11)
    conv = torch.nn.Conv2d(3, 2, 3, stride=2, padding=1)
    same = SameConv2d(3, 2, 3, stride=2, padding=1)
    same.load_state_dict(conv.state_dict())
    assert_close(same(x), conv(x))


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (4, 5), (1, 1), (2, 1)])
def test_p6_and_p7_of_a_pyramid(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    fpn = FPN((2, 3, 4), 5, strided_padding="same")
    c5 = torch.rand(1, 4, *size)
    c3, c4 = (torch.rand(1, c, size[0] * s, size[1] * s) for c, s in ((2, 4), (3, 2)))
    *_, p6, p7 = fpn([c3, c4, c5])
    expected = F.conv2d(tensorflow_padded(c5, 3), fpn.p6.weight, fpn.p6.bias, stride=2)
    assert_close(p6, expected)
    expected = F.conv2d(tensorflow_padded(p6.relu(), 3), fpn.p7.weight, fpn.p7.bias, stride=2)
    assert_close(p7, expected)
    assert fpn.state_dict().keys() == FPN((2, 3, 4), 5).state_dict().keys()


@pytest.mark.parametrize("in_channels", [1, 3])
def test_the_stem_of_a_resnet(in_channels: int) -> None:
    options: Any = {"norm": "batch", "in_channels": in_channels}
    symmetric: Any = build_backbone("resnet18", **options).eval()
    same: Any = build_backbone("resnet18", strided_padding="same", **options).eval()
    same.load_state_dict(symmetric.state_dict())
    odd, even = torch.rand(1, in_channels, 65, 65), torch.rand(1, in_channels, 64, 66)
    with torch.no_grad():
        # 65 is odd, and so is the map of 33 that is pooled.
        assert_close(same(odd)[0], symmetric(odd)[0])
        assert same(even)[0].shape == symmetric(even)[0].shape
        assert (same(even)[0] - symmetric(even)[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["mobilenet_v2", "timm/resnet18"])
def test_only_resnets_of_torchvision_can_pad_so(name: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    with pytest.raises(
        ValueError, match=f"strided_padding is 'same', but '{name}' is not a torchv"
    ):
        build_backbone(name, strided_padding="same")


def test_an_unknown_padding_is_an_error() -> None:
    padding: Any = "valid"
    with pytest.raises(ValueError, match="strided_padding.*'valid'"):
        FPN((1, 1, 1), strided_padding=padding)
    with pytest.raises(ValueError, match="strided_padding.*'valid'"):
        build_backbone("resnet18", strided_padding=padding)


def test_the_pyramid_of_a_custom_backbone_follows_the_config() -> None:
    config = TINY_CONFIG.replace(strided_padding="same")
    model = RetinaNet.from_config(config, backbone=TinyBackbone())
    assert model.fpn.strided_padding == "same"
    assert model.current_config() == config


@pytest.mark.filterwarnings("ignore:The backbone is randomly initialised")
def test_optimised_copies_and_exported_programs_pad_the_same() -> None:
    config = TINY_CONFIG.replace(
        strided_padding="same", backbone="resnet18", backbone_norm="batch", size_divisor=1
    )
    model = RetinaNet.from_config(config).eval()
    optimised = model.optimize_for_inference(winograd=False)
    assert isinstance(optimised.backbone.bn1, torch.nn.Identity)  # folded into the convolution
    for size in ((64, 70), (65, 67), (66, 66)):
        images = torch.rand(1, 3, *size)
        with torch.no_grad():
            for ours, theirs in zip(
                optimised.forward_maps(images)[0], model.forward_maps(images)[0], strict=True
            ):
                assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
