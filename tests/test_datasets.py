from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from focaldet import RetinaNet, RetinaNetConfig
from focaldet.datasets import (
    AspectRatioBatchSampler,
    DetectionDataset,
    collate,
    read_coco,
    read_voc,
    seed_worker,
    train_transform,
)
from focaldet.errors import AnnotationError, UnreadableImageError
from focaldet.structures import check_targets
from tests.helpers.annotation_tables import table_with_photos
from tests.helpers.shared import SHARED

DATA = SHARED / "data"
real = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not available")

NAN, INF = float("nan"), float("inf")


def test_an_item_worked_by_hand(tmp_path: Path) -> None:
    dataset = DetectionDataset(table_with_photos(tmp_path, [[], [[1, 2, 3, 4.5], [0, 0, 30, 20]]]))
    assert (len(dataset), dataset.num_classes) == (2, 2)
    assert (dataset.class_names, dataset.category_ids) == (("cat", "dog"), (3, 9))
    assert dataset.image_ids.tolist() == [100, 101]
    assert dataset.sizes.tolist() == [[20, 30]] * 2
    assert dataset.aspect_ratios.tolist() == [20 / 30] * 2
    image, target = dataset[-1]
    assert (image.dtype, image.shape) == (torch.float32, (3, 20, 30))
    assert image[:, 0, [0, 29]].tolist() == [[1, torch.tensor(10 / 255).item()]] * 3
    assert_close(target["boxes"], torch.tensor([[1, 2, 3, 4.5], [0, 0, 30, 20]]), rtol=0, atol=0)
    assert target["labels"].tolist() == [0, 1]
    assert target["image_id"] == 101
    with pytest.raises(IndexError):
        dataset[2]


def test_images_without_objects_are_negatives(tmp_path: Path) -> None:
    _, target = DetectionDataset(table_with_photos(tmp_path, [[]]))[0]
    check_targets([target], [(20, 30)], 2)  # type: ignore[list-item]
    assert target["boxes"].shape == (0, 4)


def test_crowds_are_in_the_ground_truth_but_not_in_targets(tmp_path: Path) -> None:
    boxes: list[list[list[float]]] = [[[1, 1, 5, 5], [2, 2, 9, 9]]]
    table = table_with_photos(tmp_path, boxes, crowd=np.array([True, False]))
    dataset = DetectionDataset(table)
    assert dataset[0][1]["boxes"].tolist() == [[2, 2, 9, 9]]
    assert [one["iscrowd"] for one in dataset.table.to_coco()["annotations"]] == [1, 0]


