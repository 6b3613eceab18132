"""Which differences between a file's detections and a model's are left to rounding."""

from __future__ import annotations

import pytest
import torch

from focaldet.box_coder import BoxCoder
from focaldet.export._rounding import Rows, count_decided_by_rounding
from focaldet.postprocess import PostProcess

TOLERANCE = 1e-4


def rows(*found: tuple[float, float, int]) -> Rows:
    """Return boxes of 100x100 pixels from (x, score, label)."""
    boxes = torch.tensor([[x, 0.0, x + 100, 100] for x, _, _ in found]).reshape(-1, 4)
    scores = torch.tensor([score for _, score, _ in found])
    return Rows(boxes, scores, torch.tensor([label for _, _, label in found], dtype=torch.int64))


def count(first: Rows, second: Rows, *, both: Rows | None = None, agnostic: bool = False) -> int:
    both = both or rows()
    sides = tuple(
        Rows(*(torch.cat(parts) for parts in zip(side, both, strict=True)))
        for side in (first, second)
    )
    postprocess = PostProcess(BoxCoder(), nms_threshold=0.5, class_agnostic_nms=agnostic)
    return count_decided_by_rounding(postprocess, (sides[0], sides[1]), (first, second), TOLERANCE)


def test_either_of_two_equal_scores_may_be_kept() -> None:
    assert count(rows((0, 0.3, 0)), rows((20, 0.30005, 0))) == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((0, 0.3, 0), (20, 0.301, 0)),  # the scores differ
        ((0, 0.3, 0), (60, 0.3, 0)),  # too little overlap
        ((0, 0.3, 0), (20, 0.3, 1)),  # classes do not suppress each other
    ],
)
def test_other_differences_are_not_explained(
    first: tuple[float, float, int], second: tuple[float, float, int]
) -> None:
    assert count(rows(first), rows(second)) == 0


def test_classes_suppress_each_other_if_suppression_ignores_them() -> None:
    assert count(rows((0, 0.3, 0)), rows((20, 0.3, 1)), agnostic=True) == 2


def test_a_box_that_is_kept_instead_decides_about_worse_boxes_only() -> None:
    # The file keeps the box at 20, which suppresses one at 40; the model keeps that.
    assert count(rows((0, 0.3, 0), (40, 0.2, 0)), rows((20, 0.3, 0))) == 3
    # A better box cannot have been suppressed by it.
    assert count(rows((0, 0.3, 0), (40, 0.4, 0)), rows((20, 0.3, 0))) == 2


def test_a_chain_of_boxes_is_followed_to_its_end() -> None:
    model = rows((0, 0.30, 0), (40, 0.25, 0), (80, 0.15, 0))
    file = rows((20, 0.30, 0), (60, 0.20, 0))
    assert count(model, file) == 5


def test_an_iou_of_the_threshold_is_left_to_rounding() -> None:
    third = 100 / 3  # two boxes shifted by a third of their width have an IoU of 1/2
    kept = rows((0, 0.5, 0))
    assert count(rows((third, 0.3, 0)), rows(), both=kept) == 1
    assert count(rows(), rows((third, 0.3, 0)), both=kept) == 1
    assert count(rows((third, 0.6, 0)), rows(), both=kept) == 0  # nothing better suppresses it
    assert count(rows((third + 1, 0.3, 0)), rows(), both=kept) == 0


def test_nothing_differs() -> None:
    assert count(rows(), rows()) == 0
