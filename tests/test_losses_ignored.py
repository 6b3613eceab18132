"""Whatever the logits of ignored places are, they change neither the loss nor other gradients.

A mask that is applied too late multiplies NaN by 0, and only in some branches of the kernels: which
one runs depends on the number of entries, on the share of positives and on the largest logit. So
the tests draw all of these together.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from focaldet.losses import (
    focal_star_loss,
    sigmoid_focal_loss,
    sigmoid_focal_loss_maps,
    softmax_focal_loss,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Loss = Callable[[Tensor], Tensor]

IGNORED = -100
# Entries below and above FEW = 32,768 and CHUNK = 131,072, in each memory layout.
SHAPES = [
    (5, 8), (30, 1), (500, 80), (60_000, 1), (1700, 80), (2, 3, 4, 5), (2, 5, 60, 61),
    (1, 2, 300, 301), (3, 4, 100, 111), (2, 140_000),
]  # fmt: skip
GAMMAS = (0.0, 0.3, 0.5, 1.0, 1.5, 2.0, 2.3, 3.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
POISONS = (math.nan, math.inf, -math.inf)


def draw(shape: tuple[int, ...], *, positive: float, large: float) -> tuple[Tensor, Tensor]:
    """Return logits ``[N, K, ...]``, one of them ``large``, and class indices, some ignored."""
    x = torch.randn(shape) - 4
    places = (shape[0], *shape[2:])
    targets = torch.randint(shape[1], places)
    targets[torch.rand(places) >= positive] = -1
    targets[torch.rand(places) < 0.05] = IGNORED
    flat = targets.view(-1)
    flat[0], flat[1] = IGNORED, -1
    rows = x.movedim(1, -1).reshape(-1, shape[1])
    rows[1, 0] = large
    return rows.view(*places, shape[1]).movedim(-1, 1).contiguous(), targets


def result(loss: Loss, x: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss(x)
    (gradient,) = torch.autograd.grad(value, x, upstream)
    return value.detach(), gradient


def check(loss: Loss, x: Tensor, ignored: Tensor, *, poison: float, reduction: str) -> None:
    """Compare the loss with poisoned and with clean logits in the ignored places."""
    clean, dirty = x.masked_fill(ignored, 0.0), x.masked_fill(ignored, poison)
    upstreams: tuple[Tensor | None, Tensor | None] = (None, None)
    if reduction == "none":
        with torch.no_grad():
            losses = loss(clean)
        factors = torch.rand_like(losses)
        outside = ignored if losses.shape == x.shape else ignored.any(1)
        upstreams = factors, factors.masked_fill(outside, math.nan)
    exact, exact_gradient = result(loss, clean, upstreams[0])
    got, gradient = result(loss, dirty, upstreams[1])
    assert exact.isfinite().all()
    assert exact_gradient.isfinite().all()
    assert_close(got, exact, rtol=0, atol=0)
    assert_close(gradient, exact_gradient, rtol=0, atol=0)
    assert (gradient[ignored] == 0).all()


@settings(max_examples=120, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    last=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    gamma=st.sampled_from(GAMMAS),
    alpha=st.sampled_from([0.25, None, "classes"]),
    reduction=st.sampled_from(["sum", "mean", "none"]),
    positive=st.sampled_from([0.001, 0.3]),
    large=st.sampled_from([-1.0, 2.5, 5.0, 30.0, 100.0]),
    poison=st.sampled_from(POISONS),
    inplace=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_the_sigmoid_loss_does_not_depend_on_logits_of_ignored_places(
    shape: tuple[int, ...], last: bool, dtype: torch.dtype, gamma: float, alpha: Any,
    reduction: Any, positive: float, large: float, poison: float, inplace: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    x, targets = draw(shape, positive=positive, large=large)
    x = x.to(dtype)
    if last and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    options: dict[str, Any] = {"gamma": gamma, "reduction": reduction}
    options["alpha"] = torch.rand(shape[1]) if alpha == "classes" else alpha
    options["inplace_gradient"] = inplace and reduction != "none"

    def loss(y: Tensor) -> Tensor:
        return sigmoid_focal_loss(y * 1, targets, **options)

    ignored = (targets == IGNORED).unsqueeze(1).expand(shape)
    check(loss, x, ignored, poison=poison, reduction=reduction)


@settings(max_examples=70, deadline=None)
@given(
    sides=st.sampled_from([(2, 3), (30, 31), (120, 130)]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    dtype=st.sampled_from(DTYPES),
    gamma=st.sampled_from(GAMMAS),
    alpha=st.sampled_from([0.25, None, "classes"]),
    reduction=st.sampled_from(["sum", "mean", "none"]),
    large=st.sampled_from([-1.0, 2.5, 5.0, 30.0, 100.0]),
    poison=st.sampled_from(POISONS),
    per_image=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_the_loss_of_maps_does_not_depend_on_logits_of_ignored_places(
    sides: tuple[int, int], layout: Any, dtype: torch.dtype, gamma: float, alpha: Any,
    reduction: Any, large: float, poison: float, per_image: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    B, A, K, (H, W) = 2, 3, 5, sides
    rows, targets = draw((B, K, H, W, A), positive=0.01, large=large)
    # From [B, K, H, W, A], the order of the targets, to the map [B, A * K, H, W]:
    x = rows.permute(0, 4, 1, 2, 3).reshape(B, A * K, H, W).to(dtype)
    x = x.contiguous(memory_format=layout)
    ignored = (targets == IGNORED).permute(0, 3, 1, 2).unsqueeze(2).expand(B, A, K, H, W)
    options: dict[str, Any] = {"gamma": gamma, "reduction": reduction}
    options["alpha"] = torch.rand(K) if alpha == "classes" else alpha
    options["normalizer"] = torch.tensor([2.0, 3.0]) if per_image else None

    def loss(y: Tensor) -> Tensor:
        losses = sigmoid_focal_loss_maps([y], targets.view(B, -1), num_classes=K, **options)
        if reduction != "none":
            return losses
        return losses.view(B, H, W, A, K).permute(0, 3, 4, 1, 2).reshape(x.shape)

    check(loss, x, ignored.reshape(x.shape), poison=poison, reduction=reduction)


@settings(max_examples=40, deadline=None)
@given(
    star=st.booleans(),
    shape=st.sampled_from([(5, 8), (500, 80), (2, 3, 4, 5)]),
    dtype=st.sampled_from(DTYPES),
    gamma=st.sampled_from(GAMMAS),
    reduction=st.sampled_from(["sum", "mean", "none"]),
    smoothing=st.sampled_from([0.0, 0.1]),
    large=st.sampled_from([-1.0, 5.0, 100.0]),
    poison=st.sampled_from(POISONS),
    seed=st.integers(0, 2**30),
)
def test_the_other_losses_do_not_depend_on_logits_of_ignored_places(
    star: bool, shape: tuple[int, ...], dtype: torch.dtype, gamma: float, reduction: Any,
    smoothing: float, large: float, poison: float, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    x, targets = draw(shape, positive=0.3, large=large)
    if not star:
        targets[targets == -1] = 0

    def loss(y: Tensor) -> Tensor:
        if star:
            return focal_star_loss(y, targets, gamma=max(gamma, 0.3), reduction=reduction)
        return softmax_focal_loss(
            y, targets, gamma=gamma, reduction=reduction, label_smoothing=smoothing
        )

    ignored = (targets == IGNORED).unsqueeze(1).expand(shape)
    check(loss, x.to(dtype), ignored, poison=poison, reduction=reduction)


@pytest.mark.parametrize("size", [(2, 4), (200, 200)])
def test_the_gradient_of_a_map_with_nan_and_a_large_logit_is_worked_by_hand(
    size: tuple[int, int],
) -> None:
    x = torch.zeros(1, 2, *size)
    x[0, :, 0, 0] = math.nan
    x[0, 0, 1, 1] = 5.0
    targets = torch.full((1, math.prod(size)), -1)
    targets[0, 0] = IGNORED
    _, gradient = result(
        lambda y: sigmoid_focal_loss_maps([y], targets, num_classes=2, alpha=None, reduction="sum"),
        x,
    )
    p, q, s = 1 / (1 + math.exp(-5)), 1 / (1 + math.exp(5)), math.log1p(math.exp(5))
    exact = torch.full_like(x, 0.25 * (math.log(2) + 0.5))
    exact[0, :, 0, 0] = 0.0
    exact[0, 0, 1, 1] = p**2 * (2 * q * s + p)
    assert_close(gradient, exact)
