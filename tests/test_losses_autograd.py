"""The focal losses with autograd, functional transforms, compilers and in-place gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from focaldet.losses import (
    FocalLoss,
    focal_star_loss,
    sigmoid_focal_loss,
    sigmoid_focal_loss_maps,
    softmax_focal_loss,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Loss = Callable[[Tensor], Tensor]

TARGETS = torch.tensor([0, 1, -1, 3, -100, -1])
CLASSES = torch.tensor([0, 1, 2, 3, -100, 0])
SOFT = torch.tensor([[0.3, 0.0, 1.0, 0.9]]).expand(6, 4)
ALPHA = torch.tensor([0.1, 0.4, 0.6, 0.9])
MAP_TARGETS = torch.tensor([[0, -1, 1, 1, -100, -1]])


def as_maps(x: Tensor) -> list[Tensor]:
    """Reshape ``[6, 4]`` logits to two levels of a head with two anchors and two classes."""
    return [x[:4].reshape(1, 4, 2, 2), x[4:].reshape(1, 4, 2, 1)]


LOSSES: dict[str, Loss] = {
    "mean": lambda x: sigmoid_focal_loss(x, TARGETS),
    "sum": lambda x: sigmoid_focal_loss(x, TARGETS, reduction="sum", normalizer="num_pos"),
    "none": lambda x: sigmoid_focal_loss(x, TARGETS, reduction="none", alpha=None),
    "gamma 0": lambda x: sigmoid_focal_loss(x, TARGETS, gamma=0.0),
    "gamma 0.3": lambda x: sigmoid_focal_loss(x, TARGETS, gamma=0.3),
    "gamma 1.5": lambda x: sigmoid_focal_loss(x, TARGETS, gamma=1.5, alpha=ALPHA),
    "gamma 3": lambda x: sigmoid_focal_loss(x, TARGETS, gamma=3.0),
    "soft": lambda x: sigmoid_focal_loss(x, SOFT),
    "soft, gamma 0.3": lambda x: sigmoid_focal_loss(x, SOFT, gamma=0.3),
    "maps": lambda x: sigmoid_focal_loss_maps(
        as_maps(x), MAP_TARGETS.repeat(1, 2), num_classes=2, reduction="sum"
    ),
    "softmax": lambda x: softmax_focal_loss(x, CLASSES, gamma=0.3),
    "smoothed": lambda x: softmax_focal_loss(x, CLASSES, label_smoothing=0.1),
    "star": lambda x: focal_star_loss(x, TARGETS),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
# raised by torch, whose forward-mode differentiation rules still use torch.jit
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 4) * 2


def gradient_of(loss: Loss, x: Tensor, **options: Any) -> Tensor:
    y = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(y).sum(), y, **options)
    return gradient


@forward_mode
@every_loss
def test_first_and_second_derivatives_match_finite_differences(loss: Loss, x: Tensor) -> None:
    y = x.double().requires_grad_()
    assert torch.autograd.gradcheck(loss, y, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, y)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
def test_targets_alpha_and_normalizer_can_be_differentiated(gamma: float, x: Tensor) -> None:
    y, t = x.double().requires_grad_(), SOFT.double().clone().requires_grad_()
    alpha = torch.rand(4, dtype=torch.float64, requires_grad=True)
    normalizer = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    inside = (t.detach() * 0.8 + 0.1).requires_grad_()

    def of_all(x: Tensor, t: Tensor, a: Tensor, n: Tensor) -> Tensor:
        return sigmoid_focal_loss(x, t, alpha=a, gamma=gamma, normalizer=n)

    assert torch.autograd.gradcheck(of_all, (y, inside, alpha, normalizer))
    at_the_ends = sigmoid_focal_loss(x.requires_grad_(), t.float(), gamma=gamma)
    for gradient in torch.autograd.grad(at_the_ends, (x, t)):
        assert gradient.isfinite().all()


@every_loss
def test_a_second_backward_gives_the_same_gradient(loss: Loss, x: Tensor) -> None:
    y = x.requires_grad_()
    value = loss(y)
    upstream = torch.rand(value.shape)
    first, second, third = (
        torch.autograd.grad(value, y, u, retain_graph=True)[0]
        for u in (upstream, upstream, 2 * upstream)
    )
    assert_close(first, second)
    assert_close(2 * first, third)


@pytest.mark.parametrize("rows", [6, 2000])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("soft", [True, False])
def test_a_double_backward_in_float32_matches_float64(
    reduction: Any, rows: int, soft: bool
) -> None:
    base = torch.randn(rows, 40)
    t = torch.rand(rows, 40) if soft else torch.randint(-1, 40, (rows,))
    seconds = []
    for dtype in (torch.float32, torch.float64):
        y = base.to(dtype).requires_grad_()
        targets = t.to(dtype) if soft else t
        value = sigmoid_focal_loss(y, targets, reduction=reduction)
        (first,) = torch.autograd.grad(value.sum(), y, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), y)
        seconds.append(second.double())
    assert_close(*seconds, rtol=1e-4, atol=1e-6)


@every_loss
def test_an_in_place_change_of_the_logits_before_backward_raises_or_has_no_effect(
    loss: Loss, x: Tensor
) -> None:
    exact = gradient_of(loss, x)
    y = x.requires_grad_() * 1
    value = loss(y).sum()
    y.add_(1)
    if loss in (LOSSES["softmax"], LOSSES["smoothed"], LOSSES["star"]):  # they hold a copy
        assert_close(torch.autograd.grad(value, x)[0], exact)
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(value)


@pytest.mark.parametrize("rows", [6, 2000])
@pytest.mark.parametrize("soft", [True, False])
def test_an_in_place_change_raises_with_each_kernel(rows: int, soft: bool) -> None:
    x = torch.randn(rows, 40, requires_grad=True) * 1
    t = torch.rand(rows, 40) if soft else torch.full((rows,), -1)
    value = sigmoid_focal_loss(x, t)
    x[0, 0] = 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(value)


@pytest.mark.parametrize(
    "name",
    [
        *("mean", "soft", "maps", "softmax"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "gamma 0.3", "star")),
    ],
)
def test_the_losses_compile_without_graph_breaks(name: str, x: Tensor) -> None:
    loss = LOSSES[name]
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), loss(x))
    assert_close(gradient_of(compiled, x), gradient_of(loss, x))


def test_the_module_can_be_exported(x: Tensor) -> None:
    program = torch.export.export(FocalLoss(), (x, TARGETS))
    assert_close(program.module()(x, TARGETS), FocalLoss()(x, TARGETS))


@forward_mode
@every_loss
def test_functional_transforms_agree_with_autograd(loss: Loss, x: Tensor) -> None:
    exact = gradient_of(loss, x)
    assert_close(torch.func.grad(lambda y: loss(y).sum())(x), exact)
    direction = torch.randn_like(x)
    along = torch.func.jvp(lambda y: loss(y).sum(), (x,), (direction,))[1]
    assert_close(along, (exact * direction).sum())
    with forward_ad.dual_level():
        dual = loss(forward_ad.make_dual(x, direction)).sum()  # type: ignore[no-untyped-call]
        assert_close(forward_ad.unpack_dual(dual).tangent, along)  # type: ignore[no-untyped-call]


def test_vmap_works_over_rows_and_batches(x: Tensor) -> None:
    each = torch.stack(
        [sigmoid_focal_loss(a, b, reduction="sum") for a, b in zip(x, TARGETS, strict=True)]
    )
    over_rows = torch.vmap(lambda a, b: sigmoid_focal_loss(a, b, reduction="sum"))
    assert_close(over_rows(x, TARGETS), each)
    batches = torch.vmap(sigmoid_focal_loss)(x.expand(3, 6, 4), TARGETS.expand(3, 6))
    assert_close(batches, sigmoid_focal_loss(x, TARGETS).expand(3))
    per_row = torch.vmap(torch.func.grad(lambda a, b: sigmoid_focal_loss(a, b, reduction="sum")))
    exact = gradient_of(lambda y: sigmoid_focal_loss(y, TARGETS, reduction="sum"), x)
    assert_close(per_row(x, TARGETS), exact)


@every_loss
def test_autocast_changes_nothing(loss: Loss, x: Tensor) -> None:
    exact, gradient = loss(x), gradient_of(loss, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(loss(x), exact)
        assert_close(gradient_of(loss, x), gradient)


def test_checkpoint_no_grad_and_inference_mode_work(x: Tensor) -> None:
    y = x.clone().requires_grad_()
    again = checkpoint(lambda z: LOSSES["mean"](z * 2), y, use_reentrant=False)
    torch.autograd.backward(again)
    assert_close(y.grad, gradient_of(lambda z: LOSSES["mean"](z * 2), x))
    with torch.no_grad():
        assert not LOSSES["mean"](y).requires_grad
    with torch.inference_mode():
        assert_close(LOSSES["mean"](x.clone()), LOSSES["mean"](x))


def test_meta_tensors_have_a_shape() -> None:
    loss = sigmoid_focal_loss(
        torch.empty(3, 4, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    )
    assert loss.shape == ()
    assert loss.device.type == "meta"


@pytest.mark.parametrize("rows", [6, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("soft", [True, False])
def test_the_in_place_gradient_equals_the_gradient(
    rows: int, soft: bool, dtype: torch.dtype
) -> None:
    base = (torch.randn(rows, 40) - 2).to(dtype)
    t = torch.rand(rows, 40) if soft else torch.randint(-1, 40, (rows,))
    if not soft:
        t[::3] = -100
        t[1::50] = -1
    for factor in (1.0, 0.5):
        values, gradients = [], []
        for inplace in (False, True):
            x = base.clone().requires_grad_()
            y = x * 1
            value = sigmoid_focal_loss(y, t, reduction="sum", inplace_gradient=inplace) * factor
            torch.autograd.backward(value)
            values.append(value.detach())
            gradients.append(x.grad)
            assert y.detach().equal(base) != inplace
        assert_close(values[1], values[0])
        assert_close(gradients[1], gradients[0])


def test_the_in_place_gradient_requires_logits_that_can_be_overwritten(x: Tensor) -> None:
    x.requires_grad_()

    def loss(y: Tensor, **options: Any) -> Tensor:
        return sigmoid_focal_loss(y, TARGETS[: len(y)], inplace_gradient=True, **options)

    for leaf in (x, x[:3], x.view(6, 4)):
        with pytest.raises(ValueError, match=r"inplace_gradient.*logits.*leaf"):
            loss(leaf)
    with pytest.raises(ValueError, match=r"inplace_gradient.*'mean' or 'sum'.*'none'"):
        loss(x * 1, reduction="none")
    with pytest.raises(
        ValueError, match=r"contiguous or channels_last logits.*strides \[1, 6\].*\.contiguous"
    ):
        loss((x * 1).t().contiguous().t())
    before = x.detach().clone()
    with torch.no_grad():
        loss(x)
    assert_close(x.detach(), before)


def test_the_in_place_gradient_is_returned_once_and_protected(x: Tensor) -> None:
    y = x.requires_grad_() * 1
    value = sigmoid_focal_loss(y, TARGETS, inplace_gradient=True)
    torch.autograd.backward(value, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"inplace_gradient=True.*one backward pass"):
        torch.autograd.backward(value)

    y = x * 1
    value = sigmoid_focal_loss(y, TARGETS, inplace_gradient=True)
    y.add_(1)
    with pytest.raises(RuntimeError, match=r"logits was modified in place.*inplace_gradient"):
        torch.autograd.backward(value)

    y = (x * 1).sigmoid()  # whose backward needs its result
    value = sigmoid_focal_loss(y, TARGETS, inplace_gradient=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(value)


@pytest.mark.parametrize("rows", [6, 2000])
@pytest.mark.parametrize("soft", [True, False])
def test_targets_that_change_before_a_second_gradient_raise(rows: int, soft: bool) -> None:
    x = torch.randn(rows, 40, requires_grad=True)
    t = torch.rand(rows, 40) if soft else torch.full((rows,), -1)
    for options in ({"reduction": "none"}, {"reduction": "sum"}):
        value = sigmoid_focal_loss(x, t, **options)  # type: ignore[arg-type]
        t[0] = 0
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.backward(value.sum())


@pytest.mark.parametrize("rows", [6, 2000, 9000])
@pytest.mark.parametrize("soft", [True, False])
def test_default_types_and_devices_change_nothing(rows: int, soft: bool) -> None:
    x = torch.randn(rows, 40)
    t = (
        torch.rand(rows, 40)
        if soft
        else torch.randint(-1, 40, (rows,)).masked_fill(x[:, 0] > 0, -1)
    )
    maps, map_targets = [x[:4].reshape(1, 8, 4, 5)], torch.tensor([[0, -1, 1, -100] * 10])
    losses: list[Loss] = [
        lambda y: sigmoid_focal_loss(y, t, reduction="sum", normalizer="num_pos"),
        lambda y: sigmoid_focal_loss(y, t, alpha=None, gamma=1.5),
        lambda y: sigmoid_focal_loss(y, t, gamma=0.3, reduction="none"),
    ]
    exact = [gradient_of(loss, x) for loss in losses]
    of_maps = sigmoid_focal_loss_maps(maps, map_targets, num_classes=4)
    with torch.device("meta"):
        for loss, gradient in zip(losses, exact, strict=True):
            assert_close(gradient_of(loss, x), gradient)
        assert_close(sigmoid_focal_loss_maps(maps, map_targets, num_classes=4), of_maps)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            for loss, gradient in zip(losses, exact, strict=True):
                assert_close(gradient_of(loss, x), gradient)
            assert_close(sigmoid_focal_loss_maps(maps, map_targets, num_classes=4), of_maps)
        finally:
            torch.set_default_dtype(torch.float32)
