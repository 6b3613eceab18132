"""Boxes that were drawn before or after photos were turned by their EXIF orientation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from focaldet.datasets import DetectionDataset, read_annotations, read_splits
from focaldet.errors import AnnotationError
from focaldet.images import load_image, read_orientation
from tests.helpers.annotation_files import write_photo, write_text

if TYPE_CHECKING:
    from pathlib import Path

SIZE = (40, 20)
"""Width and height of the stored pixels."""

BOX = (1, 2, 11, 8)
"""The box on the stored pixels."""


def exif(orientation: int) -> Image.Exif:
    """Build EXIF data with an orientation."""
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def write_stored(path: Path, orientation: int, size: tuple[int, int] = SIZE) -> Path:
    """Write a black photo that is white inside BOX of the stored pixels."""
    image = Image.new("RGB", size)
    image.paste("white", BOX)
    image.save(path, exif=exif(orientation))
    return path


def write_coco(path: Path, sizes: dict[str, tuple[int, int] | None]) -> Path:
    """Write a COCO file with BOX in images of these annotated ``(width, height)``."""
    images: list[dict[str, Any]] = []
    for number, (name, size) in enumerate(sizes.items(), start=1):
        sides = {} if size is None else {"width": size[0], "height": size[1]}
        images.append({"id": number, "file_name": name, **sides})
    x1, y1, x2, y2 = BOX
    boxes = [
        {
            "id": one["id"],
            "image_id": one["id"],
            "category_id": 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
        }
        for one in images
    ]
    categories = [{"id": 1, "name": "cat"}]
    content = {"images": images, "annotations": boxes, "categories": categories}
    return write_text(path, json.dumps(content))


def white(path: Path) -> list[int]:
    """Return the box of the white pixels in the upright image."""
    ys, xs = np.nonzero(load_image(path)[0].numpy())
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("annotated", [True, False])
def test_boxes_on_stored_pixels_are_turned_with_the_image(
    tmp_path: Path, orientation: int, *, annotated: bool
) -> None:
    photo = write_stored(tmp_path / "a.png", orientation)
    assert read_orientation(photo) == orientation
    path = write_coco(tmp_path / "c.json", {"a.png": SIZE if annotated else None})
    table = read_annotations(path, exif="stored")
    _, target = DetectionDataset(table, invalid_boxes="raise")[0]
    assert target["boxes"].tolist() == [white(photo)]
    assert read_splits(path, exif="stored")["all"].boxes.tolist() == table.boxes.tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_fractions_of_the_stored_size_are_turned_with_the_image(
    tmp_path: Path, orientation: int
) -> None:
    photo = write_stored(tmp_path / "a.png", orientation)
    write_text(tmp_path / "a.txt", "0 0.15 0.25 0.25 0.3\n")
    path = write_text(tmp_path / "data.yaml", "train: .\nnames: [cat]\n")
    table = read_annotations(path, split="train", exif="stored")
    np.testing.assert_allclose(table.boxes, [white(photo)])
    DetectionDataset(table, invalid_boxes="raise")[0]


@pytest.mark.parametrize("name", ["upright", "stored"])
def test_auto_takes_the_pixels_that_have_the_annotated_size(tmp_path: Path, name: str) -> None:
    photo = write_stored(tmp_path / "a.png", 6)
    write_stored(tmp_path / "b.png", 1)
    size = SIZE if name == "stored" else SIZE[::-1]
    path = write_coco(tmp_path / "c.json", {"a.png": size, "b.png": SIZE})
    table = read_annotations(path, exif="auto")
    turned = white(photo) if name == "stored" else list(BOX)
    assert table.boxes.tolist() == [turned, list(BOX)]
    assert table.image_sizes.tolist() == [[40, 20], [20, 40]]


def test_auto_takes_square_and_upside_down_photos_like_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    square = write_stored(tmp_path / "square.png", 6, (40, 40))
    down = write_stored(tmp_path / "down.png", 3)
    write_stored(tmp_path / "a.png", 6)
    sizes: dict[str, tuple[int, int] | None] = {"square.png": (40, 40), "down.png": SIZE}
    path = write_coco(tmp_path / "c.json", {**sizes, "a.png": SIZE})
    table = read_annotations(path, exif="auto")
    assert table.boxes[:2].tolist() == [white(square), white(down)]
    assert any("2 photos have the same size before and after" in one for one in caplog.messages)
    upright = write_coco(tmp_path / "c.json", {**sizes, "a.png": SIZE[::-1]})
    assert read_annotations(upright, exif="auto").boxes.tolist() == [list(BOX)] * 3


def test_auto_that_cannot_tell_is_an_error(tmp_path: Path) -> None:
    write_stored(tmp_path / "square.png", 6, (40, 40))
    write_stored(tmp_path / "a.png", 6)
    write_stored(tmp_path / "b.png", 8)
    square: dict[str, tuple[int, int] | None] = {"square.png": (40, 40)}
    with pytest.raises(AnnotationError, match="1 of the 1 photos .* do not help.*square.png"):
        read_annotations(write_coco(tmp_path / "c.json", square), exif="auto")
    mixed = {**square, "a.png": SIZE, "b.png": SIZE[::-1]}
    with pytest.raises(AnnotationError, match="1 of the 3 photos .* disagree.*exif='stored'"):
        read_annotations(write_coco(tmp_path / "c.json", mixed), exif="auto")
    with pytest.raises(AnnotationError, match="no annotated size"):
        read_annotations(write_coco(tmp_path / "c.json", {"a.png": None}), exif="auto")


def test_auto_cannot_tell_for_fractions(tmp_path: Path) -> None:
    write_photo(tmp_path / "a.png")
    write_text(tmp_path / "a.txt", "0 0.5 0.5 1 1\n")
    path = write_text(tmp_path / "data.yaml", "train: .\nnames: [cat]\n")
    assert read_annotations(path, split="train", exif="auto").boxes.tolist() == [[0, 0, 40, 20]]
    write_stored(tmp_path / "a.png", 6)
    with pytest.raises(AnnotationError, match="annotations contain no image size"):
        read_annotations(path, split="train", exif="auto")


def test_stored_that_cannot_be_right_is_an_error(tmp_path: Path) -> None:
    write_stored(tmp_path / "a.png", 6)
    path = write_coco(tmp_path / "c.json", {"a.png": SIZE[::-1]})
    with pytest.raises(AnnotationError, match=r"exif='stored' does not fit .*a.png .* 20x40"):
        read_annotations(path, exif="stored")


def test_the_error_of_a_turned_photo_names_the_option(tmp_path: Path) -> None:
    write_stored(tmp_path / "a.png", 6)
    table = read_annotations(write_coco(tmp_path / "c.json", {"a.png": SIZE}))
    with pytest.raises(AnnotationError, match="annotated as 40x20.*exif='stored'.*exif='auto'"):
        DetectionDataset(table)[0]


def test_missing_and_damaged_photos_are_reported(tmp_path: Path) -> None:
    write_text(tmp_path / "a.png", "no image")
    path = write_coco(tmp_path / "c.json", {"a.png": SIZE, "gone.png": SIZE})
    problems: list[Exception] = []
    table = read_annotations(path, exif="stored", report=problems.append)
    assert len(table.boxes) == 2
    assert ["a.png" in str(problems[0]), "gone.png" in str(problems[1])] == [True, True]
    with pytest.raises(ValueError, match=r"a\.png"):
        read_annotations(path, exif="stored")
    (tmp_path / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"a\.png"):
        read_annotations(path, exif="stored")


def test_unknown_choices_are_named(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "c.json", {"a.png": SIZE})
    wrong: Any = "left"
    for read in (read_annotations, read_splits):
        with pytest.raises(ValueError, match="exif.*'upright', 'stored'"):
            read(path, exif=wrong)
