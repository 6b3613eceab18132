from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from focaldet import AnchorGenerator
from focaldet import criterion as criterion_module
from focaldet.box_coder import BoxCoder
from focaldet.boxes import generalized_box_iou
from focaldet.criterion import (
    IGNORED,
    CrossEntropyMapLoss,
    FocalMapLoss,
    RetinaNetCriterion,
    SoftmaxFocalMapLoss,
)
from focaldet.heads import flatten_maps
from focaldet.losses import sigmoid_focal_loss
from focaldet.matching import BACKGROUND, ATSSAssigner, Matcher

if TYPE_CHECKING:
    from collections.abc import Sequence

FEATURES = [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]
CLASSES = 3


def criterion(**options: Any) -> RetinaNetCriterion:
    return RetinaNetCriterion(Matcher(), BoxCoder(), **options)


def example(batch: int = 3) -> tuple[list[torch.Tensor], list[torch.Tensor], Any, Any]:
    """Return logits, deltas, anchors and targets of images with 0, 1 and then 2 objects each."""
    logits = [torch.randn(batch, 9 * CLASSES, *size, dtype=torch.float64) for size in FEATURES]
    deltas = [torch.randn(batch, 36, *size, dtype=torch.float64) * 0.1 for size in FEATURES]
    anchors = AnchorGenerator()(FEATURES, dtype=torch.float64)
    boxes = torch.tensor([[4.0, 4, 36, 40], [10, 2, 60, 62]], dtype=torch.float64)
    targets: Any = [
        {"boxes": boxes[: min(i, 2)], "labels": torch.arange(min(i, 2))} for i in range(batch)
    ]
    return logits, deltas, anchors, targets


def by_hand(logits: Any, deltas: Any, anchors: Any, targets: Any) -> Any:
    """Compute each image's two losses from flat rows, one image at a time, and its positives."""
    rows, boxes, flat = flatten_maps(logits, 9), flatten_maps(deltas, 9), torch.cat(anchors)
    images = []
    for i, target in enumerate(targets):
        match = Matcher()(target["boxes"], flat)
        labels = torch.where(match >= 0, 0, match)
        positive = match >= 0
        labels[positive] = target["labels"][match[positive]]
        labels[match == -2] = -100
        focal = sigmoid_focal_loss(rows[i], labels, reduction="sum")
        wanted = BoxCoder().encode(target["boxes"][match[positive]], flat[positive])
        images.append((focal, (boxes[i][positive], wanted), int(positive.sum())))
    return images


def test_the_batch_normalizer_divides_by_the_positives_of_the_batch() -> None:
    case = example()
    losses = criterion(box_loss="l1")(*case)
    images = by_hand(*case)
    count = sum(positives for *_, positives in images)
    assert count > 3
    assert_close(losses["classification"], sum(focal for focal, *_ in images) / count)
    l1 = sum((a - b).abs().sum() for _, (a, b), _ in images)
    assert_close(losses["box_regression"], l1 / count)


def test_the_image_normalizer_divides_each_image_by_its_own_positives() -> None:
    case = example()
    losses = criterion(box_loss="l1", normalizer="image")(*case)
    images = by_hand(*case)
    focal = sum(focal / max(1, n) for focal, _, n in images) / 3
    l1 = sum((a - b).abs().sum() / max(1, n) for _, (a, b), n in images) / 3
    assert_close(losses["classification"], focal)
    assert_close(losses["box_regression"], l1)


def test_the_ema_normalizer_changes_in_training_only_and_is_in_the_state_dict() -> None:
    case = example()
    module = criterion(normalizer="ema")
    count = sum(n for *_, n in by_hand(*case))
    module.eval()(*case)
    assert module.state_dict()["positives_average"] == 100
    loss = module.train()(*case)["classification"]
    expected = 0.9 * 100 + 0.1 * count
    assert_close(module.state_dict()["positives_average"], torch.tensor(expected))
    assert_close(loss * expected / count, criterion()(*case)["classification"], rtol=1e-6, atol=0)


def test_smooth_l1_and_giou() -> None:
    logits, deltas, anchors, targets = example()
    images = by_hand(logits, deltas, anchors, targets)
    count = sum(n for *_, n in images)
    d = torch.cat([(a - b).abs() for _, (a, b), _ in images])
    smooth = torch.where(d < 0.11, 0.5 * d**2 / 0.11, d - 0.055).sum() / count
    assert_close(criterion()(logits, deltas, anchors, targets)["box_regression"], smooth)
    flat, coder = torch.cat(anchors), BoxCoder()
    giou = torch.zeros((), dtype=torch.float64)
    for i, target in enumerate(targets):
        match = Matcher()(target["boxes"], flat)
        boxes = coder.decode(flatten_maps(deltas, 9)[i][match >= 0], flat[match >= 0])
        giou += (1 - generalized_box_iou(boxes, target["boxes"][match[match >= 0]])).sum()
    found = criterion(box_loss="giou", box_loss_weight=2.0)(logits, deltas, anchors, targets)
    assert_close(found["box_regression"], 2 * giou / count)


