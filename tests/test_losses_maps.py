"""The loss of a head's maps equals the loss of the same logits in rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from focaldet.losses import sigmoid_focal_loss, sigmoid_focal_loss_maps

SIZES = [(14, 16), (7, 8), (2, 3), (1, 1)]


def in_rows(maps: list[Tensor], classes: int) -> Tensor:
    """Return the logits as ``[B, K, R]``, ordered by level, row, column and anchor."""
    rows = []
    for m in maps:
        B, C, H, W = m.shape
        rows.append(
            m.reshape(B, C // classes, classes, H, W).permute(0, 2, 3, 4, 1).reshape(B, classes, -1)
        )
    return torch.cat(rows, 2)


def make(
    batch: int, anchors: int, classes: int, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    maps = [(torch.randn(batch, anchors * classes, h, w) * 3 - 3).to(dtype) for h, w in SIZES]
    places = sum(h * w * anchors for h, w in SIZES)
    targets = torch.randint(classes, (batch, places))
    draw = torch.rand(batch, places)
    targets[draw > 0.02] = -1
    targets[draw > 0.97] = -100
    return maps, targets


def gradients_of(loss: Tensor, maps: list[Tensor]) -> list[Tensor]:
    wanted = [m for m in maps if m.requires_grad]
    return list(torch.autograd.grad(loss, wanted, retain_graph=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last, "mixed", "odd"])
@pytest.mark.parametrize(("batch", "anchors", "classes"), [(2, 3, 5), (3, 9, 80), (1, 2, 1)])
@pytest.mark.parametrize("options", [
    {"reduction": "sum", "normalizer": "num_pos"},
    {"reduction": "mean", "gamma": 1.5},
    {"reduction": "sum", "gamma": 0.3, "alpha": None},
    {"reduction": "sum", "alpha": "classes", "normalizer": torch.tensor(7.0)},
])  # fmt: skip
def test_maps_in_any_layout_have_the_loss_and_gradient_of_rows(
    batch: int, anchors: int, classes: int, layout: Any, options: dict[str, Any]
) -> None:
    maps, targets = make(batch, anchors, classes)
    if options.get("alpha") == "classes":
        options = options | {"alpha": torch.rand(classes)}
    if layout == "odd":
        maps = [m.transpose(2, 3).contiguous().transpose(2, 3) for m in maps]
    elif layout == "mixed":
        maps[0] = maps[0].contiguous(memory_format=torch.channels_last)
    else:
        maps = [m.contiguous(memory_format=layout) for m in maps]
    exact_maps = [m.double().requires_grad_() for m in maps]
    for m in maps:
        m.requires_grad_()
    loss = sigmoid_focal_loss_maps(maps, targets, num_classes=classes, **options)
    exact = sigmoid_focal_loss(in_rows(exact_maps, classes), targets, **options)
    assert_close(loss.double(), exact, rtol=1.3e-6, atol=0)
    largest = max(g.abs().max().item() for g in gradients_of(exact, exact_maps))
    pairs = zip(maps, gradients_of(loss, maps), gradients_of(exact, exact_maps), strict=True)
    for m, got, want in pairs:
        assert_close(got.double(), want, rtol=0, atol=5e-6 * largest)
        if layout != "odd":
            assert got.stride() == m.stride()
    in_double = sigmoid_focal_loss_maps(exact_maps, targets, num_classes=classes, **options)
    assert_close(in_double, exact, rtol=1e-12, atol=0)
    assert_close(gradients_of(in_double, exact_maps), gradients_of(exact, exact_maps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_image_can_have_its_own_normalizer(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    maps, targets = make(3, 2, 4, dtype)
    maps = [m.contiguous(memory_format=layout).requires_grad_() for m in maps]
    numbers = torch.tensor([2.0, 5.0, 0.5], dtype=dtype)
    together = sigmoid_focal_loss_maps(
        maps, targets, num_classes=4, reduction="sum", normalizer=numbers
    )
    separate = [
        sigmoid_focal_loss_maps(
            [m[b : b + 1] for m in maps], targets[b : b + 1], num_classes=4, reduction="sum"
        )
        / numbers[b]
        for b in range(3)
    ]
    exact = torch.stack(separate).sum()
    assert_close(together, exact, rtol=1e-6, atol=0)
    assert_close(gradients_of(together, maps), gradients_of(exact, maps), rtol=1e-5, atol=1e-7)
    each = sigmoid_focal_loss_maps(
        maps, targets, num_classes=4, reduction="none", normalizer=numbers
    )
    assert_close(each.sum(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_only_maps_that_require_a_gradient_get_one(dtype: torch.dtype) -> None:
    maps, targets = make(2, 3, 5, dtype)
    maps[1].requires_grad_()
    maps[3].requires_grad_()
    loss = sigmoid_focal_loss_maps(maps, targets, num_classes=5, reduction="sum")
    torch.autograd.backward(3 * loss)
    assert maps[0].grad is None
    assert maps[2].grad is None
    everything = [m.detach().clone().requires_grad_() for m in maps]
    exact = sigmoid_focal_loss_maps(everything, targets, num_classes=5, reduction="sum")
    gradients = gradients_of(3 * exact, everything)
    assert_close(maps[1].grad, gradients[1])
    assert_close(maps[3].grad, gradients[3])
    with torch.no_grad():
        assert not sigmoid_focal_loss_maps(everything, targets, num_classes=5).requires_grad


def test_losses_without_reduction_are_in_the_order_of_the_targets() -> None:
    maps, targets = make(2, 3, 5)
    losses = sigmoid_focal_loss_maps(maps, targets, num_classes=5, reduction="none")
    assert losses.shape == (*targets.shape, 5)
    exact = sigmoid_focal_loss(in_rows(maps, 5), targets, reduction="none").movedim(1, -1)
    assert_close(losses, exact)
    total = sigmoid_focal_loss_maps(maps, targets, num_classes=5, reduction="sum")
    assert_close(losses.sum(), total)


def test_channels_are_ordered_by_anchor_and_then_by_class() -> None:
    m = torch.full((1, 2 * 3, 1, 2), -9.0)  # two anchors, three classes, two columns
    m[0, 1 * 3 + 2, 0, 1] = 9.0  # anchor 1, class 2, column 1
    targets = torch.full((1, 4), -1)
    targets[0, 1 * 2 + 1] = 2  # column 1, anchor 1
    assert sigmoid_focal_loss_maps([m], targets, num_classes=3, reduction="sum") < 1e-6


def test_an_empty_batch_has_a_loss_of_0() -> None:
    maps = [torch.empty(0, 6, 2, 2, requires_grad=True)]
    loss = sigmoid_focal_loss_maps(maps, torch.empty(0, 8, dtype=torch.int64), num_classes=3)
    assert_close(loss.detach(), torch.tensor(0.0))


def test_an_in_place_change_of_one_map_before_backward_raises() -> None:
    maps, targets = make(1, 2, 4)
    maps = [m.requires_grad_() * 1 for m in maps]
    loss = sigmoid_focal_loss_maps(maps, targets, num_classes=4)
    maps[2].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss)


def test_a_double_backward_through_maps_matches_float64() -> None:
    maps, targets = make(1, 2, 4)
    seconds = []
    for dtype in (torch.float32, torch.float64):
        ms = [m.to(dtype).requires_grad_() for m in maps]
        loss = sigmoid_focal_loss_maps(ms, targets, num_classes=4, reduction="sum")
        first = torch.autograd.grad(loss, ms, create_graph=True)
        square = torch.stack([g.square().sum() for g in first]).sum()
        seconds.append([g.double() for g in torch.autograd.grad(square, ms)])
    assert_close(*seconds, rtol=1e-4, atol=1e-5)


def test_invalid_maps_and_targets_raise() -> None:
    maps, targets = make(2, 3, 5)

    def loss(maps: Any = maps, targets: Any = targets, **options: Any) -> Tensor:
        return sigmoid_focal_loss_maps(maps, targets, **({"num_classes": 5} | options))

    with pytest.raises(ValueError, match="maps is empty"):
        loss([])
    with pytest.raises(ValueError, match="num_classes.*at least 1.*0"):
        loss(num_classes=0)
    with pytest.raises(TypeError, match=r"floating-point maps\[1\].*torch\.int64"):
        loss([maps[0], maps[1].long()])
    with pytest.raises(ValueError, match=r"maps\[0\].*num_classes=7.*\[2, 15, 14, 16\]"):
        loss(num_classes=7)
    with pytest.raises(ValueError, match=r"maps\[0\].*float32 on cpu.*maps\[1\].*float64 on cpu"):
        loss([maps[0], maps[1].double()])
    with pytest.raises(ValueError, match=r"targets.*\[2, 861\].*\[2, 860\]"):
        loss(targets=targets[:, 1:])
    with pytest.raises(TypeError, match=r"targets.*class indices.*float32.*sigmoid_focal_loss"):
        loss(targets=targets.float())
    with pytest.raises(ValueError, match="targets contains 5.*0 to 4"):
        loss(targets=targets.masked_fill(targets == -1, 5))
    with pytest.raises(ValueError, match="targets contains 5.*0 to 4"):
        loss([m.double() for m in maps], targets.masked_fill(targets == -1, 5))
    with pytest.raises(ValueError, match=r"normalizer.*\[2\].*\[3\]"):
        loss(normalizer=torch.ones(3))
    with pytest.raises(ValueError, match=r"alpha.*\[4\].*classes is 5"):
        loss(alpha=torch.rand(4))
