"""The focal losses compared with hand-computed numbers, float64 and the losses of PyTorch."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss as torchvision_loss

from focaldet.losses import (
    FocalLoss,
    SoftmaxFocalLoss,
    focal_star_loss,
    sigmoid_focal_loss,
    softmax_focal_loss,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

GAMMAS = (0.0, 0.1, 0.5, 1.0, 1.5, 2.0, 2.3, 3.0, 5.0)
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1.3e-6, 5e-6


def reference(logits: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Compute loss and gradient in float64, as the paper writes them."""
    alpha, gamma = options.get("alpha", 0.25), options.get("gamma", 2.0)
    ignore = options.get("ignore_index", -100)
    x = logits.detach().double().requires_grad_()
    dim = 1 if x.ndim > 1 else 0
    if targets.is_floating_point():
        t, keep = targets.double(), torch.ones_like(x, dtype=torch.bool)
    else:
        classes = torch.arange(x.shape[dim]).view(-1, *[1] * (x.ndim - dim - 1))
        keep = (targets != ignore).unsqueeze(dim).expand_as(x)
        t = (targets.unsqueeze(dim) == classes).double() * keep
    z = x.where(keep, 0.0)
    log_p, log_q = F.logsigmoid(z), F.logsigmoid(-z)
    log_p, log_q = log_p.where(t > 0, 0.0), log_q.where(t < 1, 0.0)
    cross_entropy = -(t * log_p + (1 - t) * log_q)
    error = t * torch.sigmoid(-z) + (1 - t) * torch.sigmoid(z)
    # error ** gamma with a derivative where the error is too small for a double
    power = (gamma * error.clamp(min=1e-300).log()).exp() if gamma else torch.ones_like(z)
    losses = power * cross_entropy
    if alpha is not None:
        if not isinstance(alpha, float):
            alpha = alpha.double().view(-1, *[1] * (x.ndim - dim - 1))
        losses = losses * (alpha * t + (1 - alpha) * (1 - t))
    losses = losses * keep
    if options.get("reduction") == "none":
        total = losses
    elif options.get("reduction") == "sum":
        total = losses.sum()
    else:
        total = losses.sum() / keep.sum().clamp(min=1)
    (gradient,) = torch.autograd.grad(total.sum(), x)
    return total.detach(), gradient


