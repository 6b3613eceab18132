"""Which files the writers create, replace and refuse."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from focaldet.datasets import (
    AnnotationTable,
    read_coco,
    read_csv,
    read_labelme,
    read_voc,
    read_yolo,
    write_annotations,
)
from focaldet.datasets.writers import WRITERS
from tests.helpers.annotation_files import write_photo, write_text
from tests.helpers.annotation_tables import Row, table_of_rows

if TYPE_CHECKING:
    from pathlib import Path

FORMATS: list[Any] = sorted(WRITERS)
ROW: Row = (0, 0, [1, 2, 3, 4])


def table_of(folder: Path, *names: str) -> AnnotationTable:
    """Write 100x80 pictures of these names, and return a table of them with one box."""
    for name in names:
        write_photo(folder / name, (100, 80))
    return table_of_rows(ROW, folder=folder, files=names)


def files_in(folder: Path) -> set[str]:
    """Return the paths of all files in a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize(
    ("form", "default", "place"),
    [
        ("yolo", "link", "images/train/x.png"),
        ("voc", "link", "JPEGImages/x.png"),
        ("coco", "keep", "all/x.png"),
        ("csv", "keep", "all/x.png"),
        ("labelme", "keep", "x.png"),
    ],
)
def test_images_are_kept_linked_or_copied(
    tmp_path: Path, form: Any, default: str, place: str
) -> None:
    table = table_of(tmp_path / "photos", "x.png")
    ways: list[Any] = [None, "keep", "link", "copy"]
    for way in ways:
        image = write_annotations(table, tmp_path / str(way), form, image_files=way) / place
        happens = way or default
        assert image.exists() == (happens != "keep")
        assert image.is_symlink() == (happens == "link")


@pytest.mark.parametrize("form", ["coco", "csv", "labelme"])
def test_copied_images_are_found(tmp_path: Path, form: Any) -> None:
    table = table_of(tmp_path / "photos", "a/x.png", "b/x.png")
    out = write_annotations(table, tmp_path / "out", form, image_files="copy")
    if form == "coco":
        again = read_coco(out / "annotations" / "instances_all.json")
    else:
        again = read_csv(out / "all.csv") if form == "csv" else read_labelme(out)
    assert [again.image_path(index).is_relative_to(out) for index in (0, 1)] == [True, True]
    assert again.image_path(1).read_bytes() == table.image_path(1).read_bytes()
    assert not again.tried_folders


def test_images_that_would_collide_get_new_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("a/1.png", "b/1.png", "A/1.jpg", "b_1.png", ".hid.png", "c/2.png", "2.jpg")
    table = table_of(tmp_path / "photos", *names)
    write_annotations(table, tmp_path / "yolo", "yolo")
    images = files_in(tmp_path / "yolo" / "images" / "train")
    assert images == {"1.png", "b_1.png", "A_1.jpg", "b_1_2.png", "_.hid.png", "2.png", "2_2.jpg"}
    labels = files_in(tmp_path / "yolo" / "labels" / "train")
    assert labels == {f"{name.rpartition('.')[0]}.txt" for name in images}
    assert "files get a new name in the dataset that is written: 5." in caplog.text
    again = read_yolo(tmp_path / "yolo" / "data.yaml", "train")
    assert {path.resolve() for path in map(again.image_path, range(7))} == {
        table.image_path(index) for index in range(7)
    }


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_is_overwritten_without_being_told(tmp_path: Path, form: Any) -> None:
    table = table_of(tmp_path / "photos", "x.png")
    (tmp_path / "out").mkdir()
    write_annotations(table, tmp_path / "out", form)  # an empty folder
    before = files_in(tmp_path / "out")
    with pytest.raises(FileExistsError, match=r"out' is not empty \(path\).*overwrite=True"):
        write_annotations(table, tmp_path / "out", form)
    write_annotations(table, tmp_path / "out", form, overwrite=True)
    assert files_in(tmp_path / "out") == before
    file = write_text(tmp_path / "file", "mine")
    with pytest.raises(FileExistsError, match="file' is a file, not a folder"):
        write_annotations(table, file, form, overwrite=True)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("form", ["coco", "csv"])