def test_images_without_objects_train_as_background() -> None:
    logits, deltas, anchors, targets = example()
    for level in (*logits, *deltas):
        level.requires_grad_()
    losses = criterion()(logits, deltas, anchors, [targets[0]] * 3)
    sum(losses.values()).backward()
    assert losses["box_regression"] == 0
    assert all(float(level.grad.min()) > 0 for level in logits)  # type: ignore[union-attr]
    assert all(
        level.grad is not None for level in deltas
    )  # DDP needs a gradient of every parameter


def test_gradients_reach_only_the_deltas_of_positives() -> None:
    logits, deltas, anchors, targets = example()
    for level in deltas:
        level.requires_grad_()
    criterion()(logits, deltas, anchors, targets)["box_regression"].backward()
    touched = flatten_maps([level.grad for level in deltas], 9).abs().sum(-1) > 0  # type: ignore[misc]
    match = torch.stack([Matcher()(t["boxes"], torch.cat(anchors)) for t in targets])
    assert torch.equal(touched, match >= 0)


def test_geometry_is_float32_under_autocast() -> None:
    _, deltas, _, targets = example()
    half = [level.bfloat16() for level in deltas]
    logits = [torch.full((3, 27, *size), -2.0, dtype=torch.bfloat16) for size in FEATURES]
    anchors = AnchorGenerator()(FEATURES)
    for target in targets:
        target["boxes"] = target["boxes"].float()
    low = criterion(box_loss="giou")(logits, half, anchors, targets)
    high = criterion(box_loss="giou")(
        [level.float() for level in logits], [level.float() for level in half], anchors, targets
    )
    assert low["box_regression"].dtype == torch.float32
    assert_close(low, high, rtol=1e-6, atol=0)


def test_a_perfect_prediction_has_no_loss() -> None:
    box = torch.tensor([[0.0, 0, 10, 10]])
    losses = criterion()(
        [torch.full((1, 1, 1, 1), 50.0)],
        [torch.zeros(1, 4, 1, 1)],
        [box],
        [{"boxes": box, "labels": torch.tensor([0])}],
    )
    assert sum(losses.values()) == 0


def test_the_number_of_positives_is_averaged_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = example()
    alone = criterion()(*case)["classification"]

    def other_rank_found_twice_as_many(count: torch.Tensor, *, async_op: bool) -> None:
        assert async_op
        count *= 3

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", other_rank_found_twice_as_many)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert_close(criterion()(*case)["classification"], alone / 1.5)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_ranks_add_up_their_positives_while_the_box_losses_are_computed(
    on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []

    class Work:
        def wait(self) -> None:
            order.append("wait")

    def all_reduce(_: torch.Tensor, *, async_op: bool = False) -> Work:
        assert async_op
        order.append("add up")
        return Work()

    class Coder(BoxCoder):
        def encode(self, *arguments: Any) -> torch.Tensor:
            order.append("box losses")
            return super().encode(*arguments)

    def classification_loss(
        logits: Sequence[torch.Tensor],
        targets: torch.Tensor,
        *,
        num_classes: int,
        divisor: torch.Tensor,
    ) -> torch.Tensor:
        order.append("classification")
        assert targets.max() < num_classes
        return logits[0].sum() / divisor[0]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(criterion_module, "runs_on_cpu", lambda _: on_cpu)
    module = RetinaNetCriterion(Matcher(), Coder(), classification_loss=classification_loss)
    module(*example())
    assert order == ["add up", "box losses", "wait", "classification"]


def test_the_initial_loss_is_small_with_the_prior() -> None:
    logits, deltas, anchors, targets = example()
    start = [torch.full_like(level, -math.log(99)) for level in logits]
    loss = criterion()(start, deltas, anchors, targets)["classification"]
    assert 0.5 < loss < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"focal_alpha": 2}, r"focal_alpha must be in \[0, 1\], got 2"),
        ({"focal_gamma": -1}, "focal_gamma.* -1"),
        ({"box_loss": "iou"}, "box_loss 'iou'.*'smooth_l1', 'l1', 'giou'"),
        ({"smooth_l1_beta": 0}, "smooth_l1_beta.* 0"),
        ({"box_loss_weight": -1}, "box_loss_weight.* -1"),
        ({"normalizer": "sum"}, "normalizer 'sum'.*'batch', 'image' or 'ema'"),
    ],
)
def test_errors_name_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        criterion(**options)


