"""Exports of Roboflow, CVAT and Label Studio, and of tools that write VOC or CSV, open as they are.

The files are small ones made by hand after the documentation and the exporters of these tools.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from focaldet.datasets import AnnotationTable, DetectionDataset, read_annotations, read_splits
from focaldet.datasets.readers import find_reader
from focaldet.errors import AnnotationError
from tests.helpers.annotation_files import VOC_SIZE, voc_object, write_photo, write_text
from tests.helpers.shared import SHARED

CHESS = SHARED / "data" / "chess"


def coco(names: list[str], *, root: bool = True, category: int = 1, **changes: Any) -> str:
    """Build the content of a Roboflow export with a box of 1, 2, 4, 6 in every image."""
    content = {
        "images": [
            {"id": i, "file_name": name, "height": 20, "width": 40} for i, name in enumerate(names)
        ],
        "annotations": [
            {"id": i, "image_id": i, "category_id": category, "bbox": [1, 2, 3, 4], "iscrowd": 0}
            for i, _ in enumerate(names)
        ],
        "categories": [
            *([{"id": 0, "name": "animals", "supercategory": "none"}] if root else []),
            {"id": 1, "name": "cat", "supercategory": "animals"},
            {"id": 2, "name": "dog", "supercategory": "animals"},
        ],
    }
    return json.dumps(content | changes)


def check_one_box(table: AnnotationTable, names: list[str], *, label: int = 0) -> None:
    """Check that a table has one box of 1, 2, 4, 6 in one image, which can be opened."""
    assert table.class_names == tuple(names)
    assert table.boxes.tolist() == [[1, 2, 4, 6]]
    assert table.labels.tolist() == [label]
    image, target = DetectionDataset(table)[0]
    assert image.shape == (3, 20, 40)
    assert target["boxes"].tolist() == [[1, 2, 4, 6]]


@pytest.mark.skipif(not CHESS.is_dir(), reason="the chess dataset is not available")
def test_a_real_export_of_roboflow_opens_with_all_splits(caplog: pytest.LogCaptureFixture) -> None:
    tables = read_splits(CHESS)
    assert {name: len(table) for name, table in tables.items()} == {
        "train": 202,
        "val": 58,
        "test": 29,
    }
    for table in tables.values():
        assert (len(table.class_names), table.class_names[0]) == (13, "bishop")
        assert table.category_ids == tuple(range(1, 14))
        assert table.image_path(len(table) - 1).is_file()
    roots = [one for one in caplog.messages if "left out the category 'pieces' (id 0)" in one]
    assert len(roots) == 3
    assert len(read_annotations(CHESS, split="val")) == 58
    assert len(read_annotations(CHESS / "valid")) == 58


def test_a_root_category_is_kept_if_a_box_has_it_or_it_is_a_plain_category(tmp_path: Path) -> None:
    write_photo(tmp_path / "a.jpg")
    file = tmp_path / "_annotations.coco.json"
    write_text(file, coco(["a.jpg"]))
    check_one_box(read_annotations(tmp_path), ["cat", "dog"])
    write_text(file, coco(["a.jpg"], category=0))
    check_one_box(read_annotations(tmp_path), ["animals", "cat", "dog"])
    plain = [{"id": i, "name": name, "supercategory": "none"} for i, name in enumerate("xyz")]
    write_text(file, coco(["a.jpg"], categories=plain))
    check_one_box(read_annotations(tmp_path), ["x", "y", "z"], label=1)


def test_a_root_category_that_one_split_uses_is_kept_in_all(tmp_path: Path) -> None:
    for split, category in (("train", 1), ("valid", 0)):
        write_photo(tmp_path / split / "a.jpg")
        write_text(tmp_path / split / "_annotations.coco.json", coco(["a.jpg"], category=category))
    tables = read_splits(tmp_path)
    check_one_box(tables["train"], ["animals", "cat", "dog"], label=1)
    check_one_box(tables["val"], ["animals", "cat", "dog"], label=0)
    assert tables["train"].category_ids == tables["val"].category_ids == (0, 1, 2)


def test_coco_images_in_other_folders_are_found_by_the_end_of_their_path(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("street/a.jpg", "park/a.jpg", "b.jpg", "twice/c.jpg", "again/c.jpg"):
        write_photo(tmp_path / "photos" / name)
    names = [r"C:\data\street\a.jpg", "/home/me/park/a.jpg", "old/b.jpg", "c.jpg", "gone.jpg"]
    table = read_annotations(write_text(tmp_path / "x.json", coco(names)))
    expected = ["photos/street/a.jpg", "photos/park/a.jpg", "photos/b.jpg", "c.jpg", "gone.jpg"]
    assert list(table.file_names) == expected
    assert [table.image_path(i).is_file() for i in range(5)] == [True, True, True, False, False]
    assert any("found 3 of 5 images by the end of their names" in one for one in caplog.messages)


def test_cocos_image_folder_may_be_nested_in_a_folder_of_images(tmp_path: Path) -> None:
    write_photo(tmp_path / "images" / "default" / "a.jpg")  # CVAT
    write_text(tmp_path / "annotations" / "instances_default.json", coco(["a.jpg"], root=False))
    assert list(read_splits(tmp_path)) == ["all"]
    check_one_box(read_annotations(tmp_path, split="default"), ["cat", "dog"])


CSV_FILES = {
    "tensorflow": "filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,40,20,cat,1,2,4,6\n",
    "deepforest": "image_path,xmin,ymin,xmax,ymax,label\na.jpg,1,2,4,6,cat\n",
    "keras": "path,x1,y1,x2,y2,class\na.jpg,1,2,4,6,cat\n",
    "pandas": ",image,Xmin,Ymin,Xmax,Ymax,category,score\n0,a.jpg,1,2,4,6,cat,0.5\n",
}


@pytest.mark.parametrize("kind", CSV_FILES)
def test_csv_files_may_have_a_header(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_photo(tmp_path / "images" / "a.jpg")
    table = read_annotations(write_text(tmp_path / "some.csv", CSV_FILES[kind]))
    check_one_box(table, ["cat"])
    assert table.image_sizes.tolist() == [[20, 40] if kind == "tensorflow" else [0, 0]]
    ignored = [message for message in caplog.messages if "ignored the columns ['score']" in message]
    assert len(ignored) == (kind == "pandas")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("filename,xmin,ymin,xmax,class\n", "line 1: the header .* lacks columns.* y2: y2 or ymax"),
        ("filename,path,x1,y1,x2,y2,class\n", "line 1: 'filename' and 'path' can both be .* path"),
        ("path,x1,y1,x2,y2,class\na.jpg,1,2,x,6,cat\n", "line 2: .*numbers, got 'a.jpg,1,2,x"),
        ("path,x1,y1,x2,y2,class\na.jpg,1,2\n", "line 2: .*numbers, got 'a.jpg,1,2'"),
        ("path,x1,y1,x2,y2,class\n,1,2,3,4,cat\n", "line 2: expected path,x1,y1,x2,y2,class"),
        ("path,x1,y1,x2,y2,class\na.jpg,.1,.2,.3,1,cat\n", "between 0 and 1.*Multiply"),
        (
            "path,width,height,x1,y1,x2,y2,class\na.jpg,wide,2,1,2,3,4,cat\n",
            "line 2: width must be a number of pixels, got 'wide'",
        ),
        (
            "path,width,height,x1,y1,x2,y2,class\na.jpg,4,2,1,2,3,4,cat\na.jpg,4,3,1,2,3,4,cat\n",
            "line 3: the size of 'a.jpg' is 4x3, but 4x2 in an earlier line",
        ),
    ],
)
def test_wrong_csv_files_with_a_header_are_explained(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(AnnotationError, match=message):
        read_annotations(write_text(tmp_path / "t.csv", text))


def voc(box: tuple[float, ...] = (1, 2, 4, 6), *, name: str = "cat", head: str = "") -> str:
    return f"<annotation>{head}{VOC_SIZE}{voc_object(name, box)}</annotation>"


VOC_LAYOUTS = {
    "flat": ("a.xml", "a.jpg", ""),
    "jpegimages": ("Annotations/a.xml", "JPEGImages/a.jpg", ""),
    "kaggle": ("annotations/a.xml", "images/a.png", ""),
    "label studio": ("Annotations/a.xml", "images/a.jpg", "<filename>a</filename>"),
    "nested": ("boxes/street/a.xml", "photos/street/a.jpg", ""),
    "other machine": (
        *("a.xml", "a.jpg"),
        r"<filename>b.jpg</filename><path>C:\Users\me\a.jpg</path>",
    ),
    "renamed": ("001.xml", "photos/a.jpg", "<filename>photos\\a.jpg</filename>"),
    "roboflow": (
        *("a_jpg.rf.0123456789.xml", "a_jpg.rf.0123456789.jpg"),
        "<folder/><filename>a_jpg.rf.0123456789.jpg</filename><path>a.jpg</path>",
    ),
}


@pytest.mark.parametrize("layout", VOC_LAYOUTS)
def test_voc_files_are_read_without_lists_of_splits(tmp_path: Path, layout: str) -> None:
    annotations, image, head = VOC_LAYOUTS[layout]
    write_text(tmp_path / annotations, voc(head=head))
    write_photo(tmp_path / image)
    table = read_annotations(tmp_path)
    check_one_box(table, ["cat"])
    assert find_reader(tmp_path).NAME == "Pascal VOC without splits"
    assert read_splits(tmp_path).keys() == {"all"}


def test_what_is_guessed_about_voc_files_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_text(tmp_path / "001.xml", voc(head="<filename>a.jpg</filename>"))
    for name in ("a", "b", "c"):
        write_photo(tmp_path / f"{name}.jpg")
    read_annotations(tmp_path)
    assert any("1 XML files are called differently" in one for one in caplog.messages)
    assert any(
        "left out 2 images without an XML file. The first is b.jpg" in one
        for one in caplog.messages
    )


def test_voc_images_of_the_same_name_are_matched_by_their_folders(tmp_path: Path) -> None:
    for place, x1 in (("left", 1), ("right", 5)):
        write_text(tmp_path / "xml" / place / "a.xml", voc((x1, 2, 9, 9)))
        write_photo(tmp_path / "photos" / place / "a.jpg")
    table = read_annotations(tmp_path)
    assert list(table.file_names) == ["photos/left/a.jpg", "photos/right/a.jpg"]
    assert table.boxes[:, 0].tolist() == [1, 5]


def test_voc_files_outside_the_folders_of_splits_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for place in ("train", "more"):
        write_text(tmp_path / place / "a.xml", voc())
        write_photo(tmp_path / place / "a.jpg")
    assert len(read_splits(tmp_path)["train"]) == 1
    assert any("left out 1 XML files outside the folders" in one for one in caplog.messages)
    with pytest.raises(FileNotFoundError, match="Unknown split 'dev'.*only split is 'train'"):
        read_annotations(tmp_path, split="dev")


def test_the_images_of_voc_files_can_be_in_another_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "xml" / "a.xml", voc())
    write_photo(tmp_path / "photos" / "deep" / "a.jpg")
    check_one_box(read_annotations(tmp_path / "xml", tmp_path / "photos"), ["cat"])


def test_voc_lists_may_name_images_in_folders(tmp_path: Path) -> None:  # CVAT
    write_text(tmp_path / "ImageSets" / "Main" / "train.txt", "street\\a\npark/a\n")
    for place, x1 in (("street", 1), ("park", 5)):
        write_text(tmp_path / "Annotations" / place / "a.xml", voc((x1, 2, 9, 9)))
        write_photo(tmp_path / "JPEGImages" / place / "a.png")
    table = read_annotations(tmp_path, split="train")
    assert list(table.file_names) == ["street/a.png", "park/a.png"]
    assert table.boxes[:, 0].tolist() == [1, 5]


@pytest.mark.parametrize(
    ("annotations", "images"), [("", ""), ("Annotations", "JPEGImages"), ("annotations", "photos")]
)
def test_voc_files_may_be_in_a_folder_for_each_split(
    tmp_path: Path, annotations: str, images: str
) -> None:
    for split, name in (("train", "dog"), ("valid", "cat"), ("test", "dog")):
        write_text(tmp_path / annotations / split / "a.xml", voc(name=name))
        write_photo(tmp_path / images / split / "a.jpg")
    tables = read_splits(tmp_path)
    assert list(tables) == ["train", "val", "test"]
    assert [table.labels.tolist() for table in tables.values()] == [[1], [0], [1]]
    assert {table.class_names for table in tables.values()} == {("cat", "dog")}
    assert all(table.image_path(0).is_file() for table in tables.values())
    check_one_box(read_annotations(tmp_path, split="train"), ["cat", "dog"], label=1)


YOLO_BOX = "0 0.0625 0.2 0.075 0.2\n"  # 1, 2, 4, 6 in 40x20 pixels


def check_yolo(path: Path, split: str | None, names: tuple[str, ...] = ("cat", "dog")) -> None:
    table = read_annotations(path, split=split)
    assert table.class_names == names
    np.testing.assert_allclose(table.boxes, [[1, 2, 4, 6]])
    assert table.image_path(0).is_file()


def test_a_yolo_export_of_cvat_opens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\nbackup = backup/\n"
    write_text(tmp_path / "obj.data", data)
    write_text(tmp_path / "obj.names", "cat\ndog\n")
    for split in ("train", "valid"):
        folder = f"obj_{split}_data"
        write_text(tmp_path / f"{split}.txt", f"data/{folder}/street/a.jpg\n")
        write_photo(tmp_path / folder / "street" / "a.jpg")
        write_text(tmp_path / folder / "street" / "a.txt", YOLO_BOX)
    check_yolo(tmp_path, "valid")
    check_yolo(tmp_path, "val")
    check_yolo(tmp_path / "obj.data", "train")
    assert list(read_splits(tmp_path)) == ["train", "val"]
    assert any("1 paths do not exist as they are written" in one for one in caplog.messages)


def test_an_ultralytics_export_of_cvat_opens(tmp_path: Path) -> None:
    yaml = "path: ./\ntrain: train.txt\nnames:\n  0: cat\n  1: dog\n"
    write_text(tmp_path / "data.yaml", yaml)
    write_text(tmp_path / "train.txt", "data/images/train/a.jpg\n")
    write_photo(tmp_path / "images" / "train" / "a.jpg")
    write_text(tmp_path / "labels" / "train" / "a.txt", YOLO_BOX)
    check_yolo(tmp_path, "train")


@pytest.mark.parametrize("valid", ["../valid/images", "valid\\images"])
def test_a_yolo_export_of_roboflow_opens_without_its_test_folder(
    tmp_path: Path, valid: str, caplog: pytest.LogCaptureFixture
) -> None:
    yaml = f"train: ../train/images\nval: {valid}\ntest: ../test/images\n\nnc: 2\nnames: ['cat', 'dog']\n"
    write_text(tmp_path / "data.yaml", yaml)
    for split in ("train", "valid"):
        write_photo(tmp_path / split / "images" / "a.jpg")
        write_text(tmp_path / split / "labels" / "a.txt", YOLO_BOX)
    assert list(read_splits(tmp_path)) == ["train", "val"]
    check_yolo(tmp_path, "val")
    assert any(
        "skipped the splits 'test', whose images do not exist" in one for one in caplog.messages
    )


def test_the_folder_of_another_machine_in_a_data_file_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_text(tmp_path / "data.yaml", "path: /content/cats\ntrain: images\nnames: [cat, dog]\n")
    write_photo(tmp_path / "images" / "a.jpg")
    write_text(tmp_path / "labels" / "a.txt", YOLO_BOX)
    check_yolo(tmp_path, "train")
    assert any("path does not exist: '/content/cats'" in one for one in caplog.messages)


def test_a_yolo_export_of_label_studio_opens(tmp_path: Path) -> None:
    write_text(tmp_path / "classes.txt", "cat\ndog\n")
    write_text(tmp_path / "notes.json", '{"categories": [{"id": 0, "name": "cat"}]}')
    write_photo(tmp_path / "images" / "0123abcd-a.jpg")
    write_text(tmp_path / "labels" / "0123abcd-a.txt", YOLO_BOX)
    check_yolo(tmp_path, None)
    assert list(read_splits(tmp_path)) == ["all"]


@pytest.mark.parametrize("pattern", ["images/{}/a.jpg", "{}/images/a.jpg"])
def test_a_list_of_classes_is_enough_for_folders_of_splits(tmp_path: Path, pattern: str) -> None:
    write_text(tmp_path / "classes.txt", "cat\ndog\n")
    for split in ("train", "val"):
        image = write_photo(tmp_path / pattern.format(split))
        label = Path(str(image).replace("images", "labels")).with_suffix(".txt")
        write_text(label, YOLO_BOX)
    assert list(read_splits(tmp_path)) == ["train", "val"]


CVAT_HEAD = """<?xml version="1.0" encoding="utf-8"?>
<annotations><version>1.1</version><meta><task><labels>
<label><name>dog</name><type>any</type></label><label><name>cat</name><type>any</type></label>
</labels></task></meta>
"""


def cvat(shapes: str, *, images: str = "", subset: str = "") -> str:
    image = f'<image id="0" name="a.jpg" {subset} width="40" height="20">{shapes}</image>'
    return f"{CVAT_HEAD}{image}{images}</annotations>"


CVAT_BOX = '<box label="cat" source="manual" occluded="0" xtl="1" ytl="2" xbr="4" ybr="6" z_order="0"><attribute name="a">b</attribute></box>'


@pytest.mark.parametrize("place", ["images/a.jpg", "a.jpg", "photos/deep/a.jpg"])
def test_cvat_for_images_opens(tmp_path: Path, place: str) -> None:
    write_photo(tmp_path / place)
    path = write_text(tmp_path / "annotations.xml", cvat(CVAT_BOX + '<tag label="good"/>'))
    for source in (path, tmp_path):
        check_one_box(read_annotations(source), ["dog", "cat"], label=1)
    assert find_reader(path).NAME == "CVAT"


def test_shapes_of_cvat_are_replaced_by_their_boxes_or_left_out(tmp_path: Path) -> None:
    shapes = (
        '<box label="cat" xtl="10" ytl="4" xbr="14" ybr="6" rotation="90"/>'
        '<polygon label="cat" points="1.5,2.0;4.0,3.0;2.0,6.0"/>'
        '<mask label="dog" rle="3" left="3" top="4" width="5" height="6"/>'
        '<ellipse label="dog" cx="10" cy="10" rx="4" ry="2"/>'
        '<points label="cat" points="1,2"/><polyline label="cat" points="1,2;3,4"/>'
    )
    path = write_text(tmp_path / "annotations.xml", cvat(shapes))
    message = "bounding boxes: 1 ellipse, 1 mask, 1 polygon, 1 rotated box; .*left out: 1 points, 1 polyline"
    with pytest.warns(UserWarning, match=message):
        table = read_annotations(path)
    expected: list[list[float]] = [[11, 3, 13, 7], [1.5, 2, 4, 6], [3, 4, 8, 10], [6, 8, 14, 12]]
    np.testing.assert_allclose(table.boxes, expected)
    assert table.labels.tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (cvat('<box label="cat" xtl="1" ytl="2" xbr="4"/>'), "shape 1 .*attribute ybr is missing"),
        (cvat('<box xtl="1" ytl="2" xbr="4" ybr="4"/>'), "shape 1 .*attribute label is missing"),
        (
            cvat('<box label="cat" xtl="1" ytl="x" xbr="4" ybr="4"/>'),
            "ytl must be a number, got 'x'",
        ),
        (cvat('<polygon label="cat" points="1"/>'), "points must be 'x,y;x,y;...', got '1'"),
        (cvat("", images="<image/>"), "attribute name is missing"),
        (cvat("", images='<track id="0" label="cat"/>'), "tracks of a video. Export .*for images"),
        (cvat("")[:-5], "Cannot read '.*annotations.xml' as XML"),
    ],
)
def test_wrong_files_of_cvat_are_explained(tmp_path: Path, content: str, message: str) -> None:
    path = write_text(tmp_path / "annotations.xml", content)
    with pytest.raises(AnnotationError, match=message):
        read_annotations(path)


def test_subsets_of_a_cvat_project_are_splits(tmp_path: Path) -> None:
    other = '<image id="1" name="b.jpg" subset="Validation" width="40" height="20"/>'
    write_photo(tmp_path / "images" / "Train" / "a.jpg")
    write_text(tmp_path / "annotations.xml", cvat(CVAT_BOX, images=other, subset='subset="Train"'))
    with pytest.warns(UserWarning, match="no objects in 1 image"):
        tables = read_splits(tmp_path)
    assert list(tables) == ["train", "val"]
    check_one_box(tables["train"], ["dog", "cat"], label=1)
    assert list(tables["val"].file_names) == ["b.jpg"]
    with pytest.raises(ValueError, match="Unknown split 'dev'.*'Train' and 'Validation'"):
        read_annotations(tmp_path, split="dev")


def region(kind: str = "rectanglelabels", label: str = "cat", **changes: Any) -> dict[str, Any]:
    """Build a region of 1, 2, 4, 6 in 40x20 pixels."""
    value = {"x": 2.5, "y": 10, "width": 7.5, "height": 20, "rotation": 0, kind: [label]}
    given = {key: changes.pop(key) for key in list(changes) if key in ("value", "image_rotation")}
    value |= given.pop("value", {}) | changes
    size = {"original_width": 40, "original_height": 20}
    return {"type": kind, "from_name": "box", "to_name": "image", "value": value, **size, **given}


def task(*regions: dict[str, Any], image: str = "/data/upload/1/0123abcd-a.jpg") -> dict[str, Any]:
    return {
        "id": 7,
        "data": {"image": image},
        "annotations": [{"id": 3, "was_cancelled": False, "result": list(regions)}],
        "predictions": [],
    }


@pytest.mark.parametrize(
    "image",
    [
        *("/data/upload/1/0123abcd-a.jpg", "/data/local-files/?d=cats/a.jpg", "s3://cats/a.jpg"),
        *("https://example.com/cats/a.jpg?size=1", "a.jpg", r"cats\a.jpg"),
    ],
)
def test_the_json_of_label_studio_opens(tmp_path: Path, image: str) -> None:
    write_photo(tmp_path / "images" / "a.jpg")
    path = write_text(tmp_path / "project.json", json.dumps([task(region(), image=image)]))
    table = read_annotations(path)
    assert table.image_sizes.tolist() == [[20, 40]]
    check_one_box(table, ["cat"])
    assert find_reader(path).NAME == "Label Studio"


def test_the_short_json_of_label_studio_opens(tmp_path: Path) -> None:
    write_photo(tmp_path / "a.jpg")
    value = {**region()["value"], "original_width": 40, "original_height": 20}
    content = [{"image": "/data/upload/1/0123abcd-a.jpg", "id": 7, "label": [value]}]
    path = write_text(tmp_path / "project.json", json.dumps(content))
    check_one_box(read_annotations(path, class_names=["dog", "cat"]), ["dog", "cat"], label=1)


def test_shapes_of_label_studio_are_replaced_by_their_boxes_or_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    regions = [
        region(x=50, y=50, rotation=90),  # around (20, 10), from 3x4 to 4x3 pixels
        region("polygonlabels", points=[[2.5, 10], [10, 20], [5, 30]]),
        region("ellipselabels", x=50, y=50, radiusX=10, radiusY=10),
        region("labels"),
        region(value={"rectanglelabels": ["cat", "dog"]}),
        {"type": "keypointlabels", "value": {"x": 1, "y": 2, "keypointlabels": ["cat"]}},
        {"type": "choices", "value": {"choices": ["good"]}},
    ]
    second: dict[str, Any] = {"annotations": [{"result": []}, {"result": []}]}
    skipped = {"annotations": [{"was_cancelled": True, "result": []}]}
    tasks = [task(*regions), task() | second, task() | skipped, task() | {"annotations": []}]
    path = write_text(tmp_path / "project.json", json.dumps(tasks))
    message = (
        "several annotations, .*: 1; .*several labels, .*: 1; .*bounding boxes: 1 ellipse, 1 polygon, "
        "1 rotated rectangle; .*left out: 1 'keypointlabels'"
    )
    with pytest.warns(UserWarning, match=message):
        table = read_annotations(path)
    assert len(table) == 2
    expected = [[16, 10, 20, 13], [1, 2, 4, 6], [16, 8, 24, 12], [1, 2, 4, 6], [1, 2, 4, 6]]
    np.testing.assert_allclose(table.boxes, expected)
    assert any("without an annotation: 1, and skipped ones: 1" in one for one in caplog.messages)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([task(), 7], "task 1 must be an object, got int"),
        ([task(region(x="left"))], r"task 0 \(id 7\), region 0: x must be a number, got 'left'"),
        ([task(region(value={"rectanglelabels": [3]}))], "label must be a list of texts"),
        ([task(region(image_rotation=90))], "rotated in Label Studio .*90"),
        ([task(region("polygonlabels", points=[1]))], r"points must be a list of \[x, y\]"),
        ([{"annotations": [{"result": []}], "data": {"text": "x"}}], "no path or URL of an image"),
        ([{"annotations": 3, "data": {}}], "annotations must be a list of objects"),
        ([{"annotations": [{"result": 3}], "data": {}}], "result must be a list of objects"),
    ],
)
def test_wrong_files_of_label_studio_are_explained(
    tmp_path: Path, content: list[Any], message: str
) -> None:
    path = write_text(tmp_path / "project.json", json.dumps(content))
    with pytest.raises(AnnotationError, match=message):
        read_annotations(path)
    with pytest.raises(AnnotationError, match="as JSON"):
        read_annotations(write_text(path, json.dumps(content)[:-1]))


def test_a_coco_export_of_label_studio_opens(tmp_path: Path) -> None:
    write_photo(tmp_path / "images" / "a.jpg")
    write_text(tmp_path / "result.json", coco([r"images\a.jpg"], root=False))
    check_one_box(read_annotations(tmp_path), ["cat", "dog"])