def test_a_single_file_is_not_overwritten_either(tmp_path: Path, form: Any) -> None:
    table = table_of(tmp_path / "photos", "x.png")
    path = write_text(tmp_path / f"a{WRITERS[form].FILE_SUFFIX}", "mine")
    with pytest.raises(FileExistsError, match=r"a.*' exists already \(path\)"):
        write_annotations(table, path, form)
    assert path.read_text() == "mine"
    write_annotations(table, path, form, overwrite=True)
    assert path.read_text() != "mine"
    (tmp_path / f"b{WRITERS[form].FILE_SUFFIX}").mkdir()
    with pytest.raises(FileExistsError, match="is a folder, not a file"):
        write_annotations(table, tmp_path / f"b{WRITERS[form].FILE_SUFFIX}", form)


def test_the_list_of_classes_is_not_overwritten_either(tmp_path: Path) -> None:
    table = table_of(tmp_path / "photos", "x.png")
    classes = write_text(tmp_path / "a_classes.csv", "mine")
    with pytest.raises(FileExistsError, match="a_classes.csv' exists already"):
        write_annotations(table, tmp_path / "a.csv", "csv")
    assert classes.read_text() == "mine"
    assert files_in(tmp_path) == {"photos/x.png", "a_classes.csv"}


def test_files_that_stay_in_a_folder_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = table_of(tmp_path / "photos", "x.png", "y.png")
    write_annotations(table, tmp_path / "yolo", "yolo")
    write_annotations(table.select([0]), tmp_path / "yolo", "yolo", overwrite=True)
    assert f"Files that were in {tmp_path / 'yolo'} before and stay there: 2." in caplog.text


@pytest.mark.parametrize("how", ["link", "copy"])
def test_a_missing_image_is_named_and_nothing_is_written(tmp_path: Path, how: Any) -> None:
    table = table_of(tmp_path / "photos", "x.png", "y.png")
    (tmp_path / "photos" / "y.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"y.png'\. The folder of images is .*'keep'"):
        write_annotations(table, tmp_path / "out", "voc", image_files=how)
    assert files_in(tmp_path) == {"photos/x.png"}
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_the_folder_of_the_images_can_be_written_to(tmp_path: Path) -> None:
    table = table_of(tmp_path / "voc" / "JPEGImages", "x.png")
    before = (tmp_path / "voc" / "JPEGImages" / "x.png").read_bytes()
    ways: list[Any] = ["link", "copy", "keep"]
    for how in ways:
        write_annotations(table, tmp_path / "voc", "voc", image_files=how, overwrite=True)
        image = tmp_path / "voc" / "JPEGImages" / "x.png"
        assert not image.is_symlink()
        assert image.read_bytes() == before
    assert len(read_voc(tmp_path / "voc", "all")) == 1


def test_an_image_of_the_dataset_is_not_replaced_by_another(tmp_path: Path) -> None:
    names = ("images/train/sub/x.png", "images/train/x.png")
    table = table_of(tmp_path / "yolo", *names)
    before = (tmp_path / "yolo" / names[1]).read_bytes()
    with pytest.raises(FileExistsError, match="x.png' is an image of the dataset, and would be"):
        write_annotations(table, tmp_path / "yolo", "yolo", overwrite=True)
    assert (tmp_path / "yolo" / names[1]).read_bytes() == before
    assert files_in(tmp_path / "yolo") == set(names)


def test_links_that_are_not_supported_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(1, "not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    table = table_of(tmp_path / "photos", "x.png")
    with pytest.raises(OSError, match=r"symbolic link to '.*x.png' \(not permitted\).*'copy'"):
        write_annotations(table, tmp_path / "yolo", "yolo")


def test_images_that_readers_would_not_list_are_errors(tmp_path: Path) -> None:
    table = table_of(tmp_path, "x.png")
    (tmp_path / "x.png").rename(tmp_path / "x.data")
    with pytest.raises(ValueError, match="x.data' does not have the suffix of an image.*.png"):
        write_annotations(replace(table, file_names=["x.data"]), tmp_path / "yolo", "yolo")


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("csv", {"class_names": ("cat", " dog")}, r"class_names\[1\], ' dog', .*CSV"),
        ("voc", {"class_names": ("cat", "a\nb")}, r"class_names\[1\], 'a\\nb', .*Pascal VOC"),
        ("labelme", {"class_names": ("cat", "cat")}, r"class_names\[1\], 'cat', is the name of an"),
        ("voc", {"class_names": ("", "cat")}, r"class_names\[0\], '', is empty"),
        ("coco", {"class_names": ("cat", "\udcff")}, r"'\\udcff' is not valid Unicode"),
        ("csv", {"file_names": ("a\nb.png", "c.png")}, "control characters or spaces"),
        ("csv", {"file_names": ("a.png", "./a.png")}, "a.png' is listed twice"),
        ("coco", {"image_ids": [4, 4]}, "image_ids contains 4 for the images a.png and b.png"),
    ],
)
def test_names_and_ids_that_a_format_cannot_hold_are_errors(
    tmp_path: Path, form: Any, changes: dict[str, Any], message: str
) -> None:
    if "image_ids" in changes:
        changes = {"image_ids": np.array(changes["image_ids"])}
    table = table_of_rows(ROW, **changes)
    with pytest.raises(ValueError, match=message):
        write_annotations(table, tmp_path / "out", form, image_files="keep")
    assert not (tmp_path / "out").exists()


