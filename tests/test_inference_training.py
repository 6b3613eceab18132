"""The optimisations of the training step do not change the gradients."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.backbones import FrozenBatchNorm2d

if TYPE_CHECKING:
    from torch import Tensor


def randomise(norm: nn.Module) -> None:
    for name, low, high in (
        ("weight", 0.5, 1.5),
        ("bias", -0.3, 0.3),
        ("running_mean", -0.3, 0.3),
        ("running_var", 0.5, 2.0),
    ):
        getattr(norm, name).uniform_(low, high)


@pytest.fixture
def frozen_model() -> RetinaNet:
    config = RetinaNetConfig(num_classes=3, backbone="resnet18", min_size=64, max_size=96)
    with pytest.warns(UserWarning, match="frozen"):
        model = RetinaNet.from_config(config.replace(fpn_channels=32, head_depth=1))
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            randomise(module)
    return model.train()


def gradients(model: RetinaNet, images: list[Tensor], targets: Any) -> dict[str, Tensor]:
    model.zero_grad()
    losses = model(images, targets).losses
    assert losses is not None
    torch.autograd.backward(list(losses.values()))
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def a_batch(dtype: torch.dtype) -> tuple[list[Tensor], Any]:
    images = [torch.rand(3, 64, 80, dtype=dtype), torch.rand(3, 50, 96, dtype=dtype)]
    boxes = torch.tensor([[8.0, 8, 40, 40], [20, 4, 60, 45]], dtype=dtype)
    return images, [{"boxes": boxes, "labels": torch.tensor([1, 2])}] * 2


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        atol = 1e-8 * float(gradient.abs().max())
        assert_close(found[name], gradient, rtol=1e-8, atol=atol, msg=name)


def test_gradients_equal_those_with_torchvisions_frozen_norm(frozen_model: RetinaNet) -> None:
    model = frozen_model.double()
    batch = a_batch(torch.float64)
    found = {k: v.clone() for k, v in gradients(model, *batch).items()}
    norms = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(norms) == 20
    for module in norms:
        module.__class__ = torchvision.ops.FrozenBatchNorm2d
    assert_same_gradients(found, gradients(model, *batch))


def test_channels_last_keeps_gradients_and_holds_through_the_network(
    frozen_model: RetinaNet,
) -> None:
    model = frozen_model.double()
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    batch = a_batch(torch.float64)
    assert_same_gradients(gradients(channels_last, *batch), gradients(model, *batch))
    output = channels_last(batch[0])
    for level in output.logits[:2] + output.box_deltas[:2]:
        assert level.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_frozen_norm_equals_torchvisions(layout: torch.memory_format) -> None:
    norm, peer = FrozenBatchNorm2d(16, eps=1e-3), torchvision.ops.FrozenBatchNorm2d(16, eps=1e-3)
    randomise(norm)
    peer.load_state_dict(norm.state_dict())
    maps = torch.randn(2, 16, 7, 9).contiguous(memory_format=layout)
    assert_close(norm(maps), peer(maps))
    assert norm(maps).is_contiguous(memory_format=layout)
    low = maps.bfloat16()
    assert norm(low).dtype == torch.bfloat16
    assert_close(norm(low), peer(low.float()).bfloat16(), rtol=2**-7, atol=1e-3)


def test_the_frozen_norm_saves_no_map_for_the_backward_pass() -> None:
    norm = FrozenBatchNorm2d(4)
    kept: list[int] = []

    def keep(value: Tensor) -> Tensor:
        kept.append(value.numel())
        return value

    maps = torch.randn(1, 4, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        norm(maps).sum().backward()
    assert max(kept, default=0) <= 4


def test_the_backbone_stays_in_half_precision_under_autocast(
    frozen_model: RetinaNet,
) -> None:
    images, targets = a_batch(torch.float32)
    seen = []
    frozen_model.fpn.register_forward_pre_hook(lambda _, args: seen.extend(args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = frozen_model(images, targets).losses
    assert {m.dtype for m in seen} == {torch.bfloat16}
    assert losses is not None
    torch.autograd.backward(list(losses.values()))
    for name, parameter in frozen_model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
