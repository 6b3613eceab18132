"""The options of resizing and padding in which published detectors differ."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from focaldet.transforms import Preprocess, resize_factor, resized_size

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "size_divisor": 1}


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_rounded_sizes_are_the_nearest(height: int, width: int) -> None:
    factor = resize_factor((height, width), 800, 1333)
    new = resized_size((height, width), 800, 1333, rounding="round")
    for side, old in zip(new, (height, width), strict=True):
        assert side >= 1
        assert side == 1 or abs(side - old * factor) <= 0.5 + 1e-6


def test_halves_are_rounded_up() -> None:
    assert resized_size((4, 5), 2, 99, rounding="round") == (2, 3)
    assert resized_size((4, 5), 2, 99) == (2, 2)


def batch_of(image: Tensor, **options: object) -> Tensor:
    batch: Tensor = Preprocess(min_size=20, max_size=60, **PLAIN, **options)([image]).tensor  # type: ignore[arg-type]
    return batch[0]


@pytest.mark.parametrize("size", [(50, 70), (10, 13)])
def test_antialiased_bytes_are_resized_as_by_pillow(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = batch_of(
        torch.from_numpy(pixels).permute(2, 0, 1).float() / 255, antialias=True, round_pixels=True
    )
    height, width = resized_size(size, 20, 60)
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    theirs = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    difference = (ours * 255 - theirs).abs()
    assert float(difference.max()) < 1.001
    assert float((difference > 0.5).float().mean()) < 0.05


def test_rounded_pixels_are_levels_of_a_byte_next_to_the_exact_value() -> None:
    image = torch.randint(0, 256, (3, 31, 47)).float() / 255
    exact, rounded = batch_of(image), batch_of(image, round_pixels=True)
    assert_close(rounded * 255, (rounded * 255).round(), rtol=0, atol=1e-4)
    assert float((rounded - exact).abs().max()) <= 0.5 / 255 + 1e-6
    assert batch_of(image.double(), round_pixels=True).dtype == torch.float64


def test_antialiasing_widens_the_filter_only_where_an_image_shrinks() -> None:
    small, large = torch.rand(3, 10, 10), torch.rand(3, 80, 80)
    assert_close(batch_of(small, antialias=True), batch_of(small))
    assert float((batch_of(large, antialias=True) - batch_of(large)).abs().max()) > 0.1


@pytest.mark.parametrize(("side", "padded"), [(31, 32), (32, 64), (33, 64)])
def test_padding_can_be_at_least_one_pixel(side: int, padded: int) -> None:
    image = torch.rand(3, side, side)
    options = {"min_size": side, "max_size": side, "size_divisor": 32}
    assert Preprocess(**options, always_pad=True)([image]).tensor.shape[2:] == (padded, padded)  # type: ignore[arg-type]
    usual = 32 * -(-side // 32)
    assert Preprocess(**options)([image]).tensor.shape[2:] == (usual, usual)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(0, 640), (480, 0), (-1, 640)])
def test_a_size_without_pixels_is_named(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"size must be .* above 0, got \({size[0]}, {size[1]}\)"):
        resized_size(size, 800, 1333)


def test_an_unknown_rounding_is_named() -> None:
    with pytest.raises(ValueError, match=r"size_rounding 'up'.*'floor'.*'round'"):
        Preprocess(size_rounding="up")  # type: ignore[arg-type]


@pytest.mark.parity
def test_photos_are_resized_as_pillow_does(coco_photos: list[Path]) -> None:
    for path in coco_photos[:2]:
        photo = Image.open(path).convert("RGB")
        image = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 255
        preprocess = Preprocess(
            min_size=300,
            max_size=500,
            antialias=True,
            round_pixels=True,
            size_rounding="round",
            **PLAIN,  # type: ignore[arg-type]
        )
        ours = preprocess([image]).tensor[0]
        _, height, width = ours.shape
        resized = photo.resize((width, height), Image.Resampling.BILINEAR)
        theirs = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        difference = (ours * 255 - theirs).abs()
        assert float(difference.max()) < 1.001
        assert float((difference > 0.5).float().mean()) < 0.02
