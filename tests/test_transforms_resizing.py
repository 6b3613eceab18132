"""The options of resizing and padding in which published detectors differ."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from focaldet import transforms
from focaldet.transforms import Preprocess, resize_factor, resized_size
from tests.helpers.reference_mmdet import opencv_bilinear

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
    assert float((rounded - exact).abs().max()) < 1 / 255  # OpenCV drops bits before it rounds
    assert batch_of(image.double(), round_pixels=True).dtype == torch.float64


# --- OpenCV --------------------------------------------------------------------------------------


def levels_of(pixels: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """Resize ``[H, W, C]`` bytes to a given size with ``Preprocess``, and return bytes."""
    channels = pixels.shape[2]
    preprocess = Preprocess(
        min_size=min(height, width),
        max_size=max(height, width),
        mean=[0.0] * channels,
        std=[1.0] * channels,
        size_divisor=1,
        round_pixels=True,
        antialias=False,
    )
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transforms, "resized_size", lambda *_, **__: (height, width))
        [batch] = preprocess([image]).tensor
    resized: np.ndarray[Any, Any] = (batch * 255).round().byte().permute(1, 2, 0).numpy()
    return resized


SIDES = (1, 2, 3, 7, 16, 33, 100, 101)
SPECIAL = [  # halves, thirds, one side only, the same size, and a photo
    *(((2 * height, 2 * width), (height, width)) for height, width in ((1, 1), (9, 40), (40, 9))),
    *(((27, 120), (9, 40)), ((18, 40), (9, 40)), ((9, 80), (9, 40)), ((9, 40), (9, 40))),
    ((240, 321), (300, 401)),
]


def resizings() -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return old and new sizes: two random new ones for each old one, and special pairs."""
    random = np.random.default_rng(0)
    sizes = list(itertools.product(SIDES, repeat=2))
    chosen = [(old, sizes[i]) for old in sizes for i in random.choice(len(sizes), 2, replace=False)]
    return chosen + SPECIAL


def by_opencv(pixels: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    cv2 = pytest.importorskip("cv2")
    resized = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized).reshape(height, width, -1)


@pytest.mark.parametrize("resize", [opencv_bilinear, by_opencv])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("values", [[0, 255], range(256)], ids=["extremes", "all"])
def test_bytes_are_resized_as_by_opencv(channels: int, values: Any, resize: Any) -> None:
    random = np.random.default_rng(channels)
    for old, new in resizings():
        pixels = random.choice(np.array(values, dtype=np.uint8), (*old, channels))
        assert (levels_of(pixels, *new) == resize(pixels, *new)).all(), f"{old} to {new}"


def test_opencvs_arithmetic_by_hand() -> None:
    # Between 0 and 255, (1024 * 255) >> 4 is 16320. In the middle row, both weights are 1024, and
    # 16320 * 1024 >> 16 is 255, so the value is (255 + 255 + 2) >> 2 = 128. In the first and last row,
    # the weights are 341 and 1707, whose products give 84 and 425, and (84 + 425 + 2) >> 2 = 127.
    pixels = np.array([[[0], [255]], [[0], [255]]], dtype=np.uint8)
    assert levels_of(pixels, 3, 3)[:, :, 0].tolist() == [
        [0, 127, 255],
        [0, 128, 255],
        [0, 127, 255],
    ]


def test_halving_averages_blocks_of_four_pixels() -> None:
    pixels = np.array([[[1], [2]], [[3], [4]]], dtype=np.uint8)
    assert levels_of(pixels, 1, 1).tolist() == [[[3]]]  # 2.5, rounded up


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