def test_the_assigner_decides_what_is_positive() -> None:
    logits, deltas, anchors, targets = example()
    logits = [level.requires_grad_() for level in logits]

    def first_anchor(boxes: torch.Tensor, grid: Any) -> torch.Tensor:
        matched_idxs = torch.full((len(grid.anchors),), BACKGROUND)
        matched_idxs[0] = 0 if len(boxes) else BACKGROUND
        return matched_idxs

    module = RetinaNetCriterion(first_anchor, BoxCoder(), classification_loss=CrossEntropyMapLoss())
    module(logits, deltas, anchors, targets)["classification"].backward()
    pushed_up = flatten_maps([level.grad for level in logits], 9) < 0  # type: ignore[misc]
    assert pushed_up.nonzero().tolist() == [[1, 0, 0], [2, 0, 0]]


def test_atss_is_an_assigner() -> None:
    logits, deltas, anchors, targets = example()
    losses = RetinaNetCriterion(ATSSAssigner(), BoxCoder())(logits, deltas, anchors, targets)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


def test_an_assigner_with_the_wrong_number_of_matches_is_named() -> None:
    module = RetinaNetCriterion(lambda boxes, _: torch.zeros(len(boxes)).long(), BoxCoder())
    with pytest.raises(ValueError, match=r"\[774\].*lambda.*\[0\]"):
        module(*example())


def test_maps_anchors_and_targets_that_do_not_fit_are_errors() -> None:
    logits, deltas, anchors, targets = example()
    empty = [torch.zeros(3, 36, 0, 1), *deltas[1:]]
    few = [torch.zeros(3, 3, 8, 8), *deltas[1:]]
    for call, message in (
        (([], [], [], targets), "logits is empty"),
        ((logits, deltas[:-1], anchors, targets), "one tensor per level, got 5, 4 and 5"),
        ((logits, empty, anchors, targets), r"Level 0 .*\[3, 36, 0, 1\]"),
        ((logits, few, anchors, targets), r"Level 0 .*\[3, 3, 8, 8\]"),
        ((logits, deltas, anchors, targets[:1]), "one target per image, got 1 for a batch of 3"),
        (([m[:0] for m in logits], [m[:0] for m in deltas], anchors, []), "got 0 for a batch of 0"),
    ):
        with pytest.raises(ValueError, match=message):
            criterion()(*call)


def class_targets(rows: int) -> torch.Tensor:
    """Return class targets of two images: mostly background, some classes, some ignored."""
    targets = torch.full((2, rows), BACKGROUND)
    targets[torch.rand(2, rows) < 0.2] = IGNORED
    chosen = torch.rand(2, rows) < 0.1
    targets[chosen] = torch.randint(CLASSES, (int(chosen.sum()),))
    return targets


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_the_softmax_loss_has_a_background_logit_of_0(
    layout: Any, alpha: float | None, gamma: float
) -> None:
    logits = [torch.randn(2, 9 * CLASSES, *size, dtype=torch.float64) for size in FEATURES]
    logits = [level.contiguous(memory_format=layout).requires_grad_() for level in logits]
    targets = class_targets(sum(9 * h * w for h, w in FEATURES))
    divisor = torch.tensor([3.0, 7.0])
    loss = SoftmaxFocalMapLoss(alpha, gamma)(logits, targets, num_classes=CLASSES, divisor=divisor)
    rows = F.pad(flatten_maps(logits, 9), (0, 1))
    p = rows.softmax(dim=-1)
    classes = targets.masked_fill(targets == BACKGROUND, CLASSES).clamp(min=0)
    p_t = p.gather(2, classes[..., None])[..., 0]
    weights = torch.ones_like(p_t)
    if alpha is not None:
        weights = torch.where(targets == BACKGROUND, 1 - alpha, alpha).double()
    losses = -weights * (1 - p_t) ** gamma * p_t.log()
    expected = (losses.masked_fill(targets == IGNORED, 0).sum(dim=1) / divisor).sum()
    assert_close(loss, expected)
    found = torch.autograd.grad(loss, logits, retain_graph=True)
    assert_close(found, torch.autograd.grad(expected, logits))