def test_boxes_are_clipped_and_invalid_ones_dropped_with_one_warning(
    tmp_path: Path,
) -> None:
    wrong = [
        [5, 5, 5, 9],
        [NAN, 0, 1, 1],
        [0, 0, INF, 1],
        [-9, 0, -1, 5],
        [30, 0, 35, 5],
        [9, 9, 3, 3],
    ]
    table = table_with_photos(tmp_path, [[[-5, -5, 40, 25.5]], [[1, 1, 2, 2], *wrong]])  # type: ignore[list-item]
    message = (
        r"Dropped 6 of 8 boxes in '.*some.json', .* not finite or have no area .*"
        r"\[5.0, 5.0, 5.0, 9.0\] \(annotation 52 of 1.png, 30x20\)"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        dataset = DetectionDataset(table)
    assert len(caught) == 1
    assert Path(caught[0].filename) == Path(__file__)
    assert dataset[0][1]["boxes"].tolist() == [[0, 0, 30, 20]]
    assert dataset[1][1]["boxes"].tolist() == [[1, 1, 2, 2]]
    assert dataset[1][1]["labels"].tolist() == [1]
    assert len(dataset.table.boxes) == 8
    with pytest.raises(
        AnnotationError,
        match=r"6 of 8 boxes in '.*some.json'.*\(annotation 52 of .*invalid_boxes='drop'",
    ):
        DetectionDataset(table, invalid_boxes="raise")


def test_a_box_that_loses_its_area_in_float32_is_dropped(tmp_path: Path) -> None:
    table = table_with_photos(tmp_path, [[[25.0, 0, 25 + 1e-9, 9]]])
    with pytest.warns(UserWarning, match="Dropped 1 of 1"):
        assert len(DetectionDataset(table)[0][1]["boxes"]) == 0


def test_invalid_crowds_do_not_warn(tmp_path: Path) -> None:
    DetectionDataset(table_with_photos(tmp_path, [[[1.0, 1, 1, 1]]], crowd=np.array([True])))


@pytest.mark.parametrize("invalid_boxes", ["ignore", None])
def test_unknown_options_are_named(tmp_path: Path, invalid_boxes: Any) -> None:
    with pytest.raises(ValueError, match=f"invalid_boxes {invalid_boxes!r}.*'drop'.*'raise'"):
        DetectionDataset(table_with_photos(tmp_path, []), invalid_boxes=invalid_boxes)


def test_undeclared_categories_are_an_error(tmp_path: Path) -> None:
    table = table_with_photos(tmp_path, [[[1, 1, 2, 2], [1, 1, 3, 3]]], labels=np.array([0, -1]))
    message = r"Annotation 51 of 0.png in '.*some.json' .*undeclared category.* 1\)\. .*cat, dog\."
    with pytest.raises(AnnotationError, match=message):
        DetectionDataset(table)


def test_sizes_that_are_not_annotated_are_read_from_the_images(tmp_path: Path) -> None:
    table = table_with_photos(tmp_path, [[], [[1, 1, 99, 99]]], sizes=(0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "1.png", exif=exif)
    dataset = DetectionDataset(table)
    assert dataset.sizes.tolist() == [[20, 30], [30, 20]]
    image, target = dataset[1]
    assert image.shape == (3, 30, 20)  # upright
    assert target["boxes"].tolist() == [[1, 1, 20, 30]]
    (tmp_path / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"'.*0\.png' \(image\)"):
        DetectionDataset(table)


def test_images_whose_size_differs_from_the_annotation_are_named(tmp_path: Path) -> None:
    dataset = DetectionDataset(table_with_photos(tmp_path, [[]], sizes=(20, 31)))
    message = "image 100 is annotated as 31x20, but '.*0.png' is 30x20. The boxes would not fit"
    with pytest.raises(AnnotationError, match=message):
        dataset[0]
    dataset = DetectionDataset(table_with_photos(tmp_path, [[]], sizes=(30, 20)))
    with pytest.raises(AnnotationError, match="annotated as 20x30.* is 30x20. .*EXIF"):
        dataset[0]


def test_images_that_are_missing_or_damaged_are_named_with_their_id(tmp_path: Path) -> None:
    dataset = DetectionDataset(table_with_photos(tmp_path, [[], []]))
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    with pytest.raises(FileNotFoundError, match=r"(?=.*0\.png)(?=.*image 100)(?=.*folder)"):
        dataset[0]
    with pytest.raises(UnreadableImageError, match=r"(?=.*1\.png)(?=.*image 101)"):
        dataset[1]
    with pytest.raises(FileNotFoundError, match="image 100"):
        list(DataLoader(dataset, num_workers=1, collate_fn=collate))


def test_items_do_not_share_memory_with_the_dataset(tmp_path: Path) -> None:
    dataset = DetectionDataset(table_with_photos(tmp_path, [[[1, 1, 2, 2]]]))
    dataset[0][1]["boxes"].zero_()
    dataset[0][1]["labels"].fill_(7)
    assert dataset[0][1]["boxes"].tolist() == [[1, 1, 2, 2]]
    assert dataset[0][1]["labels"].tolist() == [0]


def test_transforms_get_tv_tensors_and_items_are_plain_tensors(tmp_path: Path) -> None:
    seen = []

    def flipped(image: Any, target: dict[str, Any]) -> Any:
        seen.append((image, target["boxes"]))
        return v2.functional.horizontal_flip(image), {
            **target,
            "boxes": v2.functional.horizontal_flip(target["boxes"]),
        }

    dataset = DetectionDataset(table_with_photos(tmp_path, [[[1, 2, 6, 8]]]), flipped)
    image, target = dataset[0]
    assert isinstance(seen[0][0], tv_tensors.Image)
    assert seen[0][0].dtype == torch.uint8
    assert (seen[0][1].format.value, seen[0][1].canvas_size) == ("XYXY", (20, 30))
    assert {type(value) for value in (image, target["boxes"], target["labels"])} == {torch.Tensor}
    assert target["boxes"].tolist() == [[24, 2, 29, 8]]
    assert float(image[0, 0, 29]) == 1


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image: image, "transform must accept an image and its target"),
        (lambda image, _: image, "transform must return an image and its target, got Image"),
        (lambda image, target: (image, [target]), "the target as a dictionary, got list"),
        (v2.ToPILImage(), "the image as a tensor, got Image.*ToImage"),
        (lambda *_: None, "got NoneType"),
    ],
)
def test_a_transform_that_gives_something_else_is_named(
    transform: Any, message: str, tmp_path: Path
) -> None:
    table = table_with_photos(tmp_path, [[[1, 2, 3, 4]]])
    with pytest.raises(TypeError, match=message):
        DetectionDataset(table, transform)[0]