def test_wrong_options_are_errors(tmp_path: Path) -> None:
    table, other = table_of_rows(ROW), table_of_rows(ROW, class_names=("dog", "cat"))
    out: Any = tmp_path / "out"
    wrong: Any = "pascal"
    with pytest.raises(ValueError, match="Unknown format 'pascal'; choose 'coco', 'yolo'"):
        write_annotations(table, out, wrong)
    with pytest.raises(ValueError, match="Unknown image_files 'pascal'; choose 'keep'"):
        write_annotations(table, out, "coco", image_files=wrong)
    with pytest.raises(ValueError, match="table has no splits"):
        write_annotations({}, out, "coco")
    with pytest.raises(ValueError, match="'a/b' cannot be the name of a split"):
        write_annotations({"a/b": table}, out, "coco")
    with pytest.raises(ValueError, match="classes of the split 'val' are .*'dog', 'cat'.*'train'"):
        write_annotations({"train": table, "val": other}, out, "coco")
    with pytest.raises(ValueError, match="single file, but there are 2 splits: 'train', 'val'"):
        write_annotations({"train": table, "val": table}, tmp_path / "a.json", "coco")
    with pytest.raises(ValueError, match="image_files='copy' needs a folder"):
        write_annotations(table, tmp_path / "a.csv", "csv", image_files="copy")
    with pytest.raises(ValueError, match="image_folder='x' is only for kept images"):
        write_annotations(table, out, "yolo", image_folder="x")
    assert list(tmp_path.iterdir()) == []


def test_what_is_left_where_it_is_and_which_ids_are_lost_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "focaldet")
    forms: list[Any] = ["yolo", "voc"]
    for form in forms:
        write_annotations(table_of_rows(ROW), tmp_path / form, form, image_files="keep")
    assert "Readers of YOLO look for those of each split in" in caplog.text
    assert (
        f"Readers of Pascal VOC look for them in {tmp_path / 'voc' / 'JPEGImages'}" in caplog.text
    )
    assert "cells.json: the ids of images and categories are not kept by YOLO." in caplog.text
