from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.models.detection._utils import Matcher as PeerMatcher
from torchvision.ops import box_iou

from focaldet import AnchorGenerator, matching
from focaldet.matching import BACKGROUND, BETWEEN, Matcher
from tests.test_boxes import random_boxes

SQUARE = torch.tensor([[0.0, 0, 10, 10]])


@pytest.mark.parametrize(
    ("height", "expected"), [(5.1, 0), (5.0, 0), (4.9, BETWEEN), (4.0, BETWEEN), (3.9, BACKGROUND)]
)
def test_thresholds_are_closed_below(height: float, expected: int) -> None:
    anchors = torch.tensor([[0.0, 0, 10, height]], dtype=torch.float64)
    match = Matcher(force_match_floor=None)(SQUARE.double(), anchors)
    assert match.tolist() == [expected]


def test_the_best_anchor_of_an_object_is_positive_whatever_its_iou() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 2], [0, 0, 10, 1]])
    assert Matcher()(SQUARE, anchors).tolist() == [0, BACKGROUND]
    assert Matcher(force_match_floor=0.3)(SQUARE, anchors).tolist() == [BACKGROUND, BACKGROUND]


def test_a_box_that_no_anchor_touches_makes_none_positive() -> None:
    far = torch.tensor([[900.0, 900, 910, 910]])
    anchors = AnchorGenerator()([(8, 8), (4, 4), (2, 2), (1, 1), (1, 1)])
    small = anchors[0]
    assert set(Matcher()(far, small).tolist()) == {BACKGROUND}
    peer = PeerMatcher(0.5, 0.4, allow_low_quality_matches=True)
    assert int((peer(box_iou(far, small)) >= 0).sum()) == len(small)  # the fault we do not repeat


def test_ties_for_the_best_anchor_are_all_positive() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 2], [0, 8, 10, 10]])
    assert Matcher()(SQUARE, anchors).tolist() == [0, 0]


def test_a_forced_anchor_keeps_the_box_that_it_overlaps_most() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 1]])
    anchors = torch.tensor([[0.0, 0, 10, 7]])
    assert Matcher()(boxes, anchors).tolist() == [0]


def test_no_boxes_leave_background_alone() -> None:
    assert Matcher()(torch.zeros(0, 4), random_boxes(3, torch.float32)).tolist() == [BACKGROUND] * 3


@pytest.mark.parity
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.booleans(), st.integers(1, 300))
def test_matches_are_torchvisions_index_by_index(
    seed: int, count: int, force: bool, block: int
) -> None:
    torch.manual_seed(seed)
    anchors = torch.cat(AnchorGenerator()([(8, 9), (4, 5), (2, 3), (1, 2), (1, 1)]))
    boxes = random_boxes(count, torch.float32) * 0.5
    peer = PeerMatcher(0.5, 0.4, allow_low_quality_matches=force)(box_iou(boxes, anchors))
    matcher = Matcher(force_match_floor=0.0 if force else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_IOUS_AT_ONCE", block * 10)  # blocks of one to a few boxes
        assert_close(matcher(boxes, anchors), peer, rtol=0, atol=0)


def test_a_thousand_boxes_never_need_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spy(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        sizes.append(len(boxes) * len(anchors))
        return box_iou(boxes, anchors)  # type: ignore[no-any-return]

    monkeypatch.setattr(matching, "box_iou", spy)
    Matcher()(random_boxes(1000, torch.float32), random_boxes(20_000, torch.float32))
    assert max(sizes) <= matching._IOUS_AT_ONCE < 20_000 * 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positive_threshold": 0}, r"`positive_threshold` must be in \(0, 1\]; got 0"),
        ({"negative_threshold": 0.6}, r"`negative_threshold` must be in \[0, 0.5\]; got 0.6"),
        ({"force_match_floor": -0.1}, r"`force_match_floor` must be in \[0, 1\]; got -0.1"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Matcher(**options)


def test_no_anchors_are_an_error() -> None:
    with pytest.raises(ValueError, match="`anchors` must be not empty"):
        Matcher()(SQUARE, torch.zeros(0, 4))
