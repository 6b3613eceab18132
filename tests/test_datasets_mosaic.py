"""Mosaics: boxes follow their pixels, nothing is padded, and runs can be repeated."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.testing import assert_close

from focaldet import RetinaNetConfig
from focaldet.datasets import DetectionDataset, train_transform
from focaldet.datasets._mosaic import Tile, assemble, draw_tiles
from focaldet.structures import check_targets
from focaldet.training import DetectionDataModule
from focaldet.training._data_module import _Key, _Sample, _Seeded
from tests.helpers.annotation_tables import table_with_photos

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet.datasets import AnnotationTable

COLOURS = ((255, 0, 0), (0, 255, 0))  # of the labels 0 and 1


def photos(folder: Path, sizes: list[tuple[int, int]], boxes: list[Any]) -> AnnotationTable:
    """Write grey photos of these ``(height, width)`` whose boxes are filled with the label's colour."""
    table = table_with_photos(folder, boxes, image_sizes=np.array(sizes, np.int32))
    for index, (height, width) in enumerate(sizes):
        picture = Image.new("RGB", (width, height), (100, 100, 100))
        draw = ImageDraw.Draw(picture)
        span = table.boxes_of(index)
        for (x1, y1, x2, y2), label in zip(table.boxes[span], table.labels[span], strict=True):
            draw.rectangle((x1, y1, x2 - 1, y2 - 1), fill=COLOURS[label])
        picture.save(folder / f"{index}.png")
    return table


def is_colour(image: Tensor, label: int) -> Tensor:
    wanted = torch.tensor(COLOURS[label], dtype=torch.int64).view(3, 1, 1)
    return (image.long() - wanted).abs().amax(0) <= 2


@pytest.mark.parametrize("flip", [0.0, 0.5])
def test_boxes_follow_the_pixels_into_a_mosaic(tmp_path: Path, flip: float) -> None:
    sizes = [(61, 93), (87, 55), (40, 40), (93, 61)]
    boxes = [
        [[5, 7, 35, 40], [50, 20, 90, 55]],
        [[3, 4, 30, 50], [33, 60, 53, 85]],
        [],
        [[10, 10, 50, 40], [2, 60, 40, 90]],
    ]
    transform = train_transform(
        min_sizes=[48, 60], max_size=90, mosaic=1.0, horizontal_flip=flip, vertical_flip=flip
    )
    dataset = DetectionDataset(photos(tmp_path, sizes, boxes), transform)
    seen = coloured = left = 0
    for seed in range(40):
        torch.manual_seed(seed)
        image, target = dataset.read(seed % 4)
        assert image.dtype == torch.uint8
        check_targets([target], [(image.shape[1], image.shape[2])], 2)  # type: ignore[list-item]
        assert target["image_id"] == dataset.image_ids[seed % 4]
        inside = torch.zeros(2, *image.shape[1:], dtype=torch.bool)
        for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
            x1, y1, x2, y2 = box
            core = is_colour(image, label)[
                round(y1) + 2 : round(y2) - 2, round(x1) + 2 : round(x2) - 2
            ]
            assert bool(core.all()), (seed, box)
            rows = slice(max(0, round(y1) - 1), round(y2) + 1)
            inside[label, rows, max(0, round(x1) - 1) : round(x2) + 1] = True
            seen += core.numel() > 0
        found = torch.stack([is_colour(image, label) for label in (0, 1)])
        coloured += int(found.sum())
        left += int((found & ~inside).sum())
    assert seen > 60
    assert left < 0.02 * coloured  # of boxes that were removed, because little of them was left


def test_a_box_follows_its_tile_exactly() -> None:
    """The right half of an image 40 wide fills a place 30 wide and 20 high, at 1.5 times the size."""
    image = torch.zeros(3, 20, 40)
    target = {
        "boxes": torch.tensor([[22.0, 2, 30, 10], [10, 2, 30, 10]]),
        "labels": torch.tensor([1, 0]),
        "image_id": 7,
    }
    whole = (0, 0, 20, 40)
    tile = Tile(source=(0, 20, 14, 20), place=(5, 10, 21, 30))
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    samples: list[tuple[Tensor, dict[str, Any]]] = [(image, target), (image, empty)]
    _, found = assemble(samples, (40, 60), [tile, Tile(whole, (30, 0, 10, 20))], antialias=False)
    assert_close(found["boxes"], torch.tensor([[13.0, 8, 25, 20], [10, 8, 25, 20]]))
    assert found["labels"].tolist() == [1, 0]
    assert found["image_id"] == 7


