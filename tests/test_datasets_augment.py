from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision import tv_tensors
from torchvision.transforms import v2

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.datasets import DetectionDataset, collate, train_transform
from focaldet.images import to_float
from focaldet.structures import check_targets
from tests.helpers.annotation_tables import table_with_photos

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "options",
    [
        {"min_sizes": [24, 32], "max_size": 40},
        {"min_sizes": [8], "max_size": 8, "color": True},
        {"large_scale_jitter": 32, "scale_range": (0.3, 3.0)},
        {"min_sizes": range(20, 30, 3), "antialias": True, "horizontal_flip": 0},
        {"min_sizes": [24, 32], "keep_ratio": False},
    ],
)
def test_training_transforms_return_valid_images_and_targets(tmp_path: Path, options: Any) -> None:
    boxes: list[list[list[float]]] = [
        [[0, 0, 30, 20], [29.7, 19.7, 30, 20], [3, 4, 9, 9]],
        [],
    ]
    dataset = DetectionDataset(table_with_photos(tmp_path, boxes), train_transform(**options))
    sizes = set()
    for _ in range(20):
        images, targets = collate([dataset[0], dataset[1]])
        check_targets(targets, [image.shape[1:] for image in images], 2)  # type: ignore[arg-type,misc]
        assert min(float(image.min()) for image in images) >= 0
        assert max(float(image.max()) for image in images) <= 1
        assert targets[1]["boxes"].shape == (0, 4)
        sizes.add(tuple(images[0].shape[1:]))
    if "large_scale_jitter" in options:
        assert sizes == {(32, 32)}
    elif len(options["min_sizes"]) > 1:
        assert len(sizes) > 1