def test_a_transform_may_return_floats(tmp_path: Path) -> None:
    transform = v2.ToDtype(torch.float32, scale=True)
    table = table_with_photos(tmp_path, [[[1, 2, 6, 8]]])
    assert_close(DetectionDataset(table, transform)[0][0], DetectionDataset(table)[0][0])


@real
def test_the_two_boxes_without_area_in_bccd_are_dropped_with_one_warning() -> None:
    table = read_voc(DATA / "bccd" / "voc", "trainval")
    with pytest.warns(UserWarning, match="Dropped 2 of 3943 boxes") as caught:
        dataset = DetectionDataset(table)
    assert len(caught) == 1
    image, target = dataset[0]
    assert (image.shape, len(target["boxes"])) == ((3, 480, 640), 20)


@real
def test_workers_give_the_same_batches_in_every_run_and_start_method() -> None:
    table = read_coco(DATA / "coco_sample" / "annotations" / "instances_val2017.json", cache=False)
    dataset = DetectionDataset(table, train_transform(min_sizes=[40, 60], max_size=100, color=True))
    assert len(pickle.dumps(dataset)) < 100_000

    def epoch(seed: int, context: str) -> list[Any]:
        loader = DataLoader(
            dataset,
            batch_sampler=AspectRatioBatchSampler(dataset.aspect_ratios[:6], 4),
            num_workers=1,
            collate_fn=collate,
            worker_init_fn=seed_worker,
            generator=torch.Generator().manual_seed(seed),
            multiprocessing_context=context,
        )
        return [image for images, _ in loader for image in images]

    first = epoch(1, "fork")
    assert_close(epoch(1, "spawn"), first, rtol=0, atol=0)
    others = zip(epoch(2, "fork"), first, strict=True)
    assert any(a.shape != b.shape or bool((a != b).any()) for a, b in others)


@real
def test_a_model_computes_losses_for_items(tiny_config: RetinaNetConfig) -> None:
    path = DATA / "bccd" / "coco" / "test.json"
    table = read_coco(path, DATA / "bccd" / "voc" / "JPEGImages", cache=False)
    dataset = DetectionDataset(table, train_transform(min_sizes=[64], max_size=96))
    model = RetinaNet.from_config(tiny_config.replace(num_classes=dataset.num_classes))
    losses = model(*collate([dataset[0], dataset[1]])).losses
    assert losses is not None
    assert all(bool(loss.isfinite()) for loss in losses.values())


def test_torchvision_is_imported_only_for_transforms() -> None:
    code = (
        "import sys, focaldet.datasets as datasets; "
        "import focaldet.datasets.checks; "
        "assert 'torchvision' not in sys.modules; "
        "assert 'train_transform' in dir(datasets); "
        "datasets.train_transform(); assert 'torchvision' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    import focaldet.datasets

    with pytest.raises(AttributeError, match="'focaldet.datasets' has no attribute 'nothing'"):
        focaldet.datasets.nothing  # noqa: B018
