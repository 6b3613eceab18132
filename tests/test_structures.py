from __future__ import annotations

from typing import Any

import pytest
import torch

from focaldet.structures import check_targets

GOOD: Any = {"boxes": torch.tensor([[1.0, 1, 5, 5]]), "labels": torch.tensor([2])}


def changed(**changes: Any) -> list[Any]:
    """Return two targets, of which the second is good but for some entries."""
    return [GOOD, {**GOOD, **changes}]


def test_good_targets_pass_and_so_does_an_image_without_objects() -> None:
    empty: Any = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    whole = {"boxes": torch.tensor([[0.0, 0, 20, 10]]), "labels": torch.tensor([0]), "area": 3}
    check_targets([GOOD, empty, whole], [(10, 20)] * 3, num_classes=3)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("targets", "kind", "message"),
    [
        ([GOOD], ValueError, r"`targets` must be one per image \(2 images\); got 1 targets"),
        ([GOOD] * 3, ValueError, r"`targets` must be one per image \(2 images\); got 3 targets"),
        (changed(labels=torch.tensor([-1])), ValueError, r"targets\[1\]\['labels'\]` must be in 0\.\.2 .*got -1"),
        (changed(labels=torch.tensor([3])), ValueError, r"targets\[1\]\['labels'\]` must be in 0\.\.2 .*got 3"),
        (changed(labels=torch.tensor([1.0])), TypeError, r"\['labels'\]` must be of dtype torch.int64"),
        (changed(labels=torch.tensor([1, 1])), ValueError, r"\['labels'\]` must be of shape \[1\].*got \[2\]"),
        (changed(labels=[1]), TypeError, r"\['labels'\]` must be a tensor; got list"),
        (changed(boxes=torch.tensor([[1.0, 1, torch.nan, 5]])), ValueError, r"\['boxes'\]` must be finite; got \[1.0, 1.0, nan, 5.0\] at index 0"),
        (changed(boxes=torch.tensor([[1.0, 1, torch.inf, 5]])), ValueError, r"\['boxes'\]` must be finite"),
        (changed(boxes=torch.tensor([[5.0, 1, 5, 5]])), ValueError, r"targets\[1\]\['boxes'\]` must be boxes with x2 > x1.*not \(x, y, width, height\)"),
        (changed(boxes=torch.tensor([[1.0, 1, 21, 5]])), ValueError, r"inside the image, 0 <= x <= 20 and 0 <= y <= 10; got \[1.0, 1.0, 21.0, 5.0\]"),
        (changed(boxes=torch.tensor([[-1.0, 1, 2, 5]])), ValueError, "inside the image"),
        (changed(boxes=torch.tensor([1.0, 1, 2, 5])), ValueError, r"\['boxes'\]` must be of shape \[N, 4\]"),
        (changed(boxes=torch.tensor([[1, 1, 2, 5]])), TypeError, r"\['boxes'\]` must be a floating-point tensor"),
        ([GOOD, {"boxes": GOOD["boxes"]}], TypeError, r"`targets\[1\]` must be a dictionary .*got \['boxes'\]"),
        ([GOOD, GOOD["boxes"]], TypeError, r"`targets\[1\]` must be a dictionary .*got Tensor"),
    ],
)  # fmt: skip
def test_wrong_targets_are_named_with_the_callers_numbers(
    targets: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        check_targets(targets, [(10, 20)] * 2, num_classes=3)
