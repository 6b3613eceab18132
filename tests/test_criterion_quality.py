"""The quality focal loss, and the IoUs that the criterion gives to losses that need them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from focaldet import AnchorGenerator
from focaldet import criterion as criterion_module
from focaldet.box_coder import BoxCoder
from focaldet.boxes import box_iou
from focaldet.criterion import (
    IGNORED,
    FocalMapLoss,
    QualityFocalMapLoss,
    RetinaNetCriterion,
)
from focaldet.heads import flatten_maps
from focaldet.matching import BACKGROUND, Matcher

FEATURES = [(4, 5), (2, 3), (1, 1)]
ANCHORS, CLASSES = 9, 3
ROWS = sum(ANCHORS * h * w for h, w in FEATURES)


def maps(channels: int = CLASSES, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    return [torch.randn(3, ANCHORS * channels, *size, dtype=dtype) for size in FEATURES]


def some_targets() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return classes, IoUs and divisors of three images: usual, without objects, and all positive."""
    targets = torch.full((3, ROWS), BACKGROUND)
    targets[0, torch.rand(ROWS) < 0.2] = IGNORED
    chosen = torch.rand(ROWS) < 0.1
    targets[0, chosen] = torch.randint(CLASSES, (int(chosen.sum()),))
    targets[2] = torch.randint(CLASSES, (ROWS,))
    ious = torch.rand(3, ROWS, dtype=torch.float64)
    ious[2, :5] = 0
    ious[2, 5:10] = 1
    return targets, ious.masked_fill(targets < 0, 0), torch.tensor([3.0, 1.0, 70.0])


