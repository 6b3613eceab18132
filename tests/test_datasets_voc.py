from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from focaldet.datasets import read_coco, read_voc
from focaldet.errors import AnnotationError
from tests.helpers.annotation_files import (
    VOC_SIZE,
    voc_object,
    write_photo,
    write_text,
    write_voc_folder,
)
from tests.helpers.shared import SHARED

if TYPE_CHECKING:
    from pathlib import Path

BCCD = SHARED / "data" / "bccd"
BCCD_NAMES = ["RBC", "WBC", "Platelets"]


def test_a_voc_folder_worked_by_hand(tmp_path: Path) -> None:
    difficult = "<difficult>1</difficult>"
    part = "<part><name>head</name><bndbox><xmin>9</xmin></bndbox></part>"
    dog = voc_object("dog", (1, 2, 11, 12))
    cat = voc_object("cat", (5.5, 6, 7, 8), difficult + part)
    root = write_voc_folder(tmp_path, b=VOC_SIZE + dog + cat, a="")
    write_photo(root / "JPEGImages" / "b.png")
    table = read_voc(root, "all")
    assert list(table.file_names) == ["b.png", "a.jpg"]  # a missing file gets VOC's suffix
    assert table.image_path(0).is_file()
    assert table.image_ids.tolist() == [1, 2]
    assert table.image_sizes.tolist() == [[20, 40], [0, 0]]
    assert (table.class_names, table.category_ids) == (("cat", "dog"), (0, 1))
    assert table.boxes.tolist() == [[1, 2, 11, 12], [5.5, 6, 7, 8]]
    assert table.labels.tolist() == [1, 0]
    assert table.crowd.tolist() == [False, True]
    assert table.areas.tolist() == [100, 3]
    assert table.annotation_ids.tolist() == [0, 1]
    assert table.image_indices.tolist() == [0, 0]
    one_based = read_voc(root, "all", one_based=True)
    assert one_based.boxes.tolist() == [[0, 1, 11, 12], [4.5, 5, 7, 8]]
    assert one_based.areas[0] == 121


def test_a_size_of_minus_one_is_unknown(tmp_path: Path) -> None:
    size = "<size><width>-1</width><height>-1</height></size>"
    root = write_voc_folder(tmp_path, a=size + voc_object("cat", (1, 2, 3, 4)))
    assert read_voc(root, "all").image_sizes.tolist() == [[0, 0]]


def test_class_names_come_from_all_splits_unless_given(tmp_path: Path) -> None:
    root = write_voc_folder(
        tmp_path, a=voc_object("dog", (1, 2, 3, 4)), b=voc_object("cat", (1, 2, 3, 4))
    )
    write_text(root / "ImageSets" / "Main" / "one.txt", "a")
    assert read_voc(root, "one").labels.tolist() == [1]
    assert read_voc(root, "all", class_names=["x", "cat"]).labels.tolist() == [-1, 1]


def test_a_single_string_is_not_a_list_of_class_names(tmp_path: Path) -> None:
    root = write_voc_folder(tmp_path, a="")
    with pytest.raises(TypeError, match=r"class_names .*got 'cat'.*\('cat',\)"):
        read_voc(root, "all", class_names="cat")


@pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD dataset is not available")
@pytest.mark.parametrize("split", ["train", "val", "trainval", "test"])
def test_the_voc_and_coco_files_of_bccd_agree(split: str) -> None:
    voc = read_voc(BCCD / "voc", split, class_names=BCCD_NAMES)
    coco = read_coco(BCCD / "coco" / f"{split}.json", BCCD / "voc" / "JPEGImages", cache=False)
    assert list(voc.file_names) == list(coco.file_names)
    assert voc.class_names == coco.class_names
    np.testing.assert_array_equal(voc.image_sizes, coco.image_sizes)
    x1, y1, x2, y2 = voc.boxes.T
    valid = (x2 > x1) & (y2 > y1)  # the COCO files lack two boxes without area
    assert len(valid) - valid.sum() == {"train": 1, "val": 1, "trainval": 2, "test": 0}[split]
    for name in ("boxes", "labels", "areas", "image_indices"):
        np.testing.assert_array_equal(getattr(voc, name)[valid], getattr(coco, name), err_msg=name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<annotation><object>", "'.*a.xml' as XML .*no element found"),
        ("", "'.*a.xml' as XML"),
        ('<?xml version="1.0" encoding="martian"?><a/>', "'.*a.xml' as XML .*encoding"),
        (voc_object("x", (1, 2, 3)), "'.*a.xml', object 1: ymax is missing"),
        (voc_object("x", (1, "two", 3, 4)), "'.*a.xml', object 1: ymin .*number, got 'two'"),
        ("<a><object><name>x</name></object></a>", "'.*a.xml', object 1: xmin is missing"),
        (voc_object("", (1, 2, 3, 4)), "'.*a.xml', object 1: name is missing or empty"),
        (
            "<a><size><width>wide</width></size></a>",
            "'.*a.xml', size: width .*number, got 'wide'",
        ),
        ("<a><size><width>nan</width></size></a>", "'.*a.xml', size: width .*pixels, got nan"),
        ("<a><size><height>1e12</height></size></a>", "size: height .*pixels, got 1000000000000"),
    ],
)
def test_wrong_xml_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    root = write_voc_folder(tmp_path, a="")
    if text.startswith("<object>"):
        text = f"<annotation>{text}</annotation>"
    write_text(root / "Annotations" / "a.xml", text)
    with pytest.raises(AnnotationError, match=message):
        read_voc(root, "all", class_names=["x"])


@pytest.mark.filterwarnings("ignore:.*(no objects|no images|can be learned):UserWarning")
def test_lists_have_a_byte_order_mark_or_not_but_must_be_utf_8(tmp_path: Path) -> None:
    root = write_voc_folder(tmp_path, a="")
    listing = root / "ImageSets" / "Main" / "all.txt"
    listing.write_bytes(b"\xef\xbb\xbfa\r\n")
    assert list(read_voc(root, "all").file_names) == ["a.jpg"]
    listing.write_bytes(b"\xe9\n")
    with pytest.raises(AnnotationError, match="'.*all.txt' as UTF-8"):
        read_voc(root, "all")


def test_missing_parts_of_a_voc_folder_are_named(tmp_path: Path) -> None:
    root = write_voc_folder(tmp_path / "voc", a="")
    with pytest.raises(FileNotFoundError, match=r"folder: '.*nowhere' \(root\)"):
        read_voc(tmp_path / "nowhere", "all")
    with pytest.raises(FileNotFoundError, match="split 'train' in '.*voc'.*only split is 'all'"):
        read_voc(root, "train")
    write_text(root / "ImageSets" / "Main" / "more.txt", "a\nnone")
    with pytest.raises(FileNotFoundError, match="'.*none.xml'.*Every image"):
        read_voc(root, "more")
    (root / "JPEGImages").rmdir()
    with pytest.raises(FileNotFoundError, match="folder: '.*JPEGImages'"):
        read_voc(root, "all")
