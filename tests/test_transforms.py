from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from focaldet.transforms import Preprocess, resized_size


@pytest.mark.parametrize(
    ("size", "expected"),
    [((480, 640), (800, 1066)), ((640, 480), (1066, 800)), ((100, 1000), (133, 1333))],
)
def test_sizes_by_hand(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(size, 800, 1333) == expected


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_sizes_stay_in_bounds(height: int, width: int) -> None:
    new = resized_size((height, width), 800, 1333)
    assert 1 <= min(new) <= 800
    assert max(new) <= 1333


@pytest.mark.parity
def test_batches_are_torchvisions() -> None:
    peer = GeneralizedRCNNTransform(64, 100, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).eval()
    images = [torch.rand(3, 30, 47), torch.rand(3, 90, 20), torch.rand(3, 200, 201)]
    targets: Any = [{"boxes": torch.tensor([[1.0, 2, 9, 20]]), "labels": torch.tensor([0])}] * 3
    expected, expected_targets = peer(images, targets)
    batch = Preprocess(min_size=64, max_size=100)(images)
    assert_close(batch.tensor, expected.tensors, rtol=0, atol=0)
    assert batch.sizes == expected.image_sizes
    assert batch.original_sizes == [(30, 47), (90, 20), (200, 201)]
    for ours, theirs in zip(batch.scale_targets(targets), expected_targets, strict=True):
        assert_close(ours["boxes"], theirs["boxes"])


def test_padding_is_zero_below_and_right_and_divides() -> None:
    batch = Preprocess(min_size=20, max_size=60, size_divisor=16)(
        [torch.rand(3, 20, 20), torch.rand(3, 20, 40)]
    )
    assert batch.tensor.shape == (2, 3, 32, 48)
    assert float(batch.tensor[0, :, 20:].abs().sum() + batch.tensor[0, :, :, 20:].abs().sum()) == 0


def test_images_that_a_transform_has_resized_keep_their_size() -> None:
    preprocess = Preprocess(min_size=20, max_size=60, size_divisor=16)
    images = [torch.rand(3, 30, 47), torch.rand(3, 90, 17)]
    target: Any = {"boxes": torch.tensor([[1.0, 2, 9, 20]]), "labels": torch.tensor([0])}
    batch = preprocess(images, resize=False)
    assert batch.tensor.shape == (2, 3, 96, 48)
    assert batch.sizes == batch.original_sizes == [(30, 47), (90, 17)]
    assert_close(batch.scale_targets([target, target])[1]["boxes"], target["boxes"], rtol=0, atol=0)
    once = Preprocess(min_size=30, max_size=90)(images[:1]).tensor[0, :, :30, :47]
    assert_close(batch.tensor[0, :, :30, :47], once, rtol=0, atol=0)


def test_targets_as_given_are_left_alone() -> None:
    target: Any = {"boxes": torch.tensor([[1.0, 2, 9, 20]]), "labels": torch.tensor([0])}
    batch = Preprocess(min_size=60, max_size=60)([torch.rand(3, 30, 30)])
    assert batch.scale_targets([target])[0]["boxes"].tolist() == [[2, 4, 18, 40]]
    assert target["boxes"].tolist() == [[1, 2, 9, 20]]


def test_a_sliver_keeps_a_pixel() -> None:
    batch = Preprocess()([torch.rand(3, 1, 5000)])
    assert batch.sizes == [(1, 1333)]


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (
            torch.zeros(1, 5, 5),
            ValueError,
            r"`images\[1\]` must be of shape \[3, H, W\].*\[1, 5, 5\]",
        ),
        (
            torch.zeros(4, 5, 5),
            ValueError,
            r"`images\[1\]` must be of shape \[3, H, W\].*\[4, 5, 5\]",
        ),
        (torch.tensor(1.0), ValueError, r"`images\[1\]` must be of shape .*got \[\]"),
        (
            torch.zeros(3, 0, 5),
            ValueError,
            r"`images\[1\]` must be at least one pixel.*\[3, 0, 5\]",
        ),
        (torch.zeros(3, 5, 5).byte(), TypeError, r"`images\[1\]` must be floating point.*uint8"),
        (torch.rand(3, 5, 5) * 255, ValueError, r"`images\[1\]` must be in \[0, 1\].*255"),
        (torch.full((3, 5, 5), -2.0), ValueError, r"`images\[1\]` must be in \[0, 1\].*mean"),
        (torch.full((3, 5, 5), torch.nan), ValueError, r"`images\[1\]` must be finite"),
        ("photo.jpg", TypeError, r"`images\[1\]` must be a tensor; got str"),
    ],
)
def test_wrong_images_are_named(image: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Preprocess()([torch.rand(3, 5, 5), image])


def test_no_images_are_an_error() -> None:
    with pytest.raises(ValueError, match="`images` must be not empty"):
        Preprocess()([])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_size": 0}, "`min_size` must be >= 1; got 0"),
        ({"max_size": 100}, "`max_size` must be >= 800; got 100"),
        ({"std": (1, 0, 1)}, "`std` must be > 0; got 0"),
        ({"mean": (1,)}, "`mean` must be three numbers"),
        ({"size_divisor": 0}, "`size_divisor` must be >= 1; got 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**options)
