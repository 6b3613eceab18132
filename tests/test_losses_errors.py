"""Invalid arguments of the focal losses raise before anything is computed."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from focaldet.losses import (
    FocalLoss,
    SoftmaxFocalLoss,
    focal_star_loss,
    sigmoid_focal_loss,
    sigmoid_focal_loss_maps,
    softmax_focal_loss,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

X, T = torch.zeros(6, 4), torch.tensor([0, 1, 2, 3, 0, -100])
BIG_X, BIG_T = torch.zeros(2000, 40), torch.zeros(2000, dtype=torch.int64)
EVERY: list[Callable[..., Tensor]] = [sigmoid_focal_loss, softmax_focal_loss, focal_star_loss]


def maps_loss(logits: Any, targets: Any, **options: Any) -> Tensor:
    """Compute the loss of a single map ``[1, 4, 2, 3]`` that holds six rows of four classes."""
    if isinstance(logits, torch.Tensor):
        logits = logits.T.reshape(1, 4, 2, 3)
    return sigmoid_focal_loss_maps([logits], targets, num_classes=4, **options)


# Each with its shape of class indices.
ENTRY_POINTS: list[Any] = [
    *(pytest.param(loss, T, id=loss.__name__) for loss in EVERY),
    pytest.param(maps_loss, T[None], id="sigmoid_focal_loss_maps"),
    *(
        pytest.param(
            lambda x, t, module=module, **options: module(**options)(x, t), T, id=module.__name__
        )
        for module in (FocalLoss, SoftmaxFocalLoss)
    ),
]

# Messages are matched by what matters in them: the name, the value and the remedy.
OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"gamma": -0.1}, r"gamma.*-0\.1.*paper uses 2"),
    ({"gamma": float("nan")}, r"gamma.*nan"),
    ({"reduction": "avg"}, r"reduction 'avg'.*'none', 'mean' or 'sum'"),
    ({"normalizer": 0.0}, r"normalizer.*greater than 0.*0\.0"),
    ({"normalizer": torch.tensor(-1.0)}, r"normalizer.*greater than 0.*-1\.0"),
    ({"normalizer": torch.ones(2)}, r"normalizer.*one element.*\[2\]"),
    ({"alpha": torch.rand(2, 2)}, r"alpha.*\[K\].*\[2, 2\]"),
    ({"alpha": torch.ones(4).long()}, r"alpha.*floating-point.*torch\.int64"),
    ({"alpha": torch.rand(3)}, r"alpha.*\[3\].*classes is 4"),
]
SIGMOID_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"alpha": 1.5}, r"alpha.*\[0, 1\].*1\.5.*None"),
    ({"alpha": -1.0}, r"alpha.*\[0, 1\].*-1\.0"),
    ({"alpha": torch.tensor([0.0, 1.0, 1.1, 0.5])}, r"alpha.*\[0, 1\].*1\.1"),
    ({"normalizer": "positives"}, r"normalizer 'positives'.*'num_pos' or 'num_pos_all_ranks'"),
    ({"normalizer": "num_pos"}, r"normalizer='num_pos'.*reduction='sum' or 'none'.*'mean'"),
]
SOFTMAX_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"alpha": -1.0}, r"alpha.*at least 0.*-1\.0"),
    ({"alpha": torch.tensor([1.0, -2.0, 0, 0])}, r"at least 0.*alpha\[1\] is -2\.0"),
    ({"alpha": torch.tensor([1.0, 0, torch.nan, 0])}, r"at least 0.*alpha\[2\] is nan"),
    ({"label_smoothing": 1.1}, r"label_smoothing.*\[0\.0, 1\.0\].*1\.1"),
    ({"normalizer": "num_pos"}, r"normalizer.*'num_pos'.*reduction='mean'"),
]


@pytest.mark.parametrize("loss", EVERY)
@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_invalid_options_raise(loss: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(X, T, **options)


@pytest.mark.parametrize("loss", [sigmoid_focal_loss, focal_star_loss])
@pytest.mark.parametrize(("options", "message"), SIGMOID_OPTIONS)
def test_invalid_options_of_the_sigmoid_losses_raise(loss: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(X, T, **options)


@pytest.mark.parametrize(("options", "message"), SOFTMAX_OPTIONS)
def test_invalid_options_of_the_softmax_loss_raise(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        softmax_focal_loss(X, T, **options)


@pytest.mark.parametrize("module", [FocalLoss, SoftmaxFocalLoss])
def test_modules_check_their_options_on_construction(module: Any) -> None:
    for options, message in OPTIONS[:6]:
        with pytest.raises(ValueError, match=message):
            module(**options)


def test_the_star_loss_requires_a_positive_gamma() -> None:
    with pytest.raises(ValueError, match=r"gamma.*greater than 0.*0\.0"):
        focal_star_loss(X, T, gamma=0.0)


@pytest.mark.parametrize("loss", EVERY)
def test_integer_logits_raise(loss: Any) -> None:
    with pytest.raises(TypeError, match=r"floating-point logits.*torch\.int64.*\.float\(\)"):
        loss(X.long(), T)


@pytest.mark.parametrize("loss", EVERY)
def test_arrays_raise_and_name_the_conversion(loss: Any) -> None:
    with pytest.raises(TypeError, match=r"logits.*tensor.*ndarray.*torch\.from_numpy"):
        loss(X.numpy(), T)
    with pytest.raises(TypeError, match=r"targets.*tensor.*ndarray.*torch\.from_numpy"):
        loss(X, T.numpy())
    with pytest.raises(TypeError, match=r"targets.*tensor.*list"):
        loss(X, T.tolist())


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
@pytest.mark.parametrize("loss", EVERY)
def test_wide_unsigned_targets_raise_and_name_the_conversion(loss: Any, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"targets.*{dtype}.*\.long\(\)"):
        loss(X, T.clamp(min=0).to(dtype))
    with pytest.raises(TypeError, match=rf"targets.*{dtype}.*\.long\(\)"):
        loss(BIG_X, BIG_T.to(dtype))


@pytest.mark.parametrize("loss", EVERY)
@pytest.mark.parametrize(
    ("x", "t"),
    [(X, T[:5]), (X, T.view(6, 1)), (X.view(6, 2, 2), T), (X, torch.zeros(6, 4).long())],
)
def test_shapes_that_do_not_match_raise_and_explain_the_layout(loss: Any, x: Any, t: Any) -> None:
    shapes = [*x.shape[:1], *x.shape[2:]], list(x.shape), list(t.shape)
    message = "targets.*" + ".*".join(re.escape(str(shape)) for shape in shapes)
    with pytest.raises(ValueError, match=message + ".*CrossEntropyLoss"):
        loss(x, t)


@pytest.mark.parametrize("loss", EVERY)
def test_float_targets_must_have_the_shape_of_the_logits_and_be_in_0_to_1(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"targets.*shape of logits.*\[6, 4\].*\[6\]"):
        loss(X, torch.zeros(6))
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=rf"targets.*\[0, 1\].*got {wrong}"):
            loss(X, torch.zeros(6, 4).index_fill(0, torch.tensor([2]), wrong))


@pytest.mark.parametrize("loss", EVERY)
def test_masks_and_tensors_on_different_devices_raise(loss: Any) -> None:
    with pytest.raises(TypeError, match=r"targets.*torch\.bool.*\.float\(\)"):
        loss(X, torch.ones(6, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"targets.*torch\.complex64\.$"):
        loss(X, torch.ones(6, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"targets.*same device.*cpu and meta"):
        loss(X, T.to("meta"))


@pytest.mark.parametrize("ignore_index", [-100, 2, 255])
@pytest.mark.parametrize("wrong", [40, 41, -2, -99, 10_000])
@pytest.mark.parametrize("x", [BIG_X, BIG_X.double(), BIG_X[:7]])
def test_an_index_out_of_range_is_named(x: Any, wrong: int, ignore_index: int) -> None:
    t = BIG_T[: len(x)].clone()
    t[3] = wrong
    t[5] = ignore_index
    for loss in EVERY:
        message = rf"targets contains {wrong},.*classes 0 to 39.*{ignore_index}: ignored"
        with pytest.raises(ValueError, match=message):
            loss(x, t, ignore_index=ignore_index)


def test_the_softmax_loss_has_no_background() -> None:
    with pytest.raises(ValueError, match=r"contains -1.*0 to 3.*-100: ignored.*no background"):
        softmax_focal_loss(X, T.masked_fill(T == 2, -1))


def test_labels_0_and_1_of_a_single_logit_need_floating_point_targets() -> None:
    with pytest.raises(ValueError, match=r"contains 1.*only class 0.*floating-point targets"):
        sigmoid_focal_loss(torch.zeros(3, 1), torch.tensor([0, 1, 0]))
    with pytest.raises(ValueError, match=r"contains 0.*0 classes"):
        sigmoid_focal_loss(torch.zeros(3, 0), torch.tensor([0, -1, -1]))
    with pytest.raises(ValueError, match=r"logits with an axis of classes.*\[\]"):
        sigmoid_focal_loss(torch.tensor(0.0), torch.tensor(0))


@pytest.mark.parametrize("loss", EVERY)
def test_a_list_of_alphas_must_be_a_tensor(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError, match=r"alpha.*\[0\.1, 0\.2.*torch\.tensor\(alpha\)"):
        loss(X, T, alpha=[0.1, 0.2, 0.3, 0.4])
    with pytest.raises(TypeError, match=r"alpha.*got 'classes'\.$"):
        loss(X, T, alpha="classes")


ODD: list[Any] = [
    *("2", b"2", True, np.True_, [2.0], (2.0,), {}, 2j),
    *(np.array(2.0), np.array([2.0]), np.array([1.0, 2.0]), object()),
]
NUMBER = r"must be (None, )?a number.*"
INTEGER = "must be an integer"


@pytest.mark.parametrize(("loss", "targets"), ENTRY_POINTS)
@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("gamma", [*ODD, None, torch.tensor(2.0), torch.ones(1)], NUMBER),
        ("alpha", ODD, NUMBER),
        ("normalizer", ODD[1:], NUMBER),
        ("normalizer", [torch.tensor(True), torch.tensor(1j)], "must have real numbers.*torch"),
        ("ignore_index", [*ODD, None, 2.0, float("nan"), torch.tensor(2)], INTEGER),
    ],
    ids=["gamma", "alpha", "normalizer", "normalizer of a wrong dtype", "ignore_index"],
)
def test_options_of_a_wrong_type_raise_and_name_the_option(
    loss: Any, targets: Tensor, name: str, values: list[Any], message: str
) -> None:
    for value in values:
        with pytest.raises(TypeError, match=rf"{name} {message}"):
            loss(X, targets, **{name: value})


@pytest.mark.parametrize(("loss", "targets"), ENTRY_POINTS)
def test_numbers_of_numpy_are_numbers(loss: Any, targets: Tensor) -> None:
    expected = loss(X, targets, alpha=0.5, gamma=2, normalizer=4.0, ignore_index=-100)
    for real, whole in ((np.float64, np.int64), (np.float32, np.int16)):
        options = {"alpha": real(0.5), "gamma": whole(2), "normalizer": real(4)}
        given = loss(X, targets, **options, ignore_index=whole(-100))
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize(("loss", "targets"), ENTRY_POINTS)
def test_logits_and_targets_of_a_wrong_type_raise_and_name_the_argument(
    loss: Any, targets: Tensor
) -> None:
    for wrong in (None, "logits", 1.0, X.numpy(), X.tolist()):
        with pytest.raises(TypeError, match=r"(logits|maps\[0\]) must be a tensor, got"):
            loss(wrong, targets)
    for wrong in (None, "targets", 1, targets.numpy(), targets.tolist()):
        with pytest.raises(TypeError, match="targets must be a tensor, got"):
            loss(X, wrong)
    for dtype in (torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=rf"targets.*{dtype}"):
            loss(X, targets.clamp(min=0).to(dtype))


def test_the_maps_must_be_a_sequence_of_tensors() -> None:
    maps, targets = [torch.zeros(1, 4, 2, 3)], T[None]
    for wrong in (None, 3.0):
        with pytest.raises(TypeError, match=f"maps must be a sequence of tensors, got {wrong}"):
            sigmoid_focal_loss_maps(wrong, targets, num_classes=4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"maps\[0\].*ndarray.*torch\.from_numpy"):
        sigmoid_focal_loss_maps([maps[0].numpy()], targets, num_classes=4)  # type: ignore[list-item]
    for count in (None, "4", 4.0, True):
        with pytest.raises(TypeError, match=f"num_classes must be an integer, got {count!r}"):
            sigmoid_focal_loss_maps(maps, targets, num_classes=count)  # type: ignore[arg-type]


def test_the_remaining_options_must_be_numbers() -> None:
    for value in ("1", True, None, np.ones(2)):
        with pytest.raises(TypeError, match="beta must be a number"):
            focal_star_loss(X, T, beta=value)  # type: ignore[arg-type]
        for loss in (softmax_focal_loss, lambda x, t, **options: SoftmaxFocalLoss(**options)(x, t)):
            with pytest.raises(TypeError, match="label_smoothing must be a number"):
                loss(X, T, label_smoothing=value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beta must be finite, got nan"):
        focal_star_loss(X, T, beta=float("nan"))
