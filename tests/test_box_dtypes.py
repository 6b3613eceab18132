"""Areas and overlaps of boxes of any dtype are those of the same boxes in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision import ops

from focaldet.anchor_grid import AnchorGrid
from focaldet.anchors import AnchorGenerator
from focaldet.boxes import box_area, box_iou, generalized_box_iou, paired_box_iou
from focaldet.matching import ATSSAssigner, Matcher

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

HALF = [torch.float16, torch.bfloat16]
FLOATING = [*HALF, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
LARGEST = {torch.uint8: 255, torch.int8: 127, torch.int16: 32767, torch.float16: 30000.0}

dtypes = st.sampled_from([*FLOATING, *INTEGERS])
seeds = st.integers(0, 2**32 - 1)
sizes = st.sampled_from([10.0, 100.0, 300.0, 1000.0, 8000.0, 30000.0, 1e6])


def boxes_of(count: int, size: float, dtype: torch.dtype) -> Tensor:
    """Return random boxes of about ``size`` pixels, as exactly as the dtype holds them."""
    size = min(size, LARGEST.get(dtype, size))
    corners = torch.rand(count, 4, dtype=torch.float64) * size
    boxes = torch.cat((corners[:, :2].minimum(corners[:, 2:]), corners.view(-1, 2, 2).amax(1)), 1)
    return boxes.to(dtype)


@given(dtypes, sizes, seeds)
def test_areas_do_not_overflow(dtype: torch.dtype, size: float, seed: int) -> None:
    torch.manual_seed(seed)
    boxes = boxes_of(20, size, dtype)
    areas = box_area(boxes)
    expected = torch.float32 if dtype in HALF else dtype
    assert areas.dtype == (expected if dtype.is_floating_point else torch.int64)
    assert_close(areas.double(), box_area(boxes.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", FLOATING)
@given(size=sizes, seed=seeds)
def test_overlaps_are_as_accurate_as_their_dtype(
    dtype: torch.dtype, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    a, b = boxes_of(10, size, dtype), boxes_of(10, size, dtype)
    # The added 1e-7 changes the GIoU of boxes without area, but those of other boxes hardly.
    rounding = torch.finfo(dtype).eps + (1e-6 if dtype != torch.float64 else 1e-12)
    functions: list[Callable[[Tensor, Tensor], Tensor]]
    functions = [box_iou, paired_box_iou, generalized_box_iou]
    for overlap in functions:
        found = overlap(a, b)
        assert found.dtype == dtype
        assert_close(found.double(), overlap(a.double(), b.double()), rtol=rounding, atol=rounding)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", HALF)
def test_large_boxes_in_half_precision_agree_with_torchvision(dtype: torch.dtype) -> None:
    a, b = boxes_of(10, 2000.0, dtype), boxes_of(10, 2000.0, dtype)
    assert_close(box_area(a), ops.box_area(a))
    assert_close(box_iou(a, b), ops.box_iou(a, b).to(dtype))


def test_large_boxes_in_float16_by_hand() -> None:
    a = torch.tensor([[0.0, 0.0, 1000.0, 1000.0]], dtype=torch.float16)
    b = torch.tensor([[0.0, 0.0, 1000.0, 900.0]], dtype=torch.float16)
    assert box_area(a).item() == 1_000_000
    assert_close(box_iou(a, b), torch.tensor([[0.9]], dtype=torch.float16))
    assert_close(generalized_box_iou(a, b), torch.tensor([0.9], dtype=torch.float16))
    assert Matcher()(b, a).tolist() == [0]
    wide = torch.tensor([[0, 0, 70_000, 70_000]], dtype=torch.int32)
    assert box_area(wide).item() == 4_900_000_000


def test_overlaps_of_integer_boxes_are_floating_point() -> None:
    boxes = torch.tensor([[0, 0, 100, 100], [0, 0, 50, 100]], dtype=torch.uint8)
    assert_close(paired_box_iou(boxes[0], boxes[1]), torch.tensor(0.5))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("assigner", [Matcher(), ATSSAssigner()])
@pytest.mark.parametrize("count", [1, 100])
def test_assignments_in_half_precision_are_those_of_the_same_boxes_in_float32(
    assigner: Matcher | ATSSAssigner, dtype: torch.dtype, count: int
) -> None:
    feature_sizes = [(32, 40), (16, 20), (8, 10), (4, 5), (2, 3)]
    levels = [level.to(dtype) for level in AnchorGenerator()(feature_sizes)]
    grid = AnchorGrid(levels, feature_sizes)
    exact = AnchorGrid([level.float() for level in levels], feature_sizes)
    boxes = boxes_of(count, 320.0, dtype)
    expected = assigner(boxes.float(), exact)
    assert bool((expected >= 0).any())
    assert_close(assigner(boxes, grid), expected)