def loss_and_gradient(logits: Tensor, targets: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    x = logits.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = sigmoid_focal_loss(x, targets, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), gradient


def relative_error(value: Tensor, exact: Tensor, scale: float = 1e-30) -> float:
    """Return the largest error relative to the largest exact entry, or to ``scale`` if larger.

    The default of ``scale`` is about the smallest number that float32 resolves.
    """
    if exact.numel() == 0:
        return 0.0
    largest = exact.abs().max().clamp(min=scale)
    return ((value.double() - exact).abs().max() / largest).item()


def check(logits: Tensor, targets: Tensor, **options: Any) -> None:
    loss, gradient = loss_and_gradient(logits, targets, **options)
    exact_loss, exact_gradient = reference(logits, targets, **options)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.shape == logits.shape
    assert relative_error(loss, exact_loss) <= LOSS_TOLERANCE
    scale = 1e-30
    if targets.is_floating_point() and logits.numel():
        # The gradient for a soft target is the difference of two terms and vanishes near the
        # target, so its error is relative to the terms. This is one of them, without its factor.
        x, t = logits.double(), targets.double()
        error = t * torch.sigmoid(-x) + (1 - t) * torch.sigmoid(x)
        term = error ** options.get("gamma", 2.0) * (torch.sigmoid(x) - t)
        alpha = options.get("alpha", 0.25)
        if isinstance(alpha, float):
            term = term * (alpha * t + (1 - alpha) * (1 - t))
        scale = term.abs().max().item()
        if options.get("reduction", "mean") == "mean":
            scale /= logits.numel()
    assert relative_error(gradient, exact_gradient, max(scale, 1e-30)) <= GRADIENT_TOLERANCE


def some_targets(
    shape: tuple[int, ...], classes: int, *, positive: float, ignored: float
) -> Tensor:
    draw = torch.rand(shape)
    targets = torch.randint(classes, shape)
    targets[draw > positive] = -1
    targets[torch.rand(shape) < ignored] = -100
    return targets


def test_the_loss_of_a_few_entries_is_worked_by_hand() -> None:
    # p = 1/2: alpha (1/2)^2 log 2 for the positive, (1 - alpha) (1/2)^2 log 2 for the background
    losses = sigmoid_focal_loss(torch.zeros(1, 2), torch.tensor([1]), reduction="none")
    assert_close(losses, torch.tensor([[0.75, 0.25]]) / 4 * math.log(2))
    # p_t = 0.9 has a hundredth of the cross-entropy (section 3.2 of the paper)
    x = torch.tensor([[math.log(9.0)]])
    ratio = sigmoid_focal_loss(x, torch.tensor([0]), alpha=None) / F.softplus(-x)
    assert_close(ratio, torch.tensor([[0.01]]), rtol=1e-5, atol=0)


def test_alpha_weights_positives_and_1_minus_alpha_weights_background() -> None:
    x = torch.zeros(2, 1)
    positive, background = sigmoid_focal_loss(
        x, torch.tensor([0, -1]), alpha=0.9, gamma=0.0, reduction="none"
    ).flatten()
    assert_close(positive / background, torch.tensor(9.0))


def test_a_tensor_alpha_weights_each_class_separately() -> None:
    x, t = torch.randn(7, 3), torch.tensor([0, 1, 2, -1, 0, -100, 2])
    alpha = torch.tensor([0.1, 0.5, 0.9])
    together = sigmoid_focal_loss(x, t, alpha=alpha, reduction="none")
    for k, a in enumerate(alpha.tolist()):
        one = sigmoid_focal_loss(x, t, alpha=a, reduction="none")
        assert_close(together[:, k], one[:, k])


@pytest.mark.parametrize("shape", [(5, 4), (400, 80), (50_000, 1), (3, 4, 5, 6), (2, 9, 80, 70)])
def test_gamma_0_without_alpha_is_the_binary_cross_entropy(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape) * 3
    soft = torch.rand(shape)
    hard = torch.randint(-1, shape[1], (shape[0], *shape[2:]))
    one_hot = F.one_hot(hard + 1, shape[1] + 1)[..., 1:].movedim(-1, 1).float()
    for reduction in ("mean", "sum", "none"):
        for mine, theirs in ((soft, soft), (hard, one_hot)):
            got = sigmoid_focal_loss(x, mine, alpha=None, gamma=0.0, reduction=reduction)
            exact = F.binary_cross_entropy_with_logits(
                x.double(), theirs.double(), reduction=reduction
            )
            assert relative_error(got, exact) <= LOSS_TOLERANCE


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_softmax_loss_at_gamma_0_is_the_cross_entropy(
    reduction: Any, smoothing: float, weights: bool
) -> None:
    x, t = torch.randn(6, 5, 3, dtype=torch.float64) * 4, torch.randint(5, (6, 3))
    t[0, 0] = t[3, 2] = -100
    alpha = torch.rand(5, dtype=torch.float64) if weights else None
    if weights and reduction == "mean":
        return  # PyTorch divides this mean by the weights, focaldet by the count
    got = softmax_focal_loss(
        x, t, alpha=alpha, gamma=0.0, reduction=reduction, label_smoothing=smoothing
    )
    assert_close(
        got,
        F.cross_entropy(x, t, weight=alpha, reduction=reduction, label_smoothing=smoothing),
    )


def test_the_softmax_loss_accepts_probabilities_like_cross_entropy() -> None:
    x, t = torch.randn(6, 5, 3, dtype=torch.float64), torch.rand(6, 5, 3, dtype=torch.float64)
    t = t / t.sum(1, keepdim=True)
    assert_close(
        softmax_focal_loss(x, t, gamma=0.0, reduction="sum"), F.cross_entropy(x, t, reduction="sum")
    )


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_softmax_loss_is_the_formula_of_its_probability(gamma: float) -> None:
    x, t = torch.randn(40, 6, dtype=torch.float64) * 3, torch.randint(6, (40,))
    p = x.softmax(1)[torch.arange(40), t]
    weights = torch.rand(6, dtype=torch.float64)
    exact = -weights[t] * (1 - p) ** gamma * p.log()
    got = softmax_focal_loss(x, t, alpha=weights, gamma=gamma, reduction="none")
    assert_close(got, exact, rtol=1e-9, atol=1e-12)
    one_hot = F.one_hot(t, 6).double()
    soft = softmax_focal_loss(x, one_hot, alpha=weights, gamma=gamma, reduction="none")
    assert_close(soft, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_the_softmax_loss_is_accurate_where_the_class_is_nearly_certain(gamma: float) -> None:
    x = torch.tensor([[30.0, 0.0, -3.0], [1e4, 0.0, 0.0], [-1e4, 0.0, 5.0]])
    t = torch.zeros(3, dtype=torch.int64)
    got = softmax_focal_loss(x.requires_grad_(), t, gamma=gamma, reduction="none")
    exact = softmax_focal_loss(x.double(), t, gamma=gamma, reduction="none")
    assert_close(got.double(), exact, rtol=1e-6, atol=1e-30)
    assert got[0] > 0
    torch.autograd.backward(got.sum())
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_the_softmax_loss_of_one_class_and_its_gradient_are_0() -> None:
    x = torch.randn(3, 1, requires_grad=True)
    loss = softmax_focal_loss(x, torch.zeros(3, dtype=torch.int64), reduction="sum")
    torch.autograd.backward(loss)
    assert_close(loss, torch.tensor(0.0))
    assert_close(x.grad, torch.zeros(3, 1))


def test_the_star_loss_is_the_formula_of_appendix_a() -> None:
    x, t = torch.randn(9, 4, dtype=torch.float64), torch.tensor([0, 3, -1, 2, -1, -1, 1, -100, 0])
    sign = torch.where(F.one_hot(t.clamp(min=-1) + 1, 5)[:, 1:].bool(), 1.0, -1.0).double()
    exact = -torch.log(torch.sigmoid(4.0 * sign * x + 0.5)) / 4.0
    exact[t == -100] = 0
    got = focal_star_loss(x, t, alpha=None, gamma=4.0, beta=0.5, reduction="none")
    assert_close(got, exact)
    # appendix B: dFL*/dx = y (p_t* - 1)
    x.requires_grad_()
    torch.autograd.backward(focal_star_loss(x, t, alpha=None, gamma=4.0, beta=0.5, reduction="sum"))
    slope = sign * (torch.sigmoid(4.0 * sign * x + 0.5) - 1)
    assert_close(x.grad, slope.detach().masked_fill((t == -100).unsqueeze(1), 0.0))


def test_the_star_loss_weights_soft_targets_and_alpha_as_documented() -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    yes, no = torch.ones_like(x), torch.zeros_like(x)
    t = torch.rand_like(x)
    each = {"alpha": None, "reduction": "none"}
    mean = t * focal_star_loss(x, yes, **each) + (1 - t) * focal_star_loss(x, no, **each)  # type: ignore[arg-type]
    assert_close(focal_star_loss(x, t, alpha=None, reduction="none"), mean)
    a = focal_star_loss(x, yes, alpha=0.2) / focal_star_loss(x, yes, alpha=None)
    b = focal_star_loss(x, no, alpha=0.2) / focal_star_loss(x, no, alpha=None)
    assert_close(torch.stack([a, b]), torch.tensor([0.2, 0.8], dtype=torch.float64))
    infinite = torch.tensor([[torch.inf, -torch.inf]])
    assert_close(focal_star_loss(infinite, torch.tensor([[1.0, 0.0]])), torch.tensor(0.0))


@pytest.mark.parity
@pytest.mark.parametrize("alpha", [None, 0.25, 0.8])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("rows", [12, 600])
def test_hard_and_soft_targets_agree_with_torchvision(
    rows: int, gamma: float, alpha: float | None
) -> None:
    x = torch.randn(rows, 80, dtype=torch.float64).requires_grad_()
    t = some_targets((rows,), 80, positive=0.3, ignored=0.0)
    one_hot = F.one_hot(t + 1, 81)[:, 1:].double()
    for mine, theirs in ((t, one_hot), (soft := torch.rand_like(x), soft)):
        exact = torchvision_loss(x, theirs, -1 if alpha is None else alpha, gamma, "sum")
        (exact_gradient,) = torch.autograd.grad(exact, x)
        for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, LOSS_TOLERANCE)):
            got, gradient = loss_and_gradient(
                x.to(dtype), mine.to(dtype) if mine.is_floating_point() else mine,
                alpha=alpha, gamma=gamma, reduction="sum",
            )  # fmt: skip
            assert_close(got.double(), exact.detach(), rtol=rtol, atol=0)
            assert relative_error(gradient, exact_gradient) <= 5e-6