@pytest.mark.parametrize(
    ("box", "is_kept"),
    [
        ([0.0, 0, 22.2, 10], False),  # 2.2 of 22.2 columns are in the part, which begins at 20
        ([0.0, 0, 22.3, 10], True),
        ([0.0, 0, 40, 10], True),
        ([19.5, 0, 20.6, 10], False),  # more than a tenth is left, but less than a pixel
        ([30.0, 3, 31, 3.9], False),
    ],
)
def test_a_box_needs_a_tenth_of_its_area_and_a_pixel(box: list[float], *, is_kept: bool) -> None:
    target = {"boxes": torch.tensor([box]), "labels": torch.tensor([0])}
    tile = Tile(source=(0, 20, 20, 20), place=(0, 0, 20, 20))
    _, found = assemble([(torch.zeros(1, 20, 40), target)], (20, 20), [tile], antialias=False)
    assert len(found["boxes"]) == is_kept
    assert found["labels"].dtype == torch.int64


@pytest.mark.parametrize("channels", [1, 4])
def test_an_image_may_have_any_number_of_channels(channels: int) -> None:
    images = [torch.full((channels, 9, 13), 10 * i, dtype=torch.uint8) for i in range(4)]
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    sizes = [(9, 13)] * 4
    tiles = draw_tiles((18, 26), sizes, [(18, 26)] * 4)
    mosaic, target = assemble([(image, empty) for image in images], (18, 26), tiles, antialias=True)
    assert mosaic.shape == (channels, 18, 26)
    for value, (_, (y, x, height, width)) in zip((0, 10, 20, 30), tiles, strict=True):
        assert (mosaic[:, y : y + height, x : x + width] == value).all()
    assert target["boxes"].shape == (0, 4)


def test_images_fill_their_rectangles_and_are_not_larger_than_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    scales = []
    for seed in range(200):
        torch.manual_seed(seed)
        sizes = [tuple(torch.randint(1, 300, (2,), generator=generator).tolist()) for _ in range(4)]
        canvas = (97, 131)
        alone = [(97, 131)] * 4  # as with keep_ratio=False
        tiles = draw_tiles(canvas, sizes, alone)
        assert sum(height * width for _, (_, _, height, width) in tiles) == 97 * 131
        for (source, place), size in zip(tiles, sizes, strict=True):
            assert min(place[2] / 97, place[3] / 131) > 0.24
            assert 0 <= source[0] <= source[0] + source[2] <= size[0]
            assert 0 <= source[1] <= source[1] + source[3] <= size[1]
            if min(size) > 50:  # smaller ones cannot be cut to the pixel
                scale = place[2] / source[2] * size[0] / 97
                assert scale <= 1.1
                scales.append(scale)
    assert min(scales) < 0.5
    assert max(scales) > 0.9


def test_a_mosaic_has_the_size_that_the_image_has_alone(tmp_path: Path) -> None:
    sizes = [(30, 61), (61, 30)]
    table = photos(tmp_path, sizes, [[[0, 0, 20, 20]], [[0, 0, 20, 20]]])
    config = RetinaNetConfig(num_classes=2, min_size=50, max_size=90)
    for options in (
        {"config": config, "min_scale": 1.0},
        {"config": config.replace(keep_ratio=False), "min_scale": 1.0},
        {"large_scale_jitter": 64},
    ):
        alone = DetectionDataset(table, train_transform(**options))
        together = DetectionDataset(table, train_transform(**options, mosaic=1.0))
        for index in range(2):
            assert together[index][0].shape == alone[index][0].shape
    with_sizes = train_transform(min_sizes=[20, 40], max_size=400, mosaic=1.0)
    found = {DetectionDataset(table, with_sizes)[0][0].shape[1] for _ in range(20)}
    assert found == {20, 40}


def test_nothing_is_padded(tmp_path: Path) -> None:
    table = photos(tmp_path, [(33, 50), (50, 33), (7, 90)], [[], [], []])
    for index, (height, width) in enumerate(table.image_sizes.tolist()):
        Image.new("L", (width, height), 255).save(tmp_path / f"{index}.png")  # greyscale
    dataset = DetectionDataset(table, train_transform(min_sizes=[32], max_size=64, mosaic=1.0))
    for index in range(3):
        image, target = dataset[index]
        assert float(image.min()) == 1
        assert target["boxes"].shape == (0, 4)
        assert target["labels"].dtype == torch.int64


