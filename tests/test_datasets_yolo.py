from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from focaldet.datasets import read_yolo
from focaldet.images import UnreadableImageError
from tests.test_datasets_readers import photo, write, yolo_folder


def test_a_yolo_folder_by_hand(tmp_path: Path) -> None:
    lines = "1 0.5 0.5 0.25 0.5\n\n0 0.1 0.2 0.3 0.2 0.3 0.9\n2 0.5 0.5 1 1\n"
    path = yolo_folder(tmp_path, lines)
    photo(tmp_path / "images" / "train" / "more" / "b.JPG")
    photo(tmp_path / "images" / "train" / "side.jpg", exif=turned())
    table = read_yolo(path, "train")
    folder = Path("images", "train")
    names = [str(Path(name).relative_to(folder)) for name in table.file_names]
    assert names == ["a.png", "more/b.JPG", "side.jpg"]
    assert table.image_path(1).is_file()
    assert table.image_sizes.tolist() == [[20, 40], [20, 40], [40, 20]]
    assert (table.class_names, table.category_ids) == (("cat", "dog"), (0, 1))
    np.testing.assert_allclose(table.boxes, [[15, 5, 25, 15], [4, 4, 12, 18], [0, 0, 40, 20]])
    assert table.labels.tolist() == [1, 0, -1]
    assert table.annotation_ids.tolist() == [0, 1, 2]
    assert table.image_indices.tolist() == [0, 0, 0]
    assert not table.crowd.any()


def test_a_yolo_folder_is_read_from_where_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yolo_folder(tmp_path / "yolo", "0 0.5 0.5 1 1")
    monkeypatch.chdir(tmp_path)
    table = read_yolo("yolo/data.yaml", "train")
    assert list(table.file_names) == ["images/train/a.png"]
    assert table.image_path(0).is_file()
    elsewhere = tmp_path / "yolo" / "images" / "train"
    Path("lists").mkdir()
    write(tmp_path / "lists" / "data.yaml", "train: all.txt\nnames: [x]")
    write(tmp_path / "lists" / "all.txt", f"{elsewhere / 'a.png'}\n../yolo/images/train/a.png\n")
    table = read_yolo("lists/data.yaml", "train")
    assert [table.image_path(index).is_file() for index in range(2)] == [True, True]


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize(
    ("yaml", "images"),
    [
        ("train: images/train\nnames: {0: cat, 1: dog}", 1),
        ("path: .\ntrain: ./images/train\nnc: 2\nnames: [cat, dog]", 1),
        ("train: ../images/train\nnames: [cat, dog]", 1),
        ("train: [images/train, images/more]\nnames: [cat, dog]", 2),
        ("train: lists/train.txt\nnames: [cat, dog]", 2),
        ("path: images\ntrain: train\nnames: [cat, dog]", 1),
    ],
)
def test_splits_and_names_may_be_given_in_several_ways(
    tmp_path: Path, yaml: str, images: int
) -> None:
    path = yolo_folder(tmp_path, "0 0.5 0.5 1 1", yaml)
    photo(tmp_path / "images" / "more" / "c.png")
    write(tmp_path / "lists" / "train.txt", "../images/train/a.png\n./../images/more/c.png\n")
    table = read_yolo(path, "train")
    assert len(table) == images
    assert table.boxes.tolist() == [[0, 0, 40, 20]]
    assert table.class_names == ("cat", "dog")


def test_labels_may_lie_beside_the_images(tmp_path: Path) -> None:
    photo(tmp_path / "all" / "a.png")
    write(tmp_path / "all" / "a.txt", "0 0.5 0.5 1 1")
    path = write(tmp_path / "data.yaml", "val: all\nnames: [x]")
    assert len(read_yolo(path, "val").boxes) == 1


@pytest.mark.parametrize(
    "line",
    ["0 0.5 0.5 1", "0 0.5 0.5 1 1 0.9", "cat 0.5 0.5 1 1", "0.5 0 0 1 1", "nan 0 0 1 1", "0"],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str) -> None:
    path = yolo_folder(tmp_path, f"0 0.5 0.5 1 1\n{line}\n")
    with pytest.raises(
        ValueError, match=f"`label` must be 'class cx .*'{line}' in line 2 of '.*a.txt'"
    ):
        read_yolo(path, "train")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train: [", "`data_yaml` must be a YAML file; got '.*data.yaml'"),
        ("- 1", "`data_yaml` must be a YOLO data file; got '.*data.yaml', which has no 'names'"),
        (
            "train: images/train\nnames: 3",
            "`names` must be a list, or a mapping from numbers; got 3",
        ),
        (
            "train: images/train\nnames: {1: a, 2: b}",
            r"`names` must be numbered 0, 1, .*got \[1, 2\]",
        ),
        (
            "train: images/train\nnames: [a]\nnc: 2",
            "`nc` must be the number of names; got 2 with 1",
        ),
        (
            "val: images/train\nnames: [a]",
            "`split` must be a split.*'train', which.*Splits there: val",
        ),
    ],
)
def test_wrong_yaml_files_are_explained(tmp_path: Path, yaml: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_yolo(yolo_folder(tmp_path, "", yaml), "train")


def test_missing_parts_of_a_yolo_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="`data_yaml` must be an existing file; got '.*no.yaml'"
    ):
        read_yolo(tmp_path / "no.yaml", "train")
    path = yolo_folder(tmp_path, "", "train: photos\nval: list.txt\nnames: [a]")
    with pytest.raises(
        FileNotFoundError, match="`train` must be an existing folder or list.*photos"
    ):
        read_yolo(path, "train")
    write(tmp_path / "list.txt", "gone.jpg")
    with pytest.raises(
        FileNotFoundError, match="`image` must be an existing file; got '.*gone.jpg'"
    ):
        read_yolo(path, "val")
    write(tmp_path / "gone.jpg", "no image")
    with pytest.raises(
        UnreadableImageError, match="`image` must be an image that can be read.*gone.jpg"
    ):
        read_yolo(path, "val")


def test_without_pyyaml_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match="pip install 'focaldet.train.' or pyyaml"):
        read_yolo(yolo_folder(tmp_path), "train")
