from __future__ import annotations

from typing import Any

import pytest
import torch

from focaldet.structures import check_targets

GOOD: Any = {"boxes": torch.tensor([[1.0, 1, 5, 5]]), "labels": torch.tensor([2])}


def changed(**changes: Any) -> list[Any]:
    """Return two targets. The second has some wrong entries."""
    return [GOOD, {**GOOD, **changes}]


def test_good_targets_pass_and_so_does_an_image_without_objects() -> None:
    empty: Any = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    whole = {"boxes": torch.tensor([[0.0, 0, 20, 10]]), "labels": torch.tensor([0]), "area": 3}
    check_targets([GOOD, empty, whole], [(10, 20)] * 3, num_classes=3)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("targets", "kind", "message"),
    [
        ([GOOD], ValueError, "one target per image, but targets has 1 for 2 images"),
        ([GOOD] * 3, ValueError, "targets has 3 for 2 images"),
        (changed(labels=torch.tensor([-1])), ValueError, r"targets\[1\]\['labels'\]\[0\] is -1, but num_classes is 3"),
        (changed(labels=torch.tensor([3])), ValueError, r"targets\[1\]\['labels'\]\[0\] is 3.*start at 0"),
        (changed(labels=torch.tensor([1.0])), TypeError, r"targets\[1\]\['labels'\] must have dtype torch.int64, got torch.float32"),
        (changed(labels=torch.tensor([1, 1])), ValueError, r"\['labels'\] must have shape \[1\].*got \[2\]"),
        (changed(labels=[1]), TypeError, r"\['labels'\] must be a tensor, got a list"),
        (changed(boxes=torch.tensor([[1.0, 1, torch.nan, 5]])), ValueError, r"targets\[1\]\['boxes'\]\[0\] = \[1.0, 1.0, nan, 5.0\] contains NaN"),
        (changed(boxes=torch.tensor([[1.0, 1, torch.inf, 5]])), ValueError, r"\['boxes'\]\[0\] = .*inf.* contains NaN or infinity"),
        (changed(boxes=torch.tensor([[5.0, 1, 5, 5]])), ValueError, r"targets\[1\]\['boxes'\]\[0\] = \[5.0, 1.0, 5.0, 5.0\] has no area.*not \(x, y, width, height\)"),
        (changed(boxes=torch.tensor([[1.0, 1, 21, 5]])), ValueError, r"\[1.0, 1.0, 21.0, 5.0\] is not inside the image, which is 10 pixels high and 20 wide.*clip_boxes"),
        (changed(boxes=torch.tensor([[-1.0, 1, 2, 5]])), ValueError, r"\[-1.0, 1.0, 2.0, 5.0\] is not inside the image"),
        (changed(boxes=torch.tensor([1.0, 1, 2, 5])), ValueError, r"targets\[1\]\['boxes'\].*\[N, 4\].*\[4\]"),
        (changed(boxes=torch.tensor([[1, 1, 2, 5]])), TypeError, r"targets\[1\]\['boxes'\].*floating-point.*int64"),
        ([GOOD, {"boxes": GOOD["boxes"]}], TypeError, r"targets\[1\] has no 'labels', only \['boxes'\]"),
        ([GOOD, GOOD["boxes"]], TypeError, r"targets\[1\] must be a dictionary .*got a Tensor"),
    ],
)  # fmt: skip
def test_wrong_targets_are_named_with_the_callers_numbers(
    targets: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        check_targets(targets, [(10, 20)] * 2, num_classes=3)