def dense(
    logits: list[torch.Tensor],
    targets: torch.Tensor,
    ious: torch.Tensor,
    divisor: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Compute equation 2 of the paper for a soft target of every entry."""
    p = flatten_maps(logits, ANCHORS).sigmoid()
    y = torch.zeros_like(p)
    for image, row in (targets >= 0).nonzero().tolist():
        y[image, row, targets[image, row]] = ious[image, row]
    losses = -((y - p).abs() ** beta) * ((1 - y) * (1 - p).log() + y * p.log())
    return (losses.masked_fill((targets == IGNORED)[..., None], 0).sum(dim=(1, 2)) / divisor).sum()


def call(logits: list[torch.Tensor], beta: float, *rest: torch.Tensor) -> torch.Tensor:
    targets, ious, divisor = rest
    return QualityFocalMapLoss(beta)(
        logits, targets, num_classes=CLASSES, divisor=divisor, ious=ious
    )


def test_the_loss_of_a_few_anchors_by_hand() -> None:
    level = torch.zeros(1, 2 * 2, 1, 1)  # two anchors, two classes, all scores 0.5
    targets, divisor = torch.tensor([[1, BACKGROUND]]), torch.tensor([2.0])
    options: dict[str, Any] = {"num_classes": 2, "divisor": divisor}
    loss = QualityFocalMapLoss()([level], targets, ious=torch.tensor([[0.8, 0.0]]), **options)
    # The positive's own class misses its IoU by 0.3, the three other entries miss 0 by 0.5.
    assert_close(loss, torch.tensor((0.3**2 + 3 * 0.5**2) * math.log(2) / 2))
    loss = QualityFocalMapLoss(1.0)([level], targets, ious=torch.tensor([[0.5, 0.0]]), **options)
    assert_close(loss, torch.tensor(3 * 0.5 * math.log(2) / 2))
    targets[0, 1] = IGNORED
    loss = QualityFocalMapLoss()([level], targets, ious=torch.tensor([[0.5, 0.0]]), **options)
    assert_close(loss, torch.tensor(0.5**2 * math.log(2) / 2))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0, 2.5])
def test_loss_and_gradient_are_those_of_a_dense_soft_target(layout: Any, beta: float) -> None:
    logits = [level.contiguous(memory_format=layout).requires_grad_() for level in maps()]
    rest = some_targets()
    loss, expected = call(logits, beta, *rest), dense(logits, *rest, beta)
    assert_close(loss, expected, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(expected, logits)
    assert_close(torch.autograd.grad(loss, logits), wanted, rtol=1e-6, atol=1e-9)
    single = [level.detach().float().requires_grad_() for level in logits]
    loss = call(single, beta, *rest)
    assert_close(loss, expected.float(), rtol=1e-5, atol=0)
    found = [level.double() for level in torch.autograd.grad(loss, single)]
    assert_close(found, list(wanted), rtol=1e-4, atol=1e-6)


def test_images_without_positives_have_the_focal_loss_without_alpha() -> None:
    logits = maps(dtype=torch.float32)
    targets, _, divisor = some_targets()
    targets = targets.clamp(max=BACKGROUND)
    loss = call(logits, 2.0, targets, torch.zeros(targets.shape), divisor)
    focal = FocalMapLoss(None, 2.0)(logits, targets, num_classes=CLASSES, divisor=divisor)
    assert_close(loss, focal)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_saturated_logits_give_finite_losses_and_gradients(dtype: torch.dtype, beta: float) -> None:
    largest = torch.finfo(dtype).max
    values = [0.0, 20, -20, 200, -200, 1e4, -1e4, min(largest, 1e30), -min(largest, 1e30)]
    for value in values:
        level = torch.full((1, 3 * CLASSES, 1, 1), value, dtype=dtype, requires_grad=True)
        targets, ious = torch.tensor([[0, 1, 2]]), torch.tensor([[0.0, 0.4, 1.0]])
        loss = call([level], beta, targets, ious, torch.ones(1))
        assert loss.isfinite()
        assert loss >= 0
        [gradient] = torch.autograd.grad(loss, level)
        assert gradient.isfinite().all()
    # A perfect prediction has no loss, however large its logit.
    level = torch.full((1, CLASSES, 1, 1), -largest, dtype=dtype)
    level[0, 1] = largest
    assert call([level], beta, torch.tensor([[1]]), torch.ones(1, 1), torch.ones(1)) == 0


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_a_score_equal_to_the_iou_has_no_gradient_and_others_move_towards_it(beta: float) -> None:
    level = torch.zeros(1, 3, 1, 1, requires_grad=True)  # three anchors of one class
    targets, ious = torch.tensor([[0, 0, 0]]), torch.tensor([[0.3, 0.5, 0.7]])
    loss = QualityFocalMapLoss(beta)(
        [level], targets, num_classes=1, divisor=torch.ones(1), ious=ious
    )
    [gradient] = torch.autograd.grad(loss, level)
    assert gradient.flatten().sign().tolist() == [1, 0, -1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_computed_in_float32(dtype: torch.dtype) -> None:
    rest = some_targets()
    logits = [level.to(dtype).requires_grad_() for level in maps()]
    wide = [level.detach().float().requires_grad_() for level in logits]
    loss, expected = call(logits, 2.0, *rest), call(wide, 2.0, *rest)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=1e-5, atol=0)
    found = torch.autograd.grad(loss, logits)
    rounded = [level.to(dtype) for level in torch.autograd.grad(expected, wide)]
    assert_close(list(found), rounded)


@pytest.mark.parametrize("beta", [1.5, 2.0])
def test_gradients_of_first_and_second_order(beta: float) -> None:
    targets = torch.tensor([[0, BACKGROUND, IGNORED, 1], [BACKGROUND, 1, 1, BACKGROUND]])
    ious, divisor = torch.rand(2, 4, dtype=torch.float64), torch.tensor([2.0, 3.0])

    def loss(*logits: torch.Tensor) -> torch.Tensor:
        return QualityFocalMapLoss(beta)(logits, targets, num_classes=2, divisor=divisor, ious=ious)

    logits = tuple(
        torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
        for size in ((1, 3), (1, 1))
    )
    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


def test_a_second_backward_pass_has_the_same_gradient() -> None:
    logits = [level.requires_grad_() for level in maps(dtype=torch.float32)]
    loss = call(logits, 2.0, *some_targets())
    first = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = [level.clone() for level in first]
    second = torch.autograd.grad(3 * loss, logits)
    assert_close(first, tuple(kept), rtol=0, atol=0)
    assert_close([level / 3 for level in second], kept)


def test_the_backward_pass_allocates_no_tensor_of_the_size_of_a_map() -> None:
    level = torch.randn(1, ANCHORS * 80, 8, 8, requires_grad=True)
    targets = torch.full((1, ANCHORS * 64), BACKGROUND)
    targets[0, ::50] = 7
    loss = QualityFocalMapLoss()(
        [level], targets, num_classes=80, divisor=torch.ones(1), ious=torch.rand(targets.shape)
    )
    large = []

    class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **kwargs or {})
            known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if (
                isinstance(result, torch.Tensor)
                and result.numel() >= level.numel()
                and result.untyped_storage().data_ptr() not in known
            ):
                large.append(func)
            return result

    with Allocations():  # type: ignore[no-untyped-call]
        [gradient] = torch.autograd.grad(loss, level)
    assert gradient.shape == level.shape
    assert large == []


def test_the_transforms_of_torch_func_differentiate_the_loss() -> None:
    rest = some_targets()
    logits = [level.requires_grad_() for level in maps()]
    found = torch.func.grad(call)([level.detach() for level in logits], 2.0, *rest)
    assert_close(tuple(found), torch.autograd.grad(call(logits, 2.0, *rest), logits))
    batch = [torch.stack([level.detach(), 2 * level.detach()]) for level in logits]
    found = torch.vmap(lambda maps: call(maps, 2.0, *rest))(batch)
    assert_close(found[1], call([2 * level for level in logits], 2.0, *rest).detach())


def test_the_loss_is_traced_in_one_graph() -> None:
    logits, rest = [level.requires_grad_() for level in maps(dtype=torch.float32)], some_targets()
    compiled: Any = torch.compile(call, fullgraph=True, backend="eager")
    found, expected = compiled(logits, 2.0, *rest), call(logits, 2.0, *rest)
    assert_close(found, expected)
    wanted = torch.autograd.grad(expected, logits)
    assert_close(torch.autograd.grad(found, logits), wanted, rtol=1e-4, atol=1e-6)


# The IoUs from the criterion.


class Recorded:
    """A loss that keeps the IoUs it is given."""

    needs_ious = True

    def __call__(self, logits: Any, targets: torch.Tensor, **options: Any) -> torch.Tensor:
        self.targets, self.ious = targets, options.pop("ious")
        return FocalMapLoss()(logits, targets, **options)


def case() -> tuple[Any, Any, Any, Any]:
    """Return logits, deltas, anchors and targets of images with 0, 1 and 2 objects."""
    boxes = torch.tensor([[4.0, 4, 36, 30], [2, 1, 30, 31]], dtype=torch.float64)
    targets = [{"boxes": boxes[:i], "labels": torch.arange(i)} for i in range(3)]
    deltas = [0.2 * level for level in maps(4)]
    anchors = AnchorGenerator((32, 64, 128), strides=(8, 16, 32))(FEATURES, dtype=torch.float64)
    return maps(), deltas, anchors, targets


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_criterion_computes_the_ious_of_the_predicted_boxes(
    on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(criterion_module, "runs_on_cpu", lambda _: on_cpu)
    logits, deltas, anchors, targets = case()
    deltas = [level.requires_grad_() for level in deltas]
    loss = Recorded()
    module = RetinaNetCriterion(Matcher(), BoxCoder(), classification_loss=loss)
    losses = module(logits, deltas, anchors, targets)
    flat, rows = torch.cat(anchors), flatten_maps(deltas, ANCHORS)
    expected = torch.zeros(3, ROWS, dtype=torch.float64)
    for i, target in enumerate(targets):
        for row, match in enumerate(Matcher()(target["boxes"], flat).tolist()):
            if match >= 0:
                predicted = BoxCoder().decode(rows[i, row][None], flat[row][None])
                expected[i, row] = box_iou(predicted, target["boxes"][match][None])[0, 0]
    assert int((expected > 0).sum()) > 5
    assert torch.equal(loss.targets >= 0, expected > 0)
    assert_close(loss.ious, expected.detach())
    assert not loss.ious.requires_grad
    assert not losses["classification"].requires_grad  # only the deltas have a gradient here
    assert losses["box_regression"].requires_grad


@pytest.mark.parametrize("on_cpu", [True, False])
def test_extreme_deltas_give_ious_between_0_and_1(
    on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(criterion_module, "runs_on_cpu", lambda _: on_cpu)
    logits, deltas, anchors, targets = case()
    for value in (-math.inf, -1e30, 0.0, 1e30, math.inf, math.nan):
        loss = Recorded()
        module = RetinaNetCriterion(Matcher(), BoxCoder(), classification_loss=loss)
        wild = [torch.full_like(level, value) for level in deltas]
        module(logits, wild, anchors, targets)
        assert loss.ious.min() >= 0
        assert loss.ious.max() <= 1


@pytest.mark.parametrize("on_cpu", [True, False])
def test_losses_that_do_not_ask_for_ious_cost_no_decoding(
    on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(criterion_module, "runs_on_cpu", lambda _: on_cpu)
    decoded = []

    class Coder(BoxCoder):
        def decode(self, box_deltas: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
            decoded.append(len(anchors))
            return super().decode(box_deltas, anchors)

    def plain(
        logits: Any, targets: torch.Tensor, *, num_classes: int, divisor: torch.Tensor
    ) -> torch.Tensor:
        return FocalMapLoss()(logits, targets, num_classes=num_classes, divisor=divisor)

    inputs = case()
    for loss in (None, plain):
        RetinaNetCriterion(Matcher(), Coder(), classification_loss=loss)(*inputs)
    assert decoded == []
    loss = Recorded()
    RetinaNetCriterion(Matcher(), Coder(), classification_loss=loss)(*inputs)
    positives = int((loss.targets >= 0).sum())
    assert decoded == [positives if on_cpu else 3 * ROWS]


def test_images_without_objects_have_gradients_for_all_maps() -> None:
    logits, deltas, anchors, targets = case()
    levels = [level.requires_grad_() for level in (*logits, *deltas)]
    module = RetinaNetCriterion(Matcher(), BoxCoder(), classification_loss=QualityFocalMapLoss())
    losses = module(logits, deltas, anchors, [targets[0]] * 3)
    # Distributed training waits for the gradient of every parameter.
    gradients = torch.autograd.grad(sum(losses.values()), levels)
    assert all(float(level.min()) > 0 for level in gradients[: len(logits)])


@pytest.mark.parametrize(
    ("beta", "error", "message"),
    [
        (-1, ValueError, "beta.* -1"),
        (math.nan, ValueError, "beta.* nan"),
        ("2", TypeError, "beta must be a number, got"),
        (None, TypeError, "beta must be a number, got"),
    ],
)
def test_a_wrong_beta_is_named(beta: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QualityFocalMapLoss(beta)


def test_the_loss_has_no_alpha_and_gamma_under_the_old_names() -> None:
    module = RetinaNetCriterion(Matcher(), BoxCoder(), classification_loss=QualityFocalMapLoss())
    with (
        pytest.warns(DeprecationWarning, match="focal_gamma"),
        pytest.raises(
            TypeError, match=r"QualityFocalMapLoss\(beta=2.0\), which has no alpha and gamma"
        ),
    ):
        _ = module.focal_gamma
    assert "QualityFocalMapLoss(beta=2.0)" in repr(module)