def test_a_dataset_of_one_image_has_mosaics_of_it(tmp_path: Path) -> None:
    table = photos(tmp_path, [(40, 60)], [[[5, 5, 55, 35]]])
    dataset = DetectionDataset(table, train_transform(min_sizes=[40], max_size=60, mosaic=1.0))
    counts = {len(dataset[0][1]["boxes"]) for _ in range(10)}
    assert max(counts) == 4


def test_an_image_of_one_row_is_possible(tmp_path: Path) -> None:
    table = photos(tmp_path, [(1, 30), (1, 30)], [[], []])
    dataset = DetectionDataset(table, train_transform(min_sizes=[1], max_size=30, mosaic=1.0))
    assert dataset[0][0].shape == (3, 1, 30)


def test_the_probability_is_that_of_a_mosaic() -> None:
    transform = train_transform(mosaic=0.3)
    torch.manual_seed(0)
    drawn = [transform.draw_others(50) for _ in range(2000)]
    assert sum(map(bool, drawn)) / 2000 == pytest.approx(0.3, abs=0.04)
    others = [other for each in drawn for other in each]
    assert (min(others), max(others)) == (0, 49)
    assert type(train_transform()).__name__ == "Compose"
    with pytest.raises(ValueError, match=r"mosaic must be in \[0, 1\], got 1\.5"):
        train_transform(mosaic=1.5)


def test_a_mosaic_cannot_be_made_without_a_dataset() -> None:
    transform = train_transform(mosaic=0.5)
    with pytest.raises(TypeError, match=r"MosaicTransform needs.*of a DetectionDataset"):
        transform(torch.zeros(3, 8, 8, dtype=torch.uint8), {})


def test_images_that_do_not_become_mosaics_are_transformed_as_without(tmp_path: Path) -> None:
    table = photos(tmp_path, [(40, 60)] * 2, [[[5, 5, 30, 35]]] * 2)
    rarely = DetectionDataset(table, train_transform(min_sizes=[30], max_size=60, mosaic=1e-9))
    never = DetectionDataset(table, train_transform(min_sizes=[30], max_size=60))
    torch.manual_seed(0)
    image, target = rarely[0]
    torch.manual_seed(0)
    torch.rand(())  # whether it becomes a mosaic
    expected, expected_target = never[0]
    assert torch.equal(image, expected)
    assert torch.equal(target["boxes"], expected_target["boxes"])


def test_a_transform_can_be_sent_to_a_worker() -> None:
    transform = train_transform(mosaic=0.5, vertical_flip=0.5)
    assert repr(pickle.loads(pickle.dumps(transform))) == repr(transform)  # noqa: S301


def test_mosaics_depend_only_on_the_seed_the_epoch_and_the_image(tmp_path: Path) -> None:
    table = photos(tmp_path, [(40, 60)] * 4, [[[5, 5, 30, 35], [32, 2, 58, 30]]] * 4)
    transform = train_transform(min_sizes=[40], max_size=60, mosaic=1.0, color=True)
    items = _Seeded(DetectionDataset(table, transform), seed=3)

    def read(key: _Key) -> _Sample:
        sample = items[key]
        assert isinstance(sample, _Sample)
        return sample

    first = read(_Key(0, 1))
    torch.manual_seed(99)
    again = read(_Key(0, 1))
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.target["boxes"], again.target["boxes"])
    for other in (_Key(1, 1), _Key(0, 2), _Key(0, 1, 1)):
        assert not torch.equal(read(other).image, first.image)


def test_an_unreadable_image_is_skipped_in_the_mosaics_of_others(tmp_path: Path) -> None:
    table = photos(tmp_path, [(40, 60)] * 6, [[[5, 5, 30, 35]]] * 6)
    (tmp_path / "4.png").unlink()
    data = DetectionDataset(table, train_transform(min_sizes=[40], max_size=60, mosaic=1.0))
    strict = _Seeded(data, seed=0)
    samples = [strict[_Key(epoch, 1)] for epoch in range(12)]
    messages = [sample.message for sample in samples if not isinstance(sample, _Sample)]
    assert 0 < len(messages) < 12
    assert all("4.png" in message and "image 101" not in message for message in messages)
    module = DetectionDataModule(data, batch_size=3, workers=0, on_error="skip")
    batches = list(module.train_dataloader())
    assert [len(images) for images, _ in batches] == [3, 3]
    assert module.num_skipped == 1
