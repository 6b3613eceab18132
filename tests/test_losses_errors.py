"""What a caller gets wrong is said before any work, in the project's words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from focaldet.losses import (
    FocalLoss,
    SoftmaxFocalLoss,
    focal_star_loss,
    sigmoid_focal_loss,
    softmax_focal_loss,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

X, T = torch.zeros(6, 4), torch.tensor([0, 1, 2, 3, 0, -100])
BIG_X, BIG_T = torch.zeros(2000, 40), torch.zeros(2000, dtype=torch.int64)
EVERY: list[Callable[..., Tensor]] = [sigmoid_focal_loss, softmax_focal_loss, focal_star_loss]

OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"gamma": -0.1}, r"`gamma` must be finite and >= 0; got -0.1\. The paper uses 2\."),
    ({"gamma": float("nan")}, r"`gamma` must be finite and >= 0; got nan"),
    ({"reduction": "avg"}, r"`reduction` must be one of 'none', 'mean', 'sum'; got 'avg'\."),
    ({"normalizer": 0.0}, r"`normalizer` must be finite and > 0; got 0.0\."),
    ({"normalizer": torch.tensor(-1.0)}, r"`normalizer` must be > 0; got -1.0\."),
    ({"normalizer": torch.ones(2)}, r"`normalizer` must be one number; got \[2\]\."),
    ({"alpha": torch.rand(2, 2)}, r"`alpha` must be a number, None or a floating-point tensor"),
    ({"alpha": torch.ones(4).long()}, r"`alpha` must be a number, None or .*; got torch.int64"),
    ({"alpha": torch.rand(3)}, r"`alpha` must be of shape \[4\], one weight a class; got \[3\]\."),
]
SIGMOID_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"alpha": 1.5}, r"`alpha` must be in \[0, 1\]; got 1.5\. None turns the weights off\."),
    ({"alpha": -1.0}, r"`alpha` must be in \[0, 1\]; got -1.0"),
    ({"alpha": torch.tensor([0.0, 1.0, 1.1, 0.5])}, r"`alpha` must be in \[0, 1\] everywhere; got"),
    ({"normalizer": "positives"}, r"`normalizer` must be one of 'num_pos', 'num_pos_all_ranks'"),
    ({"normalizer": "num_pos"}, r"`reduction` must be 'sum' or 'none' with 'num_pos'; got 'mean'"),
]
SOFTMAX_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"alpha": -1.0}, r"`alpha` must be >= 0.0; got -1.0\."),
    ({"alpha": torch.tensor([1.0, -2.0, 0, 0])}, r"`alpha` must be >= 0 everywhere; got -2.0\."),
    ({"label_smoothing": 1.1}, r"`label_smoothing` must be in \[0.0, 1.0\]; got 1.1\."),
    ({"normalizer": "num_pos"}, r"`normalizer` must be a number or None; got 'num_pos'"),
]


@pytest.mark.parametrize("loss", EVERY)
@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_out_of_range_are_refused(loss: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(X, T, **options)


@pytest.mark.parametrize("loss", [sigmoid_focal_loss, focal_star_loss])
@pytest.mark.parametrize(("options", "message"), SIGMOID_OPTIONS)
def test_options_of_the_sigmoid_losses_are_refused(loss: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(X, T, **options)


@pytest.mark.parametrize(("options", "message"), SOFTMAX_OPTIONS)
def test_options_of_the_softmax_loss_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        softmax_focal_loss(X, T, **options)


@pytest.mark.parametrize("module", [FocalLoss, SoftmaxFocalLoss])
def test_modules_refuse_options_when_they_are_made(module: Any) -> None:
    for options, message in OPTIONS[:6]:
        with pytest.raises(ValueError, match=message):
            module(**options)


def test_the_star_loss_refuses_a_gamma_of_0() -> None:
    with pytest.raises(ValueError, match=r"`gamma` must be > 0.0; got 0.0\."):
        focal_star_loss(X, T, gamma=0.0)


@pytest.mark.parametrize("loss", EVERY)
def test_logits_that_are_no_floats_are_refused(loss: Any) -> None:
    with pytest.raises(TypeError, match=r"`logits` must be floating-point; got torch.int64\. Call"):
        loss(X.long(), T)


@pytest.mark.parametrize("loss", EVERY)
@pytest.mark.parametrize(
    ("x", "t"),
    [(X, T[:5]), (X, T.view(6, 1)), (X.view(6, 2, 2), T), (X, torch.zeros(6, 4).long())],
)
def test_shapes_that_do_not_fit_are_refused_with_the_layout(loss: Any, x: Any, t: Any) -> None:
    with pytest.raises(ValueError, match=r"`targets` must be of shape \[.*As in CrossEntropyLoss"):
        loss(x, t)


@pytest.mark.parametrize("loss", EVERY)
def test_float_targets_are_refused_unless_they_have_the_logits_shape_and_lie_in_0_to_1(
    loss: Any,
) -> None:
    with pytest.raises(
        ValueError, match=r"`targets` must be of the logits' shape \[6, 4\] when fl"
    ):
        loss(X, torch.zeros(6))
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"`targets` must be in \[0, 1\] everywhere; got"):
            loss(X, torch.zeros(6, 4).index_fill(0, torch.tensor([2]), wrong))


@pytest.mark.parametrize("loss", EVERY)
def test_masks_and_other_devices_are_refused(loss: Any) -> None:
    with pytest.raises(
        TypeError, match=r"`targets` must be class indices .*; got torch.bool\. Cal"
    ):
        loss(X, torch.ones(6, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"`targets` must be on cpu; got meta"):
        loss(X, T.to("meta"))


@pytest.mark.parametrize("ignore_index", [-100, 2, 255])
@pytest.mark.parametrize("wrong", [40, 41, -2, -99, 10_000])
@pytest.mark.parametrize("x", [BIG_X, BIG_X.double(), BIG_X[:7]])
def test_an_index_that_is_no_class_is_named(x: Any, wrong: int, ignore_index: int) -> None:
    t = BIG_T[: len(x)].clone()
    t[3] = wrong
    t[5] = ignore_index
    for loss in EVERY:
        with pytest.raises(ValueError, match=rf"`targets` must be in \[0, 40\), .*; got {wrong}\."):
            loss(x, t, ignore_index=ignore_index)


def test_the_softmax_loss_knows_no_background() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 4\), or ignore_index -100; got -1\."):
        softmax_focal_loss(X, T.masked_fill(T == 2, -1))


def test_labels_0_and_1_of_a_single_logit_are_pointed_to_floats() -> None:
    with pytest.raises(ValueError, match=r"got 1\. A two-class problem with one logit takes float"):
        sigmoid_focal_loss(torch.zeros(3, 1), torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match=r"`logits` must be of at least one axis; got \[\]"):
        sigmoid_focal_loss(torch.tensor(0.0), torch.tensor(0))


@pytest.mark.parametrize("loss", EVERY)
def test_a_list_of_alphas_is_no_tensor(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError, match=r"`alpha` must be a number, None or .*; got \[0.1, 0.2"):
        loss(X, T, alpha=[0.1, 0.2, 0.3, 0.4])
