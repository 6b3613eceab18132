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
def test_batches_equal_torchvisions() -> None:
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


@pytest.mark.parity
def test_without_the_aspect_ratio_batches_equal_torchvisions_of_a_fixed_size() -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    peer = GeneralizedRCNNTransform(64, 100, mean, std, fixed_size=(64, 64)).eval()
    images = [torch.rand(3, 30, 47), torch.rand(3, 90, 20), torch.rand(3, 200, 201)]
    targets: Any = [{"boxes": torch.tensor([[1.0, 2, 9, 20]]), "labels": torch.tensor([0])}] * 3
    expected, expected_targets = peer(images, targets)
    batch = Preprocess(min_size=64, max_size=100, keep_ratio=False)(images)
    assert batch.tensor.shape == (3, 3, 64, 64)
    assert_close(batch.tensor, expected.tensors, rtol=0, atol=0)
    assert batch.sizes == expected.image_sizes == [(64, 64)] * 3
    for ours, theirs in zip(batch.scale_targets(targets), expected_targets, strict=True):
        assert_close(ours["boxes"], theirs["boxes"])


def test_padding_is_zero_and_to_the_right_and_below() -> None:
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


def test_the_targets_passed_are_not_modified() -> None:
    target: Any = {"boxes": torch.tensor([[1.0, 2, 9, 20]]), "labels": torch.tensor([0])}
    batch = Preprocess(min_size=60, max_size=60)([torch.rand(3, 30, 30)])
    assert batch.scale_targets([target])[0]["boxes"].tolist() == [[2, 4, 18, 40]]
    assert target["boxes"].tolist() == [[1, 2, 9, 20]]


