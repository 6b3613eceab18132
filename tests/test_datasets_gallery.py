"""The gallery of a dataset: which images it shows, and what is drawn on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from PIL import Image

from focaldet import Detections
from focaldet.datasets import draw_gallery, read_csv
from focaldet.visualization import class_color

if TYPE_CHECKING:
    from pathlib import Path

    from focaldet.datasets import AnnotationTable


@pytest.fixture
def table(tmp_path: Path) -> AnnotationTable:
    """Six grey images: cats in the first four, dogs in the first two, nothing in the last two."""
    rows = []
    for number in range(6):
        name = f"{number}.png"
        Image.new("RGB", (768, 576), (128, 128, 128)).save(tmp_path / name)
        rows += [f"{name},100,80,500,400,cat"] if number < 4 else []
        rows += [f"{name},20,20,60,60,dog"] if number < 2 else []
        rows += [f"{name},,,,,"] if number > 3 else []
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(rows) + "\n")
    return read_csv(path, class_names=("cat", "dog"))


def colors_of(path: Path) -> set[object]:
    """Return the colours of a picture below its legend."""
    with Image.open(path) as picture:
        shown = picture.convert("RGB").crop((0, 40, *picture.size))
    return {color for _, color in shown.getcolors(1 << 24) or ()}


def test_all_images_are_drawn_if_there_are_fewer_than_count(
    table: AnnotationTable, tmp_path: Path
) -> None:
    path = tmp_path / "gallery.png"
    drawn = draw_gallery(table, path)
    assert [one.name for one in drawn] == [f"{number}.png" for number in range(6)]
    assert {class_color(0), class_color(1), (128, 128, 128)} <= colors_of(path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width == 3 * 384 + 4 * 8  # three columns of half-size images
        assert 2 * 288 < picture.height < 2 * 340


def test_the_choice_depends_on_the_seed_alone(table: AnnotationTable, tmp_path: Path) -> None:
    choices = [
        [path.name for path in draw_gallery(table, tmp_path / "x.jpg", count=2, seed=seed)]
        for seed in (0, 0, *range(1, 6))
    ]
    assert choices[0] == choices[1]
    assert len({*map(tuple, choices)}) > 1
    assert all(len(choice) == 2 and choice == sorted(choice) for choice in choices)
    assert (tmp_path / "x.jpg").read_bytes()[:2] == b"\xff\xd8"


def test_of_a_class_only_its_objects_and_images_are_drawn(
    table: AnnotationTable, tmp_path: Path
) -> None:
    path = tmp_path / "gallery.png"
    assert [one.name for one in draw_gallery(table, path, class_names=["dog"])] == [
        "0.png",
        "1.png",
    ]
    assert class_color(1) in colors_of(path)
    assert class_color(0) not in colors_of(path)


def test_detections_are_drawn_on_their_images(table: AnnotationTable, tmp_path: Path) -> None:
    found = Detections(
        torch.tensor([[100.0, 80, 500, 400], [20, 20, 60, 60]]),
        torch.tensor([0.9, 0.4]),
        torch.tensor([1, 0]),
        image_size=(576, 768),
        class_names=("cat", "dog"),
        source=str(table.image_path(3)),
    )
    path = tmp_path / "gallery.png"
    assert draw_gallery([found, found[:0]], path) == [table.image_path(3)] * 2
    assert {class_color(0), class_color(1)} <= colors_of(path)
    assert draw_gallery([found, found[:0]], path, class_names=["dog"]) == [table.image_path(3)]
    assert class_color(0) not in colors_of(path)


def test_boxes_that_cannot_be_drawn_are_counted(tmp_path: Path) -> None:
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text("a.png,30,10,20,30,cat\na.png,1,1,20,30,cat\n")
    table = read_csv(tmp_path / "rows.csv")
    with pytest.warns(UserWarning, match="1 box is not drawn, because"):
        draw_gallery(table, tmp_path / "gallery.png")


def test_mistakes_are_named(table: AnnotationTable, tmp_path: Path) -> None:
    out = tmp_path / "gallery.png"
    nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), (4, 4))
    with pytest.raises(ValueError, match=r"Unknown class 'owl' \(class_names\).*'cat', 'dog'"):
        draw_gallery(table, out, class_names=["owl"])
    with pytest.raises(ValueError, match=r"source\[0\] has no source"):
        draw_gallery([nothing], out)
    with pytest.raises(ValueError, match="There is no image to draw"):
        draw_gallery([], out)
    with pytest.raises(ValueError, match=r"'gallery': its extension must be \.png"):
        draw_gallery(table, "gallery")
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        draw_gallery(table, out, count=0)
    table.image_path(2).unlink()
    with pytest.raises(FileNotFoundError, match=r"2\.png"):
        draw_gallery(table, out)
    assert not out.exists()
