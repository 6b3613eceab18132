from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from focaldet.datasets import read_annotations, read_coco, read_voc

BCCD = Path(__file__).parents[2] / "shared" / "data" / "bccd"
BCCD_NAMES = ["RBC", "WBC", "Platelets"]

real = pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD set is not beside this checkout")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def photo(path: Path, size: tuple[int, int] = (40, 20), **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **options)
    return path


def yolo_folder(
    root: Path, label: str = "", yaml: str = "train: images/train\nnames: [cat, dog]\n"
) -> Path:
    photo(root / "images" / "train" / "a.png")
    write(root / "labels" / "train" / "a.txt", label)
    return write(root / "data.yaml", yaml)


def voc_object(name: str, box: tuple[float | str, ...], extra: str = "") -> str:
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=False)
    inside = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
    return f"<object><name>{name}</name>{extra}<bndbox>{inside}</bndbox></object>"


def voc_folder(root: Path, **files: str) -> Path:
    """Write a VOC folder with these XML files, all in the split "all"."""
    (root / "JPEGImages").mkdir(parents=True)
    for name, inside in files.items():
        write(root / "Annotations" / f"{name}.xml", f"<annotation>{inside}</annotation>")
    write(root / "ImageSets" / "Main" / "all.txt", "\n".join(files) + "\n\n")
    return root


SIZE = "<size><width>40</width><height>20</height><depth>3</depth></size>"


def test_a_voc_folder_by_hand(tmp_path: Path) -> None:
    hard = "<difficult>1</difficult>"
    part = "<part><name>head</name><bndbox><xmin>9</xmin></bndbox></part>"
    root = voc_folder(
        tmp_path,
        b=SIZE + voc_object("dog", (1, 2, 11, 12)) + voc_object("cat", (5.5, 6, 7, 8), hard + part),
        a="",
    )
    photo(root / "JPEGImages" / "b.png")
    table = read_voc(root, "all")
    assert list(table.file_names) == ["b.png", "a.jpg"]  # one that is missing has VOC's suffix
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


def test_voc_names_come_from_all_splits_or_are_given(tmp_path: Path) -> None:
    root = voc_folder(
        tmp_path, a=voc_object("dog", (1, 2, 3, 4)), b=voc_object("cat", (1, 2, 3, 4))
    )
    write(root / "ImageSets" / "Main" / "one.txt", "a")
    assert read_voc(root, "one").labels.tolist() == [1]
    assert read_voc(root, "all", class_names=["x", "cat"]).labels.tolist() == [-1, 1]


@real
@pytest.mark.parametrize("split", ["train", "val", "trainval", "test"])
def test_voc_and_coco_form_of_the_bccd_set_agree(split: str) -> None:
    voc = read_voc(BCCD / "voc", split, class_names=BCCD_NAMES)
    coco = read_coco(BCCD / "coco" / f"{split}.json", BCCD / "voc" / "JPEGImages", cache=False)
    assert list(voc.file_names) == list(coco.file_names)
    assert voc.class_names == coco.class_names
    np.testing.assert_array_equal(voc.image_sizes, coco.image_sizes)
    x1, y1, x2, y2 = voc.boxes.T
    whole = (x2 > x1) & (y2 > y1)  # the COCO form lacks two without area
    assert len(whole) - whole.sum() == {"train": 1, "val": 1, "trainval": 2, "test": 0}[split]
    for name in ("boxes", "labels", "areas", "image_indices"):
        np.testing.assert_array_equal(getattr(voc, name)[whole], getattr(coco, name), err_msg=name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "<annotation><object>",
            "`annotations` must be an XML file; got '.*a.xml' \\(no element found",
        ),
        ("", "`annotations` must be an XML file; got '.*a.xml'"),
        ('<?xml version="1.0" encoding="martian"?><a/>', "`annotations` must be an XML file"),
        (voc_object("x", (1, 2, 3)), "`ymax` must be a number; got None in object 1 of '.*a.xml'"),
        (voc_object("x", (1, "two", 3, 4)), "`ymin` must be a number; got 'two' in object 1 of"),
        (
            "<a>" + "<object><name>x</name></object></a>",
            "`xmin` must be a number; got None in object 1",
        ),
        (
            voc_object("", (1, 2, 3, 4)),
            "`name` must be given; got nothing for object 1 of '.*a.xml'",
        ),
        (
            "<a><size><width>wide</width></size></a>",
            "`width` must be a number; got 'wide' in size of",
        ),
    ],
)
def test_wrong_xml_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    root = voc_folder(tmp_path, a="")
    text = (
        text.replace("<object>", "<annotation><object>", 1) + "</annotation>"
        if text[:2] == "<o"
        else text
    )
    write(root / "Annotations" / "a.xml", text)
    with pytest.raises(ValueError, match=message):
        read_voc(root, "all", class_names=["x"])


