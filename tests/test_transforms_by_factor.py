"""Images resized by a factor are those of ``cv2.resize(image, None, fx=factor, fy=factor)``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from focaldet import RetinaNetConfig
from focaldet.transforms import Preprocess, resize_factor, resized_size
from tests.helpers.reference_opencv import resized_by_factor

# Enlarged, shrunk, halved with an odd side, nearly unchanged, with a side of 1, and unchanged.
SIZES = [
    ((37, 53), 80, 200),
    ((200, 301), 64, 90),
    ((74, 111), 37, 100),
    ((100, 101), 100, 102),
    ((101, 100), 100, 101),
    ((3, 90), 1, 30),
    ((64, 64), 64, 64),
    ((5, 7), 6, 20),
]


def preprocess(low: int, high: int, **options: Any) -> Preprocess:
    """Return preprocessing that resizes by a factor, to levels from 0 to 255."""
    return Preprocess(
        min_size=low,
        max_size=high,
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255,) * 3,
        size_divisor=1,
        size_rounding="round_half_even",
        resize_by="factor",
        **options,
    )


@pytest.mark.parametrize(("size", "low", "high"), SIZES)
@pytest.mark.parametrize("with_opencv", [False, True])
@pytest.mark.parametrize("as_bytes", [True, False])
def test_resizing_by_a_factor_is_opencvs(
    size: tuple[int, int], low: int, high: int, with_opencv: bool, as_bytes: bool
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    factor = resize_factor(size, low, high)
    source = image if as_bytes else image.astype(np.float32)
    if with_opencv:
        expected = pytest.importorskip("cv2").resize(source, None, fx=factor, fy=factor)
    else:
        expected = resized_by_factor(source, factor)
    batch = preprocess(low, high, round_pixels=as_bytes)(
        [torch.from_numpy(image / np.float32(255)).permute(2, 0, 1)]
    )
    assert batch.sizes == [expected.shape[:2]]
    difference = np.abs(batch.tensor[0].permute(1, 2, 0).numpy() - expected)
    assert difference.max() < (1e-3 if as_bytes else 0.05)


def test_sampling_by_the_ratio_of_the_sizes_is_something_else() -> None:
    image = torch.rand(3, 37, 53)
    by_factor = preprocess(80, 200)
    by_size = preprocess(80, 200)
    by_size.resize_by = "size"
    assert (by_factor([image]).tensor - by_size([image]).tensor).abs().max() > 1


def test_halves_are_rounded_to_the_even_number() -> None:
    sizes = [resized_size((4, side), 2, 100, rounding="round_half_even") for side in (5, 7, 9)]
    assert sizes == [(2, 2), (2, 4), (2, 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize_by": "ratio"}, "resize_by.*'ratio'"),
        ({"resize_by": "factor", "antialias": True}, "'factor' requires antialias=False"),
        ({"size_rounding": "even"}, "size_rounding.*'even'"),
    ],
)
def test_errors_name_wrong_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**options)
    with pytest.raises(ValueError, match=message):
        RetinaNetConfig(num_classes=1, **options)


def test_a_config_cannot_clip_to_the_last_pixel_twice() -> None:
    with pytest.raises(ValueError, match="'last_pixel' requires inclusive_corners=False"):
        RetinaNetConfig(num_classes=1, clip_to="last_pixel", inclusive_corners=True)
