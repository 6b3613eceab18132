"""Sizes and pixels of resized images are those of Detectron2, ODTK and Detectron."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from focaldet import RetinaNetConfig
from focaldet._pillow_resizing import resize_as_pillow, resize_with_integers
from focaldet.transforms import Preprocess, resize_factor, resized_size

PLAIN: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "size_divisor": 1}


def detectron2_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """Make the short side ``short``, then the long one at most ``long``, then add 0.5 and truncate."""
    scale = short / min(height, width)
    new: tuple[float, float] = (short, scale * width) if height < width else (scale * height, short)
    if max(new) > long:
        shrink = long / max(new)
        new = (new[0] * shrink, new[1] * shrink)
    return int(new[0] + 0.5), int(new[1] + 0.5)


def odtk_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """Multiply both sides by one ratio, and truncate."""
    ratio = short / min(height, width)
    if ratio * max(height, width) > long:
        ratio = long / max(height, width)
    return int(ratio * height), int(ratio * width)


def detectron_size(height: int, width: int, short: int, long: int) -> tuple[float, tuple[int, int]]:
    """Return Detectron's factor, whose limit holds after rounding, and the size OpenCV makes of it."""
    factor = float(short) / float(min(height, width))
    if np.round(factor * max(height, width)) > long:
        factor = float(long) / float(max(height, width))
    return factor, (int(np.rint(height * factor)), int(np.rint(width * factor)))


SIZES = [(height, width) for height in range(200, 801) for width in range(200, 801)]


def test_all_sizes_are_those_of_detectron2() -> None:
    two_step = [resized_size(size, 800, 1333, rounding="round_two_step") for size in SIZES]
    assert two_step == [detectron2_size(*size, 800, 1333) for size in SIZES]
    others = sum(
        new != resized_size(size, 800, 1333, rounding="round")
        for size, new in zip(SIZES, two_step, strict=True)
        if max(size) > 1.6 * min(size)  # the long side's limit matters above 1.67
    )
    assert others == 76
    assert resized_size((210, 620), 800, 1333, rounding="round_two_step") == (451, 1333)
    assert resized_size((210, 620), 800, 1333, rounding="round") == (452, 1333)


def test_all_sizes_are_those_of_odtk() -> None:
    assert [resized_size(size, 800, 1333) for size in SIZES] == [
        odtk_size(*size, 800, 1333) for size in SIZES
    ]


def test_all_sizes_and_factors_are_those_of_detectron() -> None:
    assert [
        (
            resize_factor(size, 800, 1333, rounding="round_before_limit"),
            resized_size(size, 800, 1333, rounding="round_before_limit"),
        )
        for size in SIZES[::7]
    ] == [detectron_size(*size, 800, 1333) for size in SIZES[::7]]
    # 1333.33 is not more than 1333 once it is rounded, so the short side is not shortened.
    assert resize_factor((600, 1000), 800, 1333, rounding="round_before_limit") == 800 / 600
    assert resize_factor((600, 1000), 800, 1333) == 1333 / 1000
    assert resized_size((4, 5), 2, 99, rounding="round_before_limit") == (2, 2)


CASES = [
    *[((480, 640), (256, 341)), ((427, 640), (256, 384)), ((640, 427), (384, 256))],
    *[((256, 341), (800, 1066)), ((375, 500), (256, 341)), ((333, 500), (256, 384))],
    *[((31, 47), (256, 388)), ((1000, 903), (256, 231)), ((256, 300), (256, 300))],
    *[((256, 300), (256, 451)), ((300, 256), (451, 256)), ((1, 1), (7, 5)), ((5, 7), (1, 1))],
    *[((97, 2), (256, 5)), ((2, 97), (5, 256)), ((512, 512), (256, 256))],
]


@pytest.mark.parametrize(("old", "new"), CASES)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_bytes_are_resized_exactly_as_by_pillow(
    old: tuple[int, int], new: tuple[int, int], channels: int
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (channels, *old), dtype=np.uint8)
    theirs = np.stack(
        [
            np.array(Image.fromarray(plane).resize(new[::-1], Image.Resampling.BILINEAR))
            for plane in pixels
        ]
    )
    for resize in (resize_as_pillow, resize_with_integers):
        assert torch.equal(resize(torch.from_numpy(pixels), new), torch.from_numpy(theirs))


@pytest.mark.parametrize("size", [(480, 640), (210, 620), (256, 256), (199, 77), (700, 900)])
@pytest.mark.parametrize("short", [200, 256])
def test_preprocessed_images_are_exactly_those_of_pillow(size: tuple[int, int], short: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    preprocess = Preprocess(
        min_size=short,
        max_size=2 * short,
        size_rounding="round_two_step",
        antialias=True,
        round_pixels=True,
        **PLAIN,
    )
    height, width = detectron2_size(*size, short, 2 * short)
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    theirs = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    for dtype in (torch.float32, torch.float64):
        ours = preprocess([image.to(dtype) / 255]).tensor[0]
        assert torch.equal((ours * 255).round().byte(), theirs)
        assert ours.dtype == dtype


def linear(values: np.ndarray[Any, Any], count: int, factor: float) -> np.ndarray[Any, Any]:
    """Interpolate along the last axis at points that are ``1 / factor`` apart; edges are repeated."""
    at = ((np.arange(count) + 0.5) / factor - 0.5).clip(0, values.shape[-1] - 1)
    left = np.floor(at).astype(int)
    right = np.minimum(left + 1, values.shape[-1] - 1)
    between: np.ndarray[Any, Any]
    between = values[..., left] * (1 - (at - left)) + values[..., right] * (at - left)
    return between


@pytest.mark.parametrize("size", [(61, 83), (83, 61), (13, 97), (301, 211)])
def test_pixels_can_be_spaced_by_the_intended_factor(size: tuple[int, int]) -> None:
    image = torch.rand(3, *size, dtype=torch.float64)
    options: dict[str, Any] = {
        "min_size": 100,
        "max_size": 150,
        "size_rounding": "round_before_limit",
    }
    ours = Preprocess(**options, **PLAIN, resize_by="factor")([image]).tensor[0]
    factor, (height, width) = detectron_size(*size, 100, 150)
    rows = linear(image.numpy(), width, factor)
    theirs = linear(rows.transpose(0, 2, 1), height, factor).transpose(0, 2, 1)
    assert_close(ours, torch.from_numpy(theirs), rtol=0, atol=1e-12)
    by_ratio = Preprocess(**options, **PLAIN)([image]).tensor[0]
    exact = all(math.isclose(side * factor, round(side * factor)) for side in size)
    assert torch.equal(ours, by_ratio) is exact


@pytest.mark.parametrize("changes", [{"antialias": True}, {"keep_ratio": False}])
def test_spacing_by_the_factor_contradicts_other_options(changes: dict[str, Any]) -> None:
    [(option, value)] = changes.items()
    message = f"resize_by='factor' requires .* got .*{option}={value}"
    with pytest.raises(ValueError, match=message):
        Preprocess(resize_by="factor", **changes)
    with pytest.raises(ValueError, match=message):
        RetinaNetConfig(num_classes=1, resize_by="factor", **changes)
