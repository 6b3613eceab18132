from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from focaldet import AnchorGenerator
from focaldet.anchor_grid import AnchorGrid
from focaldet.boxes import box_iou
from tests.helpers.boxes import random_boxes

SIZES = [(13, 20), (7, 10)]


def grid(**options: Any) -> AnchorGrid:
    return AnchorGrid(AnchorGenerator((32, 64), strides=(8, 16), **options)(SIZES), SIZES)


KINDS = [
    *({}, {"plus_one": True}, {"mode": "rounded"}, {"plus_one": True, "offset": 0.0}),
    {"mode": "inclusive_rounded"},
]


def test_a_window_by_hand() -> None:
    anchors = torch.tensor([[8.0 * x, 0, 8.0 * x + 16, 16] for x in range(5)])
    windows = AnchorGrid([anchors], [(1, 5)]).windows(
        torch.tensor([[16.0, 0, 32, 16], [16, 0, 32, 16], [100, 0, 110, 9]]),
        torch.tensor([0.34, 0.3, 0.0]),  # the IoU with an anchor 8 pixels away is 1/3
    )
    assert windows.num_anchors().tolist() == [1, 3, 0]
    boxes, found = windows.pairs(0, 3)
    assert (boxes.tolist(), found.tolist()) == ([0, 1, 1, 1], [2, 1, 2, 3])
    assert [part.tolist() for part in windows.pairs(1, 3)] == [[1, 1, 1], [1, 2, 3]]


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.sampled_from(KINDS))
def test_windows_contain_every_anchor_above_the_iou_and_few_others(
    seed: int, iou: float, kind: dict[str, Any]
) -> None:
    torch.manual_seed(seed)
    anchors = grid(**kind)
    boxes = random_boxes(8, torch.float32) * 1.5
    wanted = box_iou(boxes, anchors.anchors)
    windows = anchors.windows(boxes, torch.full((8,), iou))
    within = torch.zeros_like(wanted, dtype=torch.bool)
    within[windows.pairs(0, 8)] = True
    assert_close(within.sum(dim=1), windows.num_anchors())
    wanted = (wanted >= iou) & (wanted > 0)
    assert not bool((wanted & ~within).any())
    assert int(within.sum()) <= 100 + 4 * int(wanted.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_anchors_of_each_kind_overlap_most(kind: dict[str, Any]) -> None:
    anchors = grid(**kind)
    boxes = random_boxes(50, torch.float32) * 1.5
    iou = box_iou(boxes, anchors.anchors)
    kinds = torch.cat([torch.arange(h * w * 9) % 9 + 9 * i for i, (h, w) in enumerate(SIZES)])
    best = torch.stack([iou[:, kinds == kind].amax(dim=1) for kind in range(18)], dim=1)
    assert_close(iou.gather(1, anchors.nearest(boxes)), best)


def test_levels_may_differ_in_anchors_per_cell() -> None:
    first, second = torch.rand(12, 4), torch.rand(5, 4)
    anchors = AnchorGrid([first, second], [(2, 3), (1, 1)])
    assert_close(anchors.anchors, torch.cat((first, second)))
    assert anchors.nearest(torch.rand(1, 4)).shape == (1, 2 + 5)


def test_the_grid_knows_the_size_and_stride_of_each_level() -> None:
    anchors = grid()
    assert anchors.grid_sizes == ((13, 20), (7, 10))
    assert anchors.num_anchors == (13 * 20 * 9, 7 * 10 * 9)
    assert_close(anchors.strides, torch.tensor([[8.0, 8], [16, 16]]))
    sizes = [(4, 6), (1, 3)]
    generator = AnchorGenerator((32, 64), strides=(8, 16), mode="torchvision", offset=0)
    uneven = AnchorGrid(generator(sizes, (40, 90)), sizes)  # 40 / 4, 90 / 6 and 90 / 3 pixels
    assert_close(uneven.strides, torch.tensor([[15.0, 10], [30, torch.nan]]), equal_nan=True)


@pytest.mark.parametrize(
    ("anchors", "sizes", "message"),
    [
        ([], [], "anchors is empty"),
        ([6], [(1, 2), (1, 1)], "grid_sizes.*2 sizes and 1 levels"),
        ([6], [(2, 2)], r"anchors\[0\].*2x2 grid.*\[6, 4\]"),
        ([6, 0], [(2, 3), (1, 1)], r"anchors\[1\].*\[0, 4\]"),
        ([6], [(0, 3)], r"grid_sizes\[0\].*\(0, 3\)"),
    ],
)
def test_errors_name_anchors_that_do_not_fill_their_grid(
    anchors: list[int], sizes: list[tuple[int, int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AnchorGrid([torch.rand(count, 4) for count in anchors], sizes)


def test_errors_name_anchors_of_the_wrong_shape_or_type() -> None:
    with pytest.raises(ValueError, match=r"anchors\[0\] must have shape \[N, 4\]"):
        AnchorGrid([torch.rand(6, 5)], [(2, 3)])
    with pytest.raises(TypeError, match=r"anchors\[1\] must be a floating-point"):
        AnchorGrid([torch.rand(6, 4), torch.ones(1, 4, dtype=torch.int64)], [(2, 3), (1, 1)])