@pytest.mark.parametrize(
    "options",
    [
        {"min_sizes": [24, 32], "max_size": 40},
        {"min_sizes": [24, 32], "max_size": 48, "antialias": True, "color": True},
        {"large_scale_jitter": 32, "scale_range": (0.3, 3.0)},
        {"min_sizes": [24, 32], "keep_ratio": False},
    ],
)
def test_items_are_bitwise_those_of_the_steps_of_torchvision(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    boxes: list[list[list[float]]] = [[[0, 0, 30, 20], [29.7, 19.7, 30, 20], [3, 4, 9, 9]]]
    table = table_with_photos(tmp_path, boxes)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    transform = train_transform(**options)
    dataset = DetectionDataset(table, transform)
    plain = v2.Compose(
        [*transform.transforms[:-1], v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
    )
    for seed in range(10):
        torch.manual_seed(seed)
        image, target = dataset[0]
        torch.manual_seed(seed)
        photo = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
        canvas = tv_tensors.BoundingBoxes(boxes[0], format="XYXY", canvas_size=(20, 30))
        labels = torch.tensor([0, 1, 0])
        expected, expected_target = plain(photo, {"boxes": canvas, "labels": labels})
        assert torch.equal(image, expected.float() / 255)
        assert image.is_contiguous()
        assert torch.equal(target["boxes"], expected_target["boxes"])
        assert torch.equal(target["labels"], expected_target["labels"])


def test_every_level_becomes_the_same_number_as_in_torch() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(4, 32, 2).permute(2, 0, 1)
    assert torch.equal(to_float(levels), levels.float() / 255)
    assert to_float(levels).is_contiguous()
    assert torch.equal(to_float(levels.int()), levels.float() / 255)
    halves = torch.rand(2, 3, 4).half()
    assert to_float(halves) is halves


def test_the_training_transform_takes_other_structures_like_torchvision() -> None:
    photo = tv_tensors.Image(torch.zeros(3, 20, 30, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes(
        [[-5, 2, 9, 9], [3, 3, 3, 9]], format="XYXY", canvas_size=(20, 30)
    )
    masks = tv_tensors.Mask(torch.ones(2, 20, 30))
    target = {"boxes": boxes, "labels": torch.tensor([4, 5]), "masks": masks}
    transform = train_transform(min_sizes=[20], max_size=30, horizontal_flip=0)
    for sample in ((photo, target), ({"image": photo, **target},)):
        result = transform(*sample)
        found = result[1] if isinstance(result, tuple) else result
        assert found["boxes"].tolist() == [[0, 2, 9, 9]]
        assert found["labels"].tolist() == [4]
        assert found["masks"].shape == (1, 20, 30)


def test_boxes_follow_the_pixels_through_the_training_transform(tmp_path: Path) -> None:
    table = table_with_photos(tmp_path, [[[0, 0, 10, 20]]])  # the white third
    transform = train_transform(min_sizes=[60], max_size=90)
    for _ in range(8):
        image, target = DetectionDataset(table, transform)[0]
        x1, y1, x2, y2 = map(round, target["boxes"][0].tolist())
        assert image.shape == (3, 60, 90)
        assert float(image[:, y1:y2, x1 + 2 : x2 - 2].min()) > 0.99
        assert float(image.mean()) == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("keep_ratio", [True, False])
def test_the_transform_resizes_like_the_model(
    tmp_path: Path, tiny_config: RetinaNetConfig, *, keep_ratio: bool
) -> None:
    config = tiny_config.replace(min_size=48, max_size=64, keep_ratio=keep_ratio)
    transform = train_transform(
        min_sizes=[48], max_size=64, keep_ratio=keep_ratio, horizontal_flip=0
    )
    table = table_with_photos(tmp_path, [[]])
    preprocess = RetinaNet.from_config(config).preprocess
    once = preprocess([DetectionDataset(table, transform)[0][0]], resize=False)
    by_model = preprocess([DetectionDataset(table)[0][0]])
    assert once.sizes == by_model.sizes
    assert_close(once.tensor, by_model.tensor, rtol=0, atol=0.011)  # half a level of 255


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_sizes": []}, r"min_sizes.*max_size=1333, got \[\]"),
        ({"min_sizes": [0], "keep_ratio": False}, r"min_sizes.*from 1, got \[0\]"),
        ({"min_sizes": [800], "max_size": 700}, r"min_sizes.*max_size=700, got \[800\]"),
        ({"horizontal_flip": 2}, "horizontal_flip.*2"),
        ({"large_scale_jitter": 0}, "large_scale_jitter.*0"),
        ({"large_scale_jitter": 9, "scale_range": (2, 1)}, r"scale_range.*\(2, 1\)"),
    ],
)
def test_wrong_transform_options_are_named(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_transform(**options)


def test_the_sizes_of_a_config_are_those_of_the_model(tiny_config: RetinaNetConfig) -> None:
    config = tiny_config.replace(min_size=200, max_size=300, antialias=True)
    resize = train_transform(config, min_scale=0.5, horizontal_flip=0).transforms[0]
    assert (resize.min_size, resize.max_size) == ([100, 120, 140, 160, 180, 200], 300)
    assert resize.antialias is True
    resize = train_transform(config.replace(min_size=800, max_size=1333)).transforms[1]
    assert resize.min_size == list(range(640, 801, 32))  # as without a config
    [resize, *_] = train_transform(
        config.replace(keep_ratio=False), min_scale=1.0, horizontal_flip=0
    ).transforms
    assert [step.size for step in resize.transforms] == [[200, 200]]


def test_a_config_whose_long_side_is_the_shorter_one_is_followed(
    tmp_path: Path, tiny_config: RetinaNetConfig
) -> None:
    transform = train_transform(tiny_config.replace(min_size=90, max_size=60), min_scale=1.0)
    dataset = DetectionDataset(table_with_photos(tmp_path, [[[0, 0, 10, 20]]]), transform)
    assert dataset[0][0].shape == (3, 40, 60)


def test_images_are_mirrored_top_to_bottom(tmp_path: Path) -> None:
    transform = train_transform(min_sizes=[20], max_size=30, horizontal_flip=0, vertical_flip=1.0)
    dataset = DetectionDataset(table_with_photos(tmp_path, [[[0, 0, 10, 5]]]), transform)
    assert dataset[0][1]["boxes"].tolist() == [[0, 15, 10, 20]]


def test_sizes_cannot_be_given_twice(tiny_config: RetinaNetConfig) -> None:
    with pytest.raises(TypeError, match="max_size and antialias were given together with config"):
        train_transform(tiny_config, max_size=600, antialias=True)
    with pytest.raises(TypeError, match=r"min_scale=0.5 is relative to .* so config is required"):
        train_transform(min_scale=0.5)
    with pytest.raises(ValueError, match="min_scale must be"):
        train_transform(tiny_config, min_scale=1.5)


def with_albumentations(steps: list[Any]) -> Any:
    """Return the function of docs/datasets.md with other steps."""
    albumentations: Any = pytest.importorskip("albumentations", minversion="2")
    limits = albumentations.BboxParams(
        "pascal_voc", label_fields=["labels"], clip=True, min_width=1, min_height=1
    )
    pipeline = albumentations.Compose(steps, bbox_params=limits)

    def augment(image: Any, target: dict[str, Any]) -> Any:
        pipeline.set_random_seed(int(torch.randint(2**31, ())))
        pixels, boxes = image.permute(1, 2, 0).numpy(), target["boxes"].numpy()
        result = pipeline(image=pixels, bboxes=boxes, labels=target["labels"].numpy())
        boxes = torch.as_tensor(result["bboxes"], dtype=torch.float32).reshape(-1, 4)
        labels = torch.as_tensor(result["labels"], dtype=torch.int64)
        image = torch.from_numpy(result["image"]).permute(2, 0, 1)
        return image, {**target, "boxes": boxes, "labels": labels}

    return augment


def test_boxes_follow_the_pixels_through_albumentations(tmp_path: Path) -> None:
    albumentations: Any = pytest.importorskip("albumentations", minversion="2")
    table = table_with_photos(tmp_path, [[[0, 0, 10, 20], [29.7, 1, 30, 5]], []])
    steps = [albumentations.HorizontalFlip(), albumentations.Resize(60, 90, interpolation=0)]
    dataset = DetectionDataset(table, with_albumentations(steps))
    sides = set()
    for seed in range(8):
        torch.manual_seed(seed)
        image, target = dataset[0]
        [[x1, y1, x2, y2]] = target["boxes"].tolist()  # the other box is 0.9 pixels wide
        assert target["labels"].tolist() == [0]
        expected = torch.zeros(3, 60, 90)
        expected[:, round(y1) : round(y2), round(x1) : round(x2)] = 1
        assert torch.equal(image, expected)
        sides.add(round(x1))
        torch.manual_seed(seed)
        again, same = dataset[0]
        assert torch.equal(again, image)
        assert torch.equal(same["boxes"], target["boxes"])
    assert sides == {0, 60}
    image, target = dataset[1]
    assert (image.shape, target["boxes"].shape, target["labels"].dtype) == (
        (3, 60, 90),
        (0, 4),
        torch.int64,
    )
    check_targets([target], [(60, 90)], 2)  # type: ignore[list-item]
