from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision import ops

from focaldet.boxes import (
    box_area,
    box_iou,
    clip_boxes,
    cxcywh_to_xyxy,
    generalized_box_iou,
    scale_boxes,
    xywh_to_xyxy,
    xyxy_to_cxcywh,
    xyxy_to_xywh,
)
from tests.helpers.boxes import random_boxes


def test_iou_by_hand() -> None:
    boxes1 = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    boxes2 = torch.tensor([[0.0, 0, 10, 10], [5, 5, 15, 15], [10, 0, 20, 10]])
    assert_close(box_iou(boxes1, boxes2)[0], torch.tensor([1, 25 / 175, 0]))


@pytest.mark.parity
def test_iou_and_giou_agree_with_torchvision() -> None:
    a, b = random_boxes(40), random_boxes(40)
    assert_close(box_iou(a, b), ops.box_iou(a, b), rtol=1e-12, atol=0)
    assert_close(1 - generalized_box_iou(a, b), ops.generalized_box_iou_loss(a, b))


@given(st.integers(0, 2**32 - 1))
def test_iou_is_symmetric_and_between_0_and_1(seed: int) -> None:
    torch.manual_seed(seed)
    a, b = random_boxes(5, torch.float32), random_boxes(7, torch.float32)
    iou = box_iou(a, b)
    assert_close(iou, box_iou(b, a).T)
    assert bool(((iou >= 0) & (iou <= 1)).all())
    giou = generalized_box_iou(a, b[:5])
    assert bool(((giou >= -1) & (giou <= iou[range(5), range(5)] + 1e-6)).all())


def test_boxes_without_area_have_an_iou_of_0_and_finite_gradients() -> None:
    point = torch.tensor([[3.0, 3.0, 3.0, 3.0]], requires_grad=True)
    assert box_iou(point, point).item() == 0
    giou = generalized_box_iou(point, torch.tensor([[3.0, 3.0, 3.0, 3.0]])).sum()
    [gradient] = torch.autograd.grad(giou, point)
    assert bool(gradient.isfinite().all())


def test_giou_passes_gradcheck() -> None:
    boxes = random_boxes(6).requires_grad_()
    assert torch.autograd.gradcheck(generalized_box_iou, (boxes, random_boxes(6)))


def test_empty_boxes_give_empty_results() -> None:
    empty = torch.zeros(0, 4)
    assert box_iou(empty, random_boxes(3, torch.float32)).shape == (0, 3)
    assert box_area(empty).shape == (0,)
    assert generalized_box_iou(empty, empty).shape == (0,)
    assert clip_boxes(empty, (4, 4)).shape == (0, 4)
    assert xyxy_to_cxcywh(empty).shape == (0, 4)


def test_conversions_are_inverse_to_each_other() -> None:
    boxes = random_boxes(20)
    assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes)
    assert_close(xywh_to_xyxy(xyxy_to_xywh(boxes)), boxes)
    assert_close(scale_boxes(scale_boxes(boxes, (7, 9), (70, 30)), (70, 30), (7, 9)), boxes)
    with pytest.raises(ValueError, match=r"old_size must be .* above 0, got \(0, 9\)"):
        scale_boxes(boxes, (0, 9), (70, 30))


def test_clipping_uses_height_and_width() -> None:
    boxes = torch.tensor([[-5.0, -6.0, 50.0, 60.0]])
    assert clip_boxes(boxes, (20, 30)).tolist() == [[0, 0, 30, 20]]


def test_errors_name_wrong_boxes() -> None:
    good = torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"boxes2 must have shape \[N, 4\].*got \[2, 5\]"):
        box_iou(good, torch.zeros(2, 5))
    with pytest.raises(TypeError, match=r"boxes1.*floating-point.*torch.int64"):
        box_iou(good.long(), good)
    with pytest.raises(ValueError, match=r"boxes1 and boxes2.*\[2, 4\] and \[3, 4\]"):
        generalized_box_iou(good, torch.zeros(3, 4))
