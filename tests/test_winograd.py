"""Winograd's minimal filtering gives the same results as the ordinary 3x3 convolution."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from focaldet import RetinaNet, RetinaNetConfig
from focaldet import _optimized as optimized
from focaldet._winograd import WinogradConv2d, is_winograd_faster, use_winograd

CONFIG = RetinaNetConfig(
    num_classes=15,
    backbone="resnet18",
    backbone_norm="batch",
    fpn_channels=128,
    head_depth=1,
    min_size=96,
    max_size=160,
)


def converted(module: nn.Module) -> set[str]:
    return {name for name, part in module.named_modules() if isinstance(part, WinogradConv2d)}


@pytest.fixture
def model() -> RetinaNet:
    return RetinaNet.from_config(CONFIG).eval()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(16, 16), (17, 23), (40, 30), (15, 90), (4, 200)])
@torch.no_grad()
def test_it_equals_the_convolution_in_double_precision(size: tuple[int, int], batch: int) -> None:
    plain = nn.Conv2d(5, 7, 3, padding=1).double()
    images = torch.randn(batch, 5, *size, dtype=torch.float64)
    assert_close(WinogradConv2d.from_conv(plain)(images), plain(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_it_is_close_to_the_convolution_in_single_precision(
    *, bias: bool, layout: torch.memory_format
) -> None:
    plain = nn.Conv2d(256, 256, 3, padding=1, bias=bias)
    image = torch.randn(1, 256, 33, 45).to(memory_format=layout)
    found = WinogradConv2d.from_conv(plain)(image)
    assert found.is_contiguous(memory_format=torch.channels_last) or found.stride(1) == 1
    exact = plain.double()(image.double())
    assert float((found - exact).abs().max() / exact.std()) < 1e-4


@torch.no_grad()
def test_a_small_map_uses_the_ordinary_convolution() -> None:
    plain = nn.Conv2d(128, 128, 3, padding=1)
    image = torch.randn(1, 128, 12, 20)
    assert torch.equal(WinogradConv2d.from_conv(plain)(image), plain(image))


def test_only_wide_convolutions_with_stride_one_are_replaced() -> None:
    convolutions = {
        "plain": nn.Conv2d(128, 300, 3, padding=1),
        "narrow": nn.Conv2d(64, 128, 3, padding=1),
        "narrow_result": nn.Conv2d(128, 36, 3, padding=1),
        "very_wide": nn.Conv2d(512, 512, 3, padding=1),
        "strided": nn.Conv2d(128, 128, 3, stride=2, padding=1),
        "unpadded": nn.Conv2d(128, 128, 3),
        "dilated": nn.Conv2d(128, 128, 3, padding=1, dilation=2),
        "grouped": nn.Conv2d(128, 128, 3, padding=1, groups=32),
        "pointwise": nn.Conv2d(128, 128, 1),
        "reflecting": nn.Conv2d(128, 128, 3, padding=1, padding_mode="reflect"),
        "normalised": nn.utils.parametrizations.weight_norm(nn.Conv2d(128, 128, 3, padding=1)),
    }
    module = nn.ModuleDict(convolutions)
    use_winograd(module)
    assert converted(module) == {"plain"}


def test_an_optimised_model_gives_the_same_maps_and_keeps_its_parameters(model: RetinaNet) -> None:
    plain, fast = (model.optimize_for_inference(winograd=winograd) for winograd in (False, True))
    assert not converted(plain)
    assert {"fpn.output.0", "head.class_tower.0.conv", "head.class_logits"} <= converted(fast)
    assert "head.box_deltas" not in converted(fast)
    assert plain.state_dict().keys() == fast.state_dict().keys()
    images = [torch.rand(3, 96, 160), torch.rand(3, 96, 120)]
    for other in (fast, copy.deepcopy(fast)):
        for ours, theirs in zip(other(images)[:2], plain(images)[:2], strict=True):
            assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_it_compiles_as_one_graph(model: RetinaNet) -> None:
    fast = model.optimize_for_inference(winograd=True)
    images = torch.rand(1, 3, 96, 160)
    compiled = torch.compile(fast.forward_maps, fullgraph=True, backend="aot_eager")
    assert_close(compiled(images), fast.forward_maps(images))


@pytest.mark.parametrize("faster", [True, False])
def test_by_default_a_measurement_decides(
    model: RetinaNet, monkeypatch: pytest.MonkeyPatch, *, faster: bool
) -> None:
    calls = []

    def measure(threads: int) -> bool:
        calls.append(threads)
        return faster

    monkeypatch.setattr(optimized, "is_winograd_faster", measure)
    assert bool(converted(model.optimize_for_inference())) == faster
    assert calls == [torch.get_num_threads()]
    assert not converted(model.optimize_for_inference(torch.bfloat16))
    assert len(calls) == 1


def test_the_measurement_is_made_once() -> None:
    threads = torch.get_num_threads()
    is_winograd_faster.cache_clear()
    assert is_winograd_faster(threads) == is_winograd_faster(threads)
    assert is_winograd_faster.cache_info().hits == 1
