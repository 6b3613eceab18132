from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from focaldet.datasets import read_yolo
from focaldet.errors import AnnotationError, UnreadableImageError
from tests.helpers.annotation_files import write_photo, write_text, write_yolo_folder


def test_a_yolo_folder_worked_by_hand(tmp_path: Path) -> None:
    lines = "1 0.5 0.5 0.25 0.5\n\n0 0.1 0.2 0.3 0.2 0.3 0.9\n2 0.5 0.5 1 1\n"
    path = write_yolo_folder(tmp_path, lines)
    write_photo(tmp_path / "images" / "train" / "more" / "b.JPG")
    write_photo(tmp_path / "images" / "train" / "side.jpg", exif=turned())
    for name in ("more/b.txt", "side.txt"):
        write_text(tmp_path / "labels" / "train" / name, "")
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


def test_relative_paths_are_relative_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_yolo_folder(tmp_path / "yolo", "0 0.5 0.5 1 1")
    monkeypatch.chdir(tmp_path)
    table = read_yolo("yolo/data.yaml", "train")
    assert list(table.file_names) == ["images/train/a.png"]
    assert table.image_path(0).is_file()
    elsewhere = tmp_path / "yolo" / "images" / "train"
    Path("lists").mkdir()
    write_text(tmp_path / "lists" / "data.yaml", "train: all.txt\nnames: [x]")
    write_text(
        tmp_path / "lists" / "all.txt", f"{elsewhere / 'a.png'}\n../yolo/images/train/a.png\n"
    )
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
def test_splits_and_names_can_be_written_in_several_ways(
    tmp_path: Path, yaml: str, images: int
) -> None:
    path = write_yolo_folder(tmp_path, "0 0.5 0.5 1 1", yaml)
    write_photo(tmp_path / "images" / "more" / "c.png")
    write_text(tmp_path / "labels" / "more" / "c.txt", "")
    write_text(tmp_path / "lists" / "train.txt", "../images/train/a.png\n./../images/more/c.png\n")
    table = read_yolo(path, "train")
    assert len(table) == images
    assert table.boxes.tolist() == [[0, 0, 40, 20]]
    assert table.class_names == ("cat", "dog")


def test_labels_can_be_next_to_the_images(tmp_path: Path) -> None:
    write_photo(tmp_path / "all" / "a.png")
    write_text(tmp_path / "all" / "a.txt", "0 0.5 0.5 1 1")
    path = write_text(tmp_path / "data.yaml", "val: all\nnames: [x]")
    assert len(read_yolo(path, "val").boxes) == 1


@pytest.mark.parametrize(
    "line",
    ["0 0.5 0.5 1", "0 0.5 0.5 1 1 0.9", "cat 0.5 0.5 1 1", "0.5 0 0 1 1", "nan 0 0 1 1", "0"],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str) -> None:
    path = write_yolo_folder(tmp_path, f"0 0.5 0.5 1 1\n{line}\n")
    with pytest.raises(AnnotationError, match=f"'.*a.txt', line 2: .*class cx cy.*got '{line}'"):
        read_yolo(path, "train")


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("train: [", "'.*data.yaml' as YAML .*line 1"),
        ("- 1", "'.*data.yaml' is not a YOLO data file: it has no 'names'"),
        ("train: images/train\nnames: 3", "names in '.*data.yaml' must be a list.*, got 3"),
        ("train: images/train\nnames: cat", "names in '.*data.yaml' must be a list.*, got 'cat'"),
        ("train: images/train\nnames: {1: a, 2: b}", r"names in .*0, 1, 2, .*got \[1, 2\]"),
        ("train: images/train\nnames: [a]\nnc: 2", "nc is 2 in '.*data.yaml'.*names has 1 entry"),
    ],
)
def test_wrong_yaml_files_are_explained(tmp_path: Path, yaml: str, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        read_yolo(write_yolo_folder(tmp_path, "", yaml), "train")


def test_missing_parts_of_a_yolo_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"file: '.*no.yaml' \(data_yaml\)"):
        read_yolo(tmp_path / "no.yaml", "train")
    path = write_yolo_folder(tmp_path, "", "train: photos\nval: list.txt\nnames: [a]")
    with pytest.raises(FileNotFoundError, match=r"'.*photos' \(train in '.*data.yaml'\)"):
        read_yolo(path, "train")
    write_text(tmp_path / "list.txt", "gone.jpg")
    with pytest.raises(FileNotFoundError, match="'.*gone.jpg'"):
        read_yolo(path, "val")
    write_text(tmp_path / "gone.jpg", "no image")
    with pytest.raises(UnreadableImageError, match="'.*gone.jpg'"):
        read_yolo(path, "val")


@pytest.mark.parametrize("broken", ["data.yaml", "list.txt", "labels/train/a.txt"])
def test_text_files_have_a_byte_order_mark_or_not_but_must_be_utf_8(
    tmp_path: Path, broken: str
) -> None:
    path = write_yolo_folder(tmp_path, "0 0.5 0.5 1 1", "train: list.txt\nnames: [a]")
    write_text(tmp_path / "list.txt", "images/train/a.png")
    expected = read_yolo(path, "train").boxes
    file = tmp_path / broken
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    np.testing.assert_array_equal(read_yolo(path, "train").boxes, expected)
    file.write_bytes(b"\xe9" + file.read_bytes())
    with pytest.raises(AnnotationError, match=f"'.*{broken}' as UTF-8.*line 1 .*0xe9"):
        read_yolo(path, "train")


def test_without_pyyaml_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match="data.yaml requires .*pip install 'pyyaml'"):
        read_yolo(write_yolo_folder(tmp_path), "train")
