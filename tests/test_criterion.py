from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from focaldet import AnchorGenerator
from focaldet.box_coder import BoxCoder
from focaldet.boxes import generalized_box_iou
from focaldet.criterion import RetinaNetCriterion
from focaldet.heads import flatten_maps
from focaldet.losses import sigmoid_focal_loss
from focaldet.matching import Matcher

FEATURES = [(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)]
CLASSES = 3


def criterion(**options: Any) -> RetinaNetCriterion:
    return RetinaNetCriterion(Matcher(), BoxCoder(), **options)


def example(batch: int = 3) -> tuple[list[torch.Tensor], list[torch.Tensor], Any, Any]:
    """Return logits, deltas, anchors and targets: 0, 1, 2 … objects an image."""
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


def test_batch_normalizer_divides_by_the_batchs_positives() -> None:
    case = example()
    losses = criterion(box_loss="l1")(*case)
    images = by_hand(*case)
    count = sum(positives for *_, positives in images)
    assert count > 3
    assert_close(losses["classification"], sum(focal for focal, *_ in images) / count)
    l1 = sum((a - b).abs().sum() for _, (a, b), _ in images)
    assert_close(losses["box_regression"], l1 / count)


def test_image_normalizer_divides_every_image_by_its_own() -> None:
    case = example()
    losses = criterion(box_loss="l1", normalizer="image")(*case)
    images = by_hand(*case)
    focal = sum(focal / max(1, n) for focal, _, n in images) / 3
    l1 = sum((a - b).abs().sum() / max(1, n) for _, (a, b), n in images) / 3
    assert_close(losses["classification"], focal)
    assert_close(losses["box_regression"], l1)


def test_ema_normalizer_moves_in_training_only_and_is_in_the_state_dict() -> None:
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


def test_images_without_objects_train_as_negatives() -> None:
    logits, deltas, anchors, targets = example()
    for level in (*logits, *deltas):
        level.requires_grad_()
    losses = criterion()(logits, deltas, anchors, [targets[0]] * 3)
    sum(losses.values()).backward()
    assert losses["box_regression"] == 0
    assert all(float(level.grad.min()) > 0 for level in logits)  # type: ignore[union-attr]
    assert all(level.grad is not None for level in deltas)  # every parameter takes part under DDP


def test_gradients_reach_only_the_deltas_of_positives() -> None:
    logits, deltas, anchors, targets = example()
    for level in deltas:
        level.requires_grad_()
    criterion()(logits, deltas, anchors, targets)["box_regression"].backward()
    touched = flatten_maps([level.grad for level in deltas], 9).abs().sum(-1) > 0  # type: ignore[misc]
    match = torch.stack([Matcher()(t["boxes"], torch.cat(anchors)) for t in targets])
    assert torch.equal(touched, match >= 0)


def test_float32_geometry_under_autocast() -> None:
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


def test_a_perfect_prediction_loses_nothing() -> None:
    box = torch.tensor([[0.0, 0, 10, 10]])
    losses = criterion()(
        [torch.full((1, 1, 1, 1), 50.0)],
        [torch.zeros(1, 4, 1, 1)],
        [box],
        [{"boxes": box, "labels": torch.tensor([0])}],
    )
    assert sum(losses.values()) == 0


def test_the_batchs_count_is_averaged_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = example()
    alone = criterion()(*case)["classification"]

    def other_rank_found_twice_as_many(count: torch.Tensor) -> None:
        count *= 3

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", other_rank_found_twice_as_many)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert_close(criterion()(*case)["classification"], alone / 1.5)


def test_the_initial_loss_is_small_with_the_prior() -> None:
    logits, deltas, anchors, targets = example()
    start = [torch.full_like(level, -math.log(99)) for level in logits]
    loss = criterion()(start, deltas, anchors, targets)["classification"]
    assert 0.5 < loss < 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"focal_alpha": 2}, r"`focal_alpha` must be in \[0, 1\]; got 2"),
        ({"focal_gamma": -1}, "`focal_gamma` must be >= 0; got -1"),
        ({"box_loss": "iou"}, "`box_loss` must be one of 'smooth_l1', 'l1', 'giou'; got 'iou'"),
        ({"smooth_l1_beta": 0}, "`smooth_l1_beta` must be > 0; got 0"),
        ({"box_loss_weight": -1}, "`box_loss_weight` must be >= 0; got -1"),
        ({"normalizer": "sum"}, "`normalizer` must be one of 'batch', 'image', 'ema'; got 'sum'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        criterion(**options)