@settings(max_examples=100)
@given(
    classes=st.sampled_from([1, 2, 3, 80, 365]),
    gamma=st.sampled_from(GAMMAS),
    alpha=st.sampled_from([0.25, None, 0.0, 1.0, "classes"]),
    center=st.sampled_from([-20.0, -5.0, 0.0, 6.0]),
    spread=st.sampled_from([0.0, 1.0, 8.0, 1e4]),
    positive=st.sampled_from([0.0, 0.001, 0.3, 1.0]),
    ignored=st.sampled_from([0.0, 0.001, 0.5, 1.0]),
    reduction=st.sampled_from(["sum", "mean", "none"]),
    many=st.booleans(),
    seed=st.integers(0, 2**30),
)
def test_loss_and_gradient_for_class_indices_match_float64(
    classes: int, gamma: float, alpha: Any, center: float, spread: float,
    positive: float, ignored: float, reduction: str, many: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    rows = max(40_000 // classes, 1) if many else 11
    x = (torch.randn(rows, classes) * spread + center).clamp(-1e4, 1e4)
    t = some_targets((rows,), classes, positive=positive, ignored=ignored)
    if alpha == "classes":
        alpha = torch.rand(classes)
    check(x, t, alpha=alpha, gamma=gamma, reduction=reduction)


@settings(max_examples=100)
@given(
    shape=st.sampled_from([(), (3,), (4, 1), (3, 5), (2, 7, 3, 2), (1400, 80)]),
    gamma=st.sampled_from(GAMMAS),
    alpha=st.sampled_from([0.25, None, 0.0, 1.0]),
    center=st.sampled_from([-5.0, 0.0, 6.0]),
    spread=st.sampled_from([0.0, 1.0, 8.0, 1e4]),
    kind=st.sampled_from(["soft", "nearly 0", "nearly 1", "hard"]),
    reduction=st.sampled_from(["sum", "mean", "none"]),
    seed=st.integers(0, 2**30),
)
def test_loss_and_gradient_for_float_targets_match_float64(
    shape: tuple[int, ...], gamma: float, alpha: float | None, center: float, spread: float,
    kind: str, reduction: str, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    x = (torch.randn(shape) * spread + center).clamp(-1e4, 1e4)
    t = torch.rand(shape)
    t = {"soft": t, "nearly 0": t.pow(8), "nearly 1": 1 - t.pow(8), "hard": t.round()}[kind]
    check(x, t, alpha=alpha, gamma=gamma, reduction=reduction)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("few", [True, False])
def test_equal_logits_are_summed_accurately(gamma: float, few: bool) -> None:
    # Rounding errors of equal entries are equal, so they do not cancel in the sum.
    rows = 5 if few else 500
    for x in (-12.0, -4.59511985, -2.0, -1e-3, 0.0, 0.7, 2.0, 3.9, 4.1, 9.0, 88.0):
        check(torch.full((rows, 80), x), torch.full((rows,), -1), gamma=gamma, reduction="sum")
        soft = torch.full((rows, 80), 0.999)
        check(torch.full((rows, 80), x), soft, gamma=gamma, reduction="sum")


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("rows", [3, 30_000])
def test_infinite_logits_with_the_correct_sign_have_zero_loss_and_gradient(
    gamma: float, rows: int
) -> None:
    x = torch.full((rows, 2), -torch.inf)
    t = torch.full((rows,), -1)
    x[1, 1], t[1] = torch.inf, 1
    for targets in (t, F.one_hot(t + 1, 3)[:, 1:].float()):
        loss, gradient = loss_and_gradient(x, targets, gamma=gamma, reduction="sum")
        assert_close(loss, torch.tensor(0.0))
        assert_close(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("rows", [20, 30_000])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_ignored_rows_affect_nothing(poison: float, rows: int, gamma: float) -> None:
    x = torch.randn(rows, 2) - 3
    t = some_targets((rows,), 2, positive=0.01, ignored=0.05)
    t[4] = -100
    clean = loss_and_gradient(x, t, gamma=gamma, reduction="sum")
    x[t == -100] = poison
    dirty = loss_and_gradient(x, t, gamma=gamma, reduction="sum")
    assert_close(dirty, clean)
    assert (dirty[1][t == -100] == 0).all()
    losses, _ = loss_and_gradient(x, t, gamma=gamma, reduction="none")
    assert (losses[t == -100] == 0).all()


def test_nan_in_a_row_that_is_not_ignored_gives_nan() -> None:
    for rows in (10, 30_000):
        x, t = torch.randn(rows, 2), torch.full((rows,), -1)
        x[7, 1] = torch.nan
        loss, gradient = loss_and_gradient(x, t)
        assert loss.isnan()
        assert gradient[7, 1].isnan()


@pytest.mark.parametrize("count", [(0, 0), (1, 0), (0, 1), (1, 1), (2, 3)])
def test_small_numbers_of_positives_and_ignored_rows_are_counted_correctly(
    count: tuple[int, int],
) -> None:
    x, t = torch.randn(3000, 40), torch.full((3000,), -1)
    where = torch.randperm(3000)
    t[where[: count[0]]] = 17
    t[where[count[0] : sum(count)]] = -100
    for reduction in ("sum", "mean"):
        check(x, t, reduction=reduction)
    total = sigmoid_focal_loss(x, t, reduction="sum")
    normal = sigmoid_focal_loss(x, t, reduction="sum", normalizer="num_pos")
    assert_close(normal, total / max(count[0], 1))


@pytest.mark.parametrize("rows", [20, 2000])
@pytest.mark.parametrize("ignore_index", [-1, 3, 255, -7])
def test_any_index_can_be_ignored(ignore_index: int, rows: int) -> None:
    x, t = torch.randn(rows, 80), torch.randint(-1, 80, (rows,))
    t[::7] = ignore_index
    check(x, t, ignore_index=ignore_index)
    keep = t != ignore_index
    left = sigmoid_focal_loss(x[keep], t[keep], normalizer="num_pos", reduction="sum")
    right = sigmoid_focal_loss(
        x, t, normalizer="num_pos", reduction="sum", ignore_index=ignore_index
    )
    assert_close(left, right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.5, 1.5, 2.0, 2.3])
@pytest.mark.parametrize("rows", [30, 3000])
def test_half_precision_is_rounded_once(rows: int, gamma: float, dtype: torch.dtype) -> None:
    x = (torch.randn(rows, 40) * 3 - 2).to(dtype)
    t = some_targets((rows,), 40, positive=0.02, ignored=0.02)
    soft = torch.rand(rows, 40).pow(4).to(dtype)
    for targets in (t, soft):
        for factor in (1.0, 3.0):
            y = x.clone().requires_grad_()
            loss = sigmoid_focal_loss(y, targets, gamma=gamma, reduction="sum")
            torch.autograd.backward(loss * factor)
            exact, gradient = reference(x, targets, gamma=gamma, reduction="sum")
            assert loss.dtype == torch.float32
            assert relative_error(loss.detach(), exact) <= LOSS_TOLERANCE
            assert y.grad is not None
            assert y.grad.dtype == dtype
            once = (gradient * factor).to(dtype)
            assert_close(y.grad, once, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_a_loss_scaler_keeps_float16_gradients_from_underflowing() -> None:
    x = (torch.randn(1000, 80) - 4).half().requires_grad_()
    t = some_targets((1000,), 80, positive=0.1, ignored=0.0)
    torch.autograd.backward(sigmoid_focal_loss(x, t) * 65536)
    assert x.grad is not None
    _, exact = reference(x, t)
    assert relative_error(x.grad, exact * 65536) < 1e-3


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("size", [(3, 5, 4, 6), (2, 80, 30, 33), (1, 3, 300, 301), (0, 3, 2, 2)])
def test_all_memory_layouts_give_the_same_numbers(size: tuple[int, ...], layout: str) -> None:
    x = torch.randn(size) * 2 - 3
    if layout == "channels_last":
        y = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        y = torch.stack([x, x], -1)[..., 0]
    elif layout == "transposed":
        y = x.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        x = x[:, :, :1].expand_as(x).contiguous()
        y = x[:, :, :1].expand_as(x)
    t = some_targets((size[0], *size[2:]), size[1], positive=0.02, ignored=0.02)
    for targets in (t, torch.rand(size)):
        for alpha in (0.25, torch.rand(size[1])):
            for reduction in ("sum", "none"):
                a, b = x.clone().requires_grad_(), y.detach().requires_grad_()
                p = sigmoid_focal_loss(a, targets, alpha=alpha, reduction=reduction)
                q = sigmoid_focal_loss(b, targets, alpha=alpha, reduction=reduction)
                upstream = torch.rand(p.shape)
                torch.autograd.backward((p * upstream).sum())
                torch.autograd.backward((q * upstream).sum())
                assert_close(p, q, rtol=2e-6, atol=1e-7)
                assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_targets_have_the_shapes_of_cross_entropy() -> None:
    x = torch.randn(4, 3, 5, 6)
    t = some_targets((4, 5, 6), 3, positive=0.3, ignored=0.1)
    flat = sigmoid_focal_loss(x.movedim(1, -1).reshape(-1, 3), t.flatten())
    assert_close(sigmoid_focal_loss(x, t), flat)
    one = sigmoid_focal_loss(x[0, :, 0, 0], t[0, 0, 0], reduction="none")
    assert one.shape == (3,)
    assert_close(one, sigmoid_focal_loss(x, t, reduction="none")[0, :, 0, 0])


@pytest.mark.parametrize("rows", [9, 1000])
def test_normalizers_divide_the_losses(rows: int) -> None:
    x, t = torch.randn(rows, 80), some_targets((rows,), 80, positive=0.02, ignored=0.1)
    t[0] = 5
    total = sigmoid_focal_loss(x, t, reduction="sum")
    positives = int((t >= 0).sum())
    cases: list[tuple[Any, float]] = [(4.0, 4.0), (torch.tensor(4.0), 4.0), ("num_pos", positives)]
    for normalizer, number in cases:
        assert_close(
            sigmoid_focal_loss(x, t, reduction="sum", normalizer=normalizer), total / number
        )
    each = sigmoid_focal_loss(x, t, reduction="none", normalizer="num_pos")
    assert_close(each.sum(), total / positives)
    one_hot = F.one_hot(t.clamp(min=-1) + 1, 81)[:, 1:].float()
    for loss in (sigmoid_focal_loss, focal_star_loss):
        soft = loss(x, one_hot, reduction="sum")
        assert_close(loss(x, one_hot, reduction="sum", normalizer="num_pos"), soft / positives)
    no_positive = torch.full((rows,), -1)
    assert_close(
        sigmoid_focal_loss(x, no_positive, reduction="sum", normalizer="num_pos"),
        sigmoid_focal_loss(x, no_positive, reduction="sum"),
    )


def test_an_empty_batch_has_a_loss_of_0() -> None:
    for x, t in (
        (torch.empty(0, 4), torch.empty(0, dtype=torch.int64)),
        (torch.empty(3, 0), torch.full((3,), -1)),
        (torch.randn(3, 4), torch.full((3,), -100)),
        (torch.randn(900, 80), torch.full((900,), -100)),
        (torch.empty(0, 4), torch.empty(0, 4)),
    ):
        for reduction in ("mean", "sum"):
            loss, gradient = loss_and_gradient(x, t, reduction=reduction)
            assert_close(loss, torch.tensor(0.0))
            assert_close(gradient, torch.zeros_like(x))
        assert loss_and_gradient(x, t, reduction="none")[0].shape == x.shape
    t = torch.full((3,), -100)
    assert_close(softmax_focal_loss(torch.randn(3, 4), t), torch.tensor(0.0))
    assert_close(focal_star_loss(torch.randn(3, 4), t), torch.tensor(0.0))


MODULES: list[tuple[type[torch.nn.Module], Callable[..., Tensor]]] = [
    (FocalLoss, sigmoid_focal_loss),
    (SoftmaxFocalLoss, softmax_focal_loss),
]


@pytest.mark.parametrize(("module", "function"), MODULES)
def test_a_module_has_the_argument_names_order_and_defaults_of_its_function(
    module: type[torch.nn.Module], function: Callable[..., Tensor]
) -> None:
    of_module = list(inspect.signature(module).parameters.values())
    of_function = list(inspect.signature(function).parameters.values())[2:]
    assert [(p.name, p.default) for p in of_module] == [(p.name, p.default) for p in of_function]


@pytest.mark.parametrize(("module", "function"), MODULES)
def test_a_module_can_be_copied_pickled_and_moved(
    module: type[torch.nn.Module], function: Callable[..., Tensor]
) -> None:
    alpha, normalizer = torch.tensor([0.2, 0.4, 0.6]), torch.tensor(3.0)
    loss = module(alpha, 1.5, reduction="sum", normalizer=normalizer, ignore_index=-3)
    x, t = torch.randn(5, 3), torch.tensor([0, 1, 2, -3, 1])
    exact = function(
        x, t, alpha=alpha, gamma=1.5, reduction="sum", normalizer=normalizer, ignore_index=-3
    )
    for twin in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.double()):  # noqa: S301
        assert_close(twin(x, t), exact)
    assert loss.state_dict() == {}
    assert loss.alpha.dtype == torch.float64
    assert "gamma=1.5" in repr(loss)
    assert "reduction='sum'" in repr(module(reduction="sum"))


def test_importing_the_losses_imports_nothing_heavy() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import focaldet.losses; "
        "print(*sorted(m for m in set(sys.modules) - before if not m.startswith('focaldet')))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


RANK = """
import sys, torch
from torch import distributed
from focaldet.losses import sigmoid_focal_loss
rank, store = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
x = torch.zeros(900, 40, requires_grad=True)
t = torch.full((900,), -1)
t[: 3 if rank else 8] = 5
loss = sigmoid_focal_loss(x, t, reduction="sum", normalizer="num_pos_all_ranks")
total = sigmoid_focal_loss(x, t, reduction="sum")
print((total / loss).item())
distributed.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch lacks distributed")
def test_ranks_divide_by_their_mean_number_of_positives(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output, _ = rank.communicate(timeout=120)
        assert rank.returncode == 0
        assert_close(float(output.split()[-1]), (3 + 8) / 2, rtol=1e-5, atol=0)
    x, t = torch.zeros(9, 4), torch.full((9,), 2)  # without ranks: the number of this process
    alone = sigmoid_focal_loss(x, t, reduction="sum", normalizer="num_pos_all_ranks")
    assert_close(alone, sigmoid_focal_loss(x, t, reduction="sum", normalizer="num_pos"))