def test_a_very_thin_image_keeps_one_pixel() -> None:
    batch = Preprocess()([torch.rand(3, 1, 5000)])
    assert batch.sizes == [(1, 1333)]


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (
            torch.zeros(1, 5, 5),
            ValueError,
            r"images\[1\].*\[3, H, W\].*\[1, 5, 5\].*expand",
        ),
        (
            torch.zeros(4, 5, 5),
            ValueError,
            r"images\[1\].*\[3, H, W\].*\[4, 5, 5\].*image\[:3\]",
        ),
        (torch.tensor(1.0), ValueError, r"images\[1\].*\[3, H, W\], got \[\]"),
        (
            torch.zeros(3, 0, 5),
            ValueError,
            r"images\[1\] has no pixels.*\[3, 0, 5\]",
        ),
        (
            torch.zeros(3, 5, 5).int(),
            TypeError,
            r"images\[1\] must be uint8 or floating-point.*int32.*uint8",
        ),
        (torch.rand(3, 5, 5) * 255, ValueError, r"in \[0, 1\], but images\[1\].*255"),
        (torch.full((3, 5, 5), -2.0), ValueError, r"in \[0, 1\], but images\[1\].*mean"),
        (torch.full((3, 5, 5), torch.nan), ValueError, r"images\[1\] contains NaN"),
        ("photo.jpg", TypeError, r"images\[1\] must be a tensor, got str"),
    ],
)
def test_wrong_images_are_named(image: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Preprocess()([torch.rand(3, 5, 5), image])


@pytest.mark.parametrize("layout", ["channels first", "channels last", "a part of a larger image"])
@pytest.mark.parametrize("resize", [True, False])
def test_bytes_are_divided_by_255(layout: str, resize: bool) -> None:
    image = torch.randint(256, (3, 40, 57), dtype=torch.uint8)
    if layout == "channels last":
        image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    elif layout == "a part of a larger image":
        image = image[:, 3:30, 5::2]
    preprocess = Preprocess(min_size=64, max_size=96)
    batch = preprocess([image, torch.rand(3, 20, 20)], resize=resize)
    expected = preprocess([image.float() / 255], resize=resize)
    height, width = expected.sizes[0]
    assert torch.equal(batch.tensor[0, :, :height, :width], expected.tensor[0, :, :height, :width])


def test_no_images_are_an_error() -> None:
    with pytest.raises(ValueError, match="images is empty; pass at least one"):
        Preprocess()([])


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("round_pixels", [False, True])
def test_images_may_have_any_number_of_channels(channels: int, round_pixels: bool) -> None:
    mean = tuple(0.1 * index for index in range(channels))
    preprocess = Preprocess(
        min_size=8,
        max_size=16,
        size_divisor=4,
        mean=mean,
        std=(0.5,) * channels,
        antialias=True,
        round_pixels=round_pixels,
    )
    batch = preprocess([torch.full((channels, 16, 16), 0.6), torch.rand(channels, 10, 20)])
    assert batch.tensor.shape == (2, channels, 8, 16)
    expected = torch.tensor([(0.6 - value) / 0.5 for value in mean])
    assert_close(batch.tensor[0, :, 3, 3], expected, rtol=0, atol=1e-5)
    assert preprocess.in_channels == channels
    with pytest.raises(ValueError, match=rf"images\[0\].*\[{channels}, H, W\], got \[3, 8, 8\]"):
        preprocess([torch.rand(3, 8, 8)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_size": 0}, "min_size must be at least 1, got 0"),
        ({"max_size": 0}, "max_size must be at least 1, got 0"),
        ({"std": (1, 0, 1)}, r"std\[1\] must be greater than 0, got 0"),
        ({"mean": (1,)}, "mean and std must have one value per channel, but have 1 and 3"),
        ({"mean": (), "std": ()}, "but have 0 and 0"),
        ({"size_divisor": 0}, "size_divisor must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocess(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"antialias": True},
        {"min_size": 13},
        {"resize_by": "factor"},
        {"keep_ratio": False, "always_pad": True},
        {"mean": (0.5,), "std": (0.3,)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_batch_of_levels_becomes_exactly_the_batch(options: Any, dtype: torch.dtype) -> None:
    preprocess = Preprocess(**{"min_size": 30, "max_size": 70, "round_pixels": True, **options})
    for size in ((30, 47), (57, 31), (26, 26), (21, 90)):
        image = torch.rand(preprocess.in_channels, *size)
        if dtype == torch.uint8:
            image = (image * 255).byte()
        expected = preprocess([image])
        levels = preprocess.to_levels(image)
        assert levels is not None
        assert levels.tensor.dtype == torch.uint8
        levels.tensor[:, :, levels.sizes[0][0] :] = 7  # padding has no meaning
        several = levels._replace(tensor=levels.tensor.repeat(2, 1, 1, 1), sizes=levels.sizes * 2)
        assert_close(preprocess.from_levels(levels), expected, rtol=0, atol=0)
        found = preprocess.from_levels(several).tensor
        assert_close(found, expected.tensor.repeat(2, 1, 1, 1), rtol=0, atol=0)


def test_there_are_no_levels_where_bytes_would_not_give_the_same_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Own(Preprocess):
        pass

    image = torch.rand(3, 20, 20)
    preprocess = Preprocess(min_size=32, round_pixels=True)
    assert preprocess.to_levels(image) is not None
    assert Preprocess(min_size=32).to_levels(image) is None
    assert Own(min_size=32, round_pixels=True).to_levels(image) is None
    assert preprocess.to_levels(image.double()) is None
    assert preprocess.to_levels(image.half()) is None
    hook = preprocess.register_forward_hook(lambda *_: None)
    assert preprocess.to_levels(image) is None
    hook.remove()
    hook = preprocess.register_forward_pre_hook(lambda *_: None)
    assert preprocess.to_levels(image) is None
    hook.remove()
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    assert preprocess.to_levels((image * 255).byte()) is None
    with pytest.raises(ValueError, match=r"image must have shape \[3, H, W\], got \[20, 20\]"):
        preprocess.to_levels(image[0])
