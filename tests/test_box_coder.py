from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.models.detection._utils import BoxCoder as PeerCoder

from focaldet.box_coder import BoxCoder, CornerBoxCoder
from tests.helpers.boxes import random_boxes


def test_deltas_by_hand() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 20]])
    deltas = BoxCoder().encode(torch.tensor([[5.0, 10, 25, 20]]), anchors)
    assert_close(deltas, torch.tensor([[1.0, 0.25, math.log(2), math.log(0.5)]]))


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10))
def test_decoding_is_the_inverse_of_encoding(seed: int, weight: float) -> None:
    torch.manual_seed(seed)
    coder = BoxCoder((weight, 1, 2, weight))
    boxes, anchors = random_boxes(8), random_boxes(8)
    assert_close(coder.decode(coder.encode(boxes, anchors), anchors), boxes)


@pytest.mark.parity
def test_encoding_and_decoding_agree_with_torchvision() -> None:
    boxes, anchors = random_boxes(30), random_boxes(30)
    peer, coder = PeerCoder((1.0, 1.0, 2.0, 2.0)), BoxCoder((1, 1, 2, 2))
    assert_close(coder.encode(boxes, anchors), peer.encode_single(boxes, anchors))
    deltas = torch.randn(30, 4, dtype=torch.float64) * 5  # some are clamped
    assert_close(coder.decode(deltas, anchors), peer.decode_single(deltas, anchors))


def test_extreme_deltas_decode_to_finite_boxes() -> None:
    anchors = torch.tensor([[0.0, 0, 16, 16]])
    box = BoxCoder().decode(torch.tensor([[0.0, 0.0, 1e6, 1e6]]), anchors)[0]
    assert_close(box[2] - box[0], torch.tensor(1000.0))


def test_decoding_passes_gradcheck() -> None:
    deltas = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(BoxCoder().decode, (deltas, random_boxes(5)))


def test_no_boxes_encode_to_no_deltas() -> None:
    empty = torch.zeros(0, 4)
    assert BoxCoder().encode(empty, empty).shape == (0, 4)
    assert BoxCoder().decode(empty, empty).shape == (0, 4)


def test_errors_name_wrong_weights() -> None:
    with pytest.raises(ValueError, match=r"weights must be four numbers.*\(1.0, 1.0\)"):
        BoxCoder((1.0, 1.0))
    with pytest.raises(ValueError, match=r"weights\[2\].*0"):
        BoxCoder((1.0, 1.0, 0, 1.0))
    with pytest.raises(ValueError, match=r"max_log_scale.*0"):
        BoxCoder(max_log_scale=0)


def test_the_log_scale_can_be_limited_from_below_or_not_at_all() -> None:
    anchors = torch.tensor([[0.0, 0, 16, 16]])
    deltas = torch.tensor([[0.0, 0, -9, 9]])
    limit = math.log(1000 / 16)

    def sides(coder: BoxCoder) -> list[float]:
        [[x1, y1, x2, y2]] = coder.decode(deltas, anchors).tolist()
        return [x2 - x1, y2 - y1]

    assert sides(BoxCoder()) == pytest.approx([16 * math.exp(-9), 1000], rel=1e-3)
    assert sides(BoxCoder(min_log_scale=-limit)) == pytest.approx([16 * 16 / 1000, 1000], rel=1e-3)
    free = BoxCoder(max_log_scale=math.inf)
    assert sides(free) == pytest.approx([16 * math.exp(-9), 16 * math.exp(9)], rel=1e-3)
    assert "min_log_scale=-4.1352" in repr(BoxCoder(min_log_scale=-limit))
    with pytest.raises(ValueError, match=r"min_log_scale.* 1\."):
        BoxCoder(min_log_scale=1)


# --- Corners -------------------------------------------------------------------------------------


def test_deltas_of_corners_by_hand() -> None:
    anchors = torch.tensor([[10.0, 20, 30, 60]])  # 20 wide, 40 high
    boxes = torch.tensor([[14.0, 12, 40, 62]])
    deltas = torch.tensor([[0.2, -0.2, 0.5, 0.05]])
    assert_close(CornerBoxCoder().encode(boxes, anchors), deltas)
    assert_close(CornerBoxCoder((5, 5, 5, 10)).encode(boxes, anchors)[0, 3], torch.tensor(0.5))
    assert_close(CornerBoxCoder((5, 5, 5, 5)).decode(5 * deltas, anchors), boxes)


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 10))
def test_decoding_corners_is_the_inverse_of_encoding_them(seed: int, weight: float) -> None:
    torch.manual_seed(seed)
    coder = CornerBoxCoder((weight, 1, 2, weight))
    boxes, anchors = random_boxes(8), random_boxes(8)
    assert_close(coder.decode(coder.encode(boxes, anchors), anchors), boxes)


def test_swapped_corners_are_put_in_order() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    decoded = CornerBoxCoder().decode(torch.tensor([[2.0, 0, -0.5, 0]]), anchors)
    assert_close(decoded, torch.tensor([[5.0, 0, 20, 10]]))


def test_decoding_corners_passes_gradcheck() -> None:
    deltas = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(CornerBoxCoder().decode, (deltas, random_boxes(5)))


def test_no_boxes_encode_to_no_deltas_of_corners() -> None:
    none = torch.zeros(0, 4)
    assert CornerBoxCoder().encode(none, none).shape == (0, 4)
    assert CornerBoxCoder().decode(none, none).shape == (0, 4)


def test_errors_name_wrong_weights_of_corners() -> None:
    with pytest.raises(ValueError, match=r"weights must be four numbers, for dx1, .*\(1.0,\)"):
        CornerBoxCoder((1.0,))
    with pytest.raises(ValueError, match=r"weights\[2\] must be greater than 0, got 0"):
        CornerBoxCoder((1, 1, 0, 1))
    assert repr(CornerBoxCoder((5, 5, 5, 5))) == "CornerBoxCoder(weights=(5, 5, 5, 5))"
