"""All splits of a dataset behind one path."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from focaldet.datasets import read_annotations, read_splits
from focaldet.errors import AnnotationError
from tests.helpers.annotation_files import (
    voc_object,
    write_photo,
    write_text,
    write_voc_folder,
    write_yolo_folder,
)
from tests.helpers.shared import SHARED

if TYPE_CHECKING:
    from pathlib import Path

DATA = SHARED / "data"


def coco(*, categories: list[tuple[int, str]] | None = None, category: int = 1) -> str:
    listed = [(1, "cat"), (2, "dog")] if categories is None else categories
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.png", "height": 20, "width": 40}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": category, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": number, "name": name} for number, name in listed],
    }
    return json.dumps(content)


def coco_annotations(root: Path) -> None:
    for split in ("train2017", "val2017"):
        write_text(root / "annotations" / f"instances_{split}.json", coco())


def coco_folders(root: Path) -> None:
    for split in ("train", "validation"):
        write_text(root / split / "_annotations.coco.json", coco())


def coco_files(root: Path) -> None:
    for name in ("train.json", "val_annotations.json"):
        write_text(root / name, coco())


def csv_folders(root: Path) -> None:
    for split in ("Train", "Valid"):
        write_text(root / split / "_annotations.csv", "path,x1,y1,x2,y2,class\na.png,1,2,4,6,cat\n")


def csv_files(root: Path) -> None:
    for name in ("train.csv", "val.csv"):
        write_text(root / name, "a.png,1,2,4,6,cat\n")


def voc(root: Path) -> None:
    write_voc_folder(root, a=voc_object("cat", (1, 2, 4, 6)))
    (root / "ImageSets" / "Main" / "all.txt").unlink()
    for split in ("train", "val", "trainval"):
        write_text(root / "ImageSets" / "Main" / f"{split}.txt", "a")


def yolo(root: Path) -> None:
    yaml = "train: images/train\nvalidation: images/train\nnames: [cat]\n"
    write_yolo_folder(root, "0 0.0625 0.2 0.075 0.2\n", yaml)


LAYOUTS = (coco_annotations, coco_folders, coco_files, csv_folders, csv_files, voc, yolo)


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_gives_train_and_val(tmp_path: Path, write: Any) -> None:
    write(tmp_path)
    tables = read_splits(tmp_path)
    assert list(tables) == ["train", "val"]
    for split, table in tables.items():
        assert table.boxes.round(6).tolist() == [[1, 2, 4, 6]]
        assert table.class_names[0] == "cat"
        alone = read_annotations(tmp_path, split=split)
        assert (alone.class_names, alone.labels.tolist()) == (table.class_names, [0])
    assert len(read_splits(tmp_path / "data.yaml" if write is yolo else tmp_path)) == 2


def test_names_that_are_changed_or_left_out_are_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    voc(tmp_path / "voc")
    coco_annotations(tmp_path / "coco")
    write_photo(tmp_path / "csv" / "test" / "a.png")
    csv_folders(tmp_path / "csv")
    for name in ("voc", "coco", "csv"):
        read_splits(tmp_path / name)
    assert any("skipped the split 'trainval'" in one for one in caplog.messages)
    assert any("'train2017' as 'train', 'val2017' as 'val'" in one for one in caplog.messages)
    assert any("skipped the folders test" in one for one in caplog.messages)


def test_a_single_split_is_all(tmp_path: Path) -> None:
    path = write_text(tmp_path / "cells.json", coco())
    for source in (path, tmp_path):
        assert list(read_splits(source)) == ["all"]
    table = read_splits(write_text(tmp_path / "t.csv", "a.png,1,2,4,6,dog\n"), class_names=["dog"])
    assert table["all"].class_names == ("dog",)


def test_images_may_have_a_folder_for_each_split(tmp_path: Path) -> None:
    coco_files(tmp_path / "boxes")
    photo = write_photo(tmp_path / "photos" / "train" / "a.png")
    write_photo(tmp_path / "photos" / "a.png")
    tables = read_splits(tmp_path / "boxes", tmp_path / "photos")
    assert tables["train"].image_path(0) == photo
    assert tables["val"].image_folder == tmp_path / "photos"


@pytest.mark.parametrize("name", ["train", "train2017"])
def test_two_splits_for_one_are_an_error_that_lists_both(tmp_path: Path, name: str) -> None:
    for split in (name, "Training"):
        write_text(tmp_path / "annotations" / f"instances_{split}.json", coco())
    message = f"two splits that can be 'train': ('Training' and '{name}'|'{name}' and 'Training')"
    with pytest.raises(AnnotationError, match=message):
        read_splits(tmp_path)


def test_splits_with_other_names_are_an_error_that_lists_them(tmp_path: Path) -> None:
    for split in ("fold1", "fold2"):
        write_text(tmp_path / "annotations" / f"instances_{split}.json", coco())
    with pytest.raises(AnnotationError, match="no split called train.*'fold1', 'fold2'"):
        read_splits(tmp_path)


def test_several_annotation_files_are_an_error_that_lists_them(tmp_path: Path) -> None:
    for name in ("cells.json", "more.json"):
        write_text(tmp_path / name, coco())
    with pytest.raises(
        AnnotationError, match=r"several annotation files: 'cells.json', 'more.json'"
    ):
        read_splits(tmp_path)
    write_text(tmp_path / "train.json", coco())
    write_text(tmp_path / "val.csv", "")
    with pytest.raises(AnnotationError, match=r"several annotation files: 'train.json', 'val.csv'"):
        read_splits(tmp_path)


def test_folders_of_splits_in_different_formats_are_an_error(tmp_path: Path) -> None:
    write_text(tmp_path / "train" / "a.json", coco())
    write_text(tmp_path / "val" / "a.csv", "")
    with pytest.raises(AnnotationError, match=r"different formats: train \(COCO\), val \(CSV\)"):
        read_splits(tmp_path)


def test_an_unknown_folder_says_what_it_contains(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="The folder is empty"):
        read_splits(tmp_path)
    write_photo(tmp_path / "photos" / "a.png")
    write_text(tmp_path / "readme.md", "")
    with pytest.raises(AnnotationError, match=r"The folder contains photos/, readme.md\."):
        read_splits(tmp_path)
    with pytest.raises(AnnotationError, match=r"a.zip' is a zip archive. Unpack it"):
        read_splits(write_text(tmp_path / "a.zip", ""))


def test_categories_in_another_order_are_matched_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_text(tmp_path / "train.json", coco())
    write_text(tmp_path / "val.json", coco(categories=[(1, "dog"), (7, "cat")]))
    tables = read_splits(tmp_path)
    assert tables["val"].class_names == ("cat", "dog")
    assert tables["val"].category_ids == (1, 2)
    assert [table.labels.tolist() for table in tables.values()] == [[0], [1]]
    assert any("matched them by name, in the order of 'train'" in one for one in caplog.messages)


def test_different_categories_are_an_error_that_says_how(tmp_path: Path) -> None:
    write_text(tmp_path / "train.json", coco())
    write_text(tmp_path / "val.json", coco(categories=[(1, "dog"), (2, "cow")]))
    message = r"compared with 'train', 'val' lacks \['cat'\] and 'val' also has \['cow'\]"
    with pytest.raises(AnnotationError, match=message):
        read_splits(tmp_path)
    write_text(tmp_path / "val.json", coco(categories=[(1, "dog"), (2, "dog"), (3, "cat")]))
    with pytest.raises(AnnotationError, match="'val' has two classes of the same name"):
        read_splits(tmp_path)


def test_classes_that_only_some_csv_files_have_are_joined(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split, name in (("train", "dog"), ("val", "cat")):
        write_text(tmp_path / f"{split}.csv", f"a.png,1,2,4,6,{name}\n")
    tables = read_splits(tmp_path)
    assert {table.class_names for table in tables.values()} == {("cat", "dog")}
    assert [table.labels.tolist() for table in tables.values()] == [[1], [0]]
    assert any("the split 'train' has no object of ['cat']" in one for one in caplog.messages)
    alone = read_annotations(tmp_path, split="train")
    assert (alone.class_names, alone.labels.tolist()) == (("cat", "dog"), [1])


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared datasets are not available")
def test_real_datasets_give_their_usual_splits() -> None:
    voc_tables = read_splits(DATA / "bccd" / "voc")
    coco_tables = read_splits(DATA / "bccd" / "coco", DATA / "bccd" / "voc" / "JPEGImages")
    assert list(voc_tables) == list(coco_tables) == ["train", "val", "test"]
    for split, table in voc_tables.items():
        assert len(table) == len(coco_tables[split])
        assert set(table.class_names) == set(coco_tables[split].class_names)
    tables = read_splits(DATA / "coco_sample")
    assert list(tables) == ["train", "val"]
    assert all(table.image_path(0).is_file() for table in tables.values())