def test_the_cross_entropy_is_that_of_torch() -> None:
    logits = [torch.randn(2, 9 * CLASSES, *size) for size in FEATURES]
    targets = class_targets(sum(9 * h * w for h, w in FEATURES))
    loss = CrossEntropyMapLoss()(logits, targets, num_classes=CLASSES, divisor=torch.ones(2))
    rows = flatten_maps(logits, 9)[targets != IGNORED]
    wanted = F.one_hot(targets[targets != IGNORED] + 1, CLASSES + 1)[:, 1:].float()
    expected = F.binary_cross_entropy_with_logits(rows, wanted, reduction="sum")
    assert_close(loss, expected)


def test_losses_of_half_precision_maps_are_float32() -> None:
    logits = [torch.randn(2, 9 * CLASSES, *size).bfloat16() for size in FEATURES]
    targets = class_targets(sum(9 * h * w for h, w in FEATURES))
    for loss in (FocalMapLoss(), CrossEntropyMapLoss(), SoftmaxFocalMapLoss()):
        value = loss(logits, targets, num_classes=CLASSES, divisor=torch.ones(2))
        wide = loss(
            [level.float() for level in logits], targets, num_classes=CLASSES, divisor=torch.ones(2)
        )
        assert value.dtype == torch.float32
        assert_close(value, wide, rtol=1e-5, atol=0)


def test_a_module_as_classification_loss_belongs_to_the_criterion() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, logits: Any, targets: Any, **options: Any) -> torch.Tensor:
            return self.scale * FocalMapLoss()(logits, targets, **options)

    module = criterion(classification_loss=Scaled())
    assert set(module.state_dict()) == {"classification_loss.scale"}
    case = example()
    assert_close(module(*case)["classification"], criterion()(*case)["classification"])


def test_the_default_loss_takes_focal_alpha_and_gamma() -> None:
    module = criterion(focal_alpha=None, focal_gamma=1.0)
    assert module.classification_loss == FocalMapLoss(None, 1.0)
    case = example()
    same = criterion(classification_loss=FocalMapLoss(None, 1.0))
    assert_close(module(*case), same(*case), rtol=0, atol=0)
    with pytest.raises(ValueError, match="focal_gamma=1.0 are options of the default"):
        criterion(classification_loss=CrossEntropyMapLoss(), focal_gamma=1.0)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        FocalMapLoss(2)
    with pytest.raises(ValueError, match="gamma.* -1"):
        SoftmaxFocalMapLoss(0.5, -1)


@pytest.mark.parametrize("loss", [FocalMapLoss, SoftmaxFocalMapLoss])
def test_alpha_and_gamma_of_a_wrong_type_are_named(loss: Any) -> None:
    for name in ("alpha", "gamma"):
        for value in ("1", True, [0.5], torch.tensor(0.5)):
            with pytest.raises(TypeError, match=rf"{name} must be a number, got"):
                loss(**{name: value})


def test_old_names_work_with_a_warning() -> None:
    matcher = Matcher(0.6)
    with pytest.warns(DeprecationWarning, match="matcher= of RetinaNetCriterion.*use assigner="):
        module = RetinaNetCriterion(matcher=matcher, box_coder=BoxCoder())  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match="RetinaNetCriterion.matcher.*use assigner"):
        assert module.matcher is matcher
    with pytest.warns(DeprecationWarning, match="use assigner"):
        module.matcher = Matcher()  # type: ignore[misc]
    assert module.assigner is not matcher
    with pytest.warns(DeprecationWarning, match=r"focal_gamma.*use classification_loss\.gamma"):
        module.focal_gamma = 1.0  # type: ignore[misc]
    assert module.classification_loss == FocalMapLoss(0.25, 1.0)
    with pytest.warns(DeprecationWarning, match=r"focal_alpha.*use classification_loss\.alpha"):
        assert module.focal_alpha == 0.25
    both: Any = {"matcher": matcher, "assigner": matcher}
    with pytest.raises(TypeError, match="assigner and its old name matcher"):
        RetinaNetCriterion(box_coder=BoxCoder(), **both)


def test_a_module_as_assigner_can_be_set_under_the_old_name() -> None:
    class Assigning(nn.Module):
        def forward(self, boxes: torch.Tensor, grid: Any) -> torch.Tensor:
            return Matcher()(boxes, grid)

    module = criterion()
    with pytest.warns(DeprecationWarning, match="use assigner"):
        module.matcher = Assigning()  # type: ignore[misc]
    assert isinstance(module.assigner, Assigning)
    case = example()
    assert_close(module(*case), criterion()(*case), rtol=0, atol=0)