def test_missing_parts_of_a_voc_folder_are_named(tmp_path: Path) -> None:
    root = voc_folder(tmp_path / "voc", a="")
    with pytest.raises(
        FileNotFoundError, match="`split` must be a split .* got 'train'.*Splits there: all"
    ):
        read_voc(root, "train")
    write(root / "ImageSets" / "Main" / "more.txt", "a\nnone")
    with pytest.raises(FileNotFoundError, match="an existing file; got '.*none.xml'. Every image"):
        read_voc(root, "more")
    (root / "JPEGImages").rmdir()
    with pytest.raises(FileNotFoundError, match="`root` must be a folder with JPEGImages"):
        read_voc(root, "all")


BOXES = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        *[st.floats(0, 1, allow_subnormal=False)] * 4,
        st.sampled_from(["cat", "dog"]),
    ),
    max_size=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=BOXES)
def test_the_forms_give_the_same_table(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    root = tmp_path_factory.mktemp("forms")
    names = ["cat", "dog"]
    voc: dict[str, str] = dict.fromkeys("abc", SIZE)
    yolo: dict[str, list[str]] = {name: [] for name in voc}
    csv = [f"images/{name}.png,,,,," for name in voc]
    for image, x1, y1, x2, y2, name in rows:
        box = (x1 * 40, y1 * 20, x2 * 40, y2 * 20)
        voc[image] += voc_object(name, box)
        sides = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
        yolo[image].append(" ".join(map(repr, (names.index(name), *sides))))
        csv.append(f"images/{image}.png,{','.join(map(repr, box))},{name}")
    voc_folder(root / "voc", **voc)
    for image, lines in yolo.items():
        photo(root / "images" / f"{image}.png")
        write(root / "labels" / f"{image}.txt", "\n".join(lines))
    write(root / "data.yaml", "train: images\nnames: [cat, dog]")
    tables = [
        read_annotations(root / "voc", split="all", class_names=names),
        read_annotations(root / "data.yaml", split="train"),
        read_annotations(write(root / "train.csv", "\n".join(csv)), class_names=names),
    ]
    for table in tables[1:]:
        assert [Path(name).stem for name in table.file_names] == ["a", "b", "c"]
        np.testing.assert_allclose(table.boxes, tables[0].boxes, atol=1e-9)
        for key in ("labels", "image_indices", "image_ids", "annotation_ids", "category_ids"):
            np.testing.assert_array_equal(getattr(table, key), getattr(tables[0], key))


def test_the_form_is_recognised(tmp_path: Path) -> None:
    yolo = yolo_folder(tmp_path / "yolo", "0 0.5 0.5 1 1")
    assert len(read_annotations(yolo.parent, split="train")) == 1
    empty = '{"images": [], "annotations": [], "categories": []}'
    write(tmp_path / "coco" / "annotations" / "instances_val2017.json", empty)
    assert len(read_annotations(tmp_path / "coco", split="val2017")) == 0
    path = write(tmp_path / "some.json", empty)
    assert read_annotations(path, tmp_path / "coco").image_folder == tmp_path / "coco"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.json", {"split": "train"}, "`split` must be left out for a COCO file.*; got 'train'"),
        ("a.json", {"class_names": ["x"]}, "`class_names` must be left out for COCO"),
        (
            "a.yaml",
            {},
            "`split` must be given for this form; got none for '.*a.yaml'. It names one",
        ),
        ("a.yml", {"images": "x", "split": "train"}, "`images` must be left out for YOLO"),
        ("a.csv", {"split": "train"}, "`split` must be left out for CSV"),
        ("a.txt", {}, "`path` must be a COCO file .*; got '.*a.txt'"),
        ("", {}, "`path` must be a COCO file"),
    ],
)
def test_what_does_not_fit_the_form_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    if name:
        write(tmp_path / name, "")
    with pytest.raises(ValueError, match=message):
        read_annotations(tmp_path / name, **options)


def test_annotations_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="`path` must be an existing file or folder; got '.*no'"
    ):
        read_annotations(tmp_path / "no")
    for name in ("instances_train2017", "instances_val2017", "captions_val2017"):
        write(tmp_path / "coco" / "annotations" / f"{name}.json", "")
    message = (
        "`split` must be a split of the data set; got 'val', but there is no '.*instances_val.json'. "
        "Splits there: train2017, val2017."
    )
    with pytest.raises(FileNotFoundError, match=message):
        read_annotations(tmp_path / "coco", split="val")
