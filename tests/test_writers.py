"""Writing of annotations: what is in the files, and that reading them gives the same table."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

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
from focaldet.evaluation import evaluate_coco
from tests.helpers.annotation_files import write_text
from tests.helpers.annotation_tables import Row, table_of_rows

if TYPE_CHECKING:
    from pathlib import Path

FORMATS: list[Any] = sorted(WRITERS)

ODD = st.text("aB1é名😀 .,;'\"&<>#%-_", min_size=1, max_size=6)
FILE_NAMES = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "b/", "b/c/", "ü d/", "images/"]),
    ODD,
    st.sampled_from([".png", ".jpg", ".PNG"]),
)
CLASS_NAMES = st.lists(
    ODD.map(str.strip).filter(bool), min_size=1, max_size=15, unique_by=str.casefold
)
UNIT = st.floats(0, 1, allow_subnormal=False)


def picture(width: int = 40, height: int = 20) -> bytes:
    """Return a PNG file."""
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = picture()


def table_with_files(
    folder: Path, names: list[str], rows: list[Row], **changes: Any
) -> AnnotationTable:
    """Write 40x20 pictures of these names, and return a table of them with these boxes."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PICTURE)
    return table_of_rows(
        *rows,
        folder=folder,
        files=tuple(names),
        image_sizes=np.array([[20, 40]] * len(names), np.int32).reshape(-1, 2),
        **changes,
    )


def read_again(path: Path, form: str, class_names: tuple[str, ...]) -> AnnotationTable:
    """Read what was written from one table."""
    if form == "coco":
        return read_coco(path / "annotations" / "instances_all.json")
    if form == "yolo":
        return read_yolo(path / "data.yaml", "train")
    if form == "voc":
        return read_voc(path, "all", class_names=class_names)
    if form == "csv":
        return read_csv(path / "all.csv", class_names=path / "classes.csv")
    return read_labelme(path)


def by_image(table: AnnotationTable) -> dict[Path, tuple[list[int], np.ndarray[Any, Any]]]:
    """Return the labels and boxes of each image by its file, to which links lead."""
    rows = [table.boxes_of(index) for index in range(len(table))]
    return {
        table.image_path(index).resolve(): (table.labels[row].tolist(), table.boxes[row])
        for index, row in enumerate(rows)
    }


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    names=st.lists(FILE_NAMES, min_size=1, max_size=5, unique_by=str.casefold),
    class_names=CLASS_NAMES,
    objects=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 14), UNIT, UNIT, UNIT, UNIT), max_size=8
    ),
)
@example(names=["1 .png", "1.png"], class_names=["1"], objects=[])
@pytest.mark.filterwarnings("ignore:.*(no objects|can be learned):UserWarning")
def test_every_format_gives_the_table_back(
    tmp_path_factory: pytest.TempPathFactory,
    names: list[str],
    class_names: list[str],
    objects: list[tuple[int, int, float, float, float, float]],
) -> None:
    root = tmp_path_factory.mktemp("round_trip")
    rows: list[Row] = sorted(
        (
            image % len(names),
            label % len(class_names),
            [min(x1, x2) * 40, min(y1, y2) * 20, max(x1, x2) * 40, max(y1, y2) * 20],
        )
        for image, label, x1, y1, x2, y2 in objects
    )
    table = table_with_files(
        root / "photos",
        names,
        rows,
        class_names=tuple(class_names),
        category_ids=tuple(range(1, len(class_names) + 1)),
    )
    before = by_image(table)
    tolerance = {"coco": 1e-13, "yolo": 6e-8}
    for form in FORMATS:
        write_annotations(table, root / form, form)
        again = read_again(root / form, form, table.class_names)
        assert again.class_names == table.class_names
        after = by_image(again)
        assert after.keys() == before.keys(), form
        for path, (labels, boxes) in after.items():
            assert labels == before[path][0]
            np.testing.assert_allclose(
                boxes, before[path][1], rtol=0, atol=tolerance.get(form, 0), err_msg=form
            )
        if form not in {"yolo", "csv"}:  # their readers take the sizes from the pictures
            assert again.image_sizes.tolist() == table.image_sizes.tolist()


def test_a_coco_file_keeps_everything(tmp_path: Path) -> None:
    rows: list[Row] = [(0, 1, [1, 2, 4, 6]), (0, 0, [0, 0, 9.5, 9]), (2, 1, [5, 5, 5, 8])]
    table = table_with_files(
        tmp_path, ["b/x.png", "y.png", "z.png"], rows, crowd=(1,), areas=np.array([7.5, 90, -1])
    )
    path = write_annotations(table, tmp_path / "new" / "a.JSON", "coco")
    content = json.loads(path.read_text())
    assert content["categories"] == [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}]
    expected = {"id": 11, "file_name": "../b/x.png", "height": 20, "width": 40}
    assert content["images"][0] == expected
    again = read_coco(path)
    for key in ("image_ids", "image_sizes", "category_ids", "boxes", "labels", "crowd"):
        np.testing.assert_array_equal(getattr(again, key), getattr(table, key))
    assert again.annotation_ids.tolist() == [501, 502, 503]
    assert again.areas.tolist() == [7.5, 90, 0]
    assert by_image(again).keys() == by_image(table).keys()
    result = [{"image_id": 11, "category_id": 5, "bbox": [1, 2, 3, 4], "score": 0.5}]
    assert evaluate_coco(path, result).stats[0] > 0


def test_paths_in_coco_and_csv_files_can_be_relative_to_any_folder(tmp_path: Path) -> None:
    table = table_with_files(tmp_path / "photos", ["b/x.png"], [(0, 1, [1, 2, 3, 4])])
    coco = write_annotations(table, tmp_path / "a.json", "coco", image_folder=tmp_path / "photos")
    assert json.loads(coco.read_text())["images"][0]["file_name"] == "b/x.png"
    rows = write_annotations(table, tmp_path / "a.csv", "csv", image_folder=tmp_path)
    assert rows.read_text() == "photos/b/x.png,1,2,3,4,dog\n"
    assert (tmp_path / "a_classes.csv").read_text() == "cat,0\ndog,1\n"


def test_category_ids_that_readers_would_sort_are_replaced(tmp_path: Path) -> None:
    table = table_of_rows((0, 1, [1, 2, 3, 4]), category_ids=(9, 2))
    path = write_annotations(table, tmp_path / "a.json", "coco")
    again = read_coco(path)
    assert (again.class_names, again.category_ids) == (("cat", "dog"), (1, 2))
    assert again.labels.tolist() == [1]


def test_the_text_of_yolo_voc_and_labelme_files(tmp_path: Path) -> None:
    rows: list[Row] = [(0, 1, [10, 5, 30, 15]), (0, 0, [0, 0, 40 / 3, 20])]
    table = table_with_files(tmp_path / "photos", ["x.png", "y.png"], rows)
    yolo = write_annotations(table, tmp_path / "yolo", "yolo")
    assert (yolo / "data.yaml").read_text() == (
        'train: images/train\nnc: 2\nnames:\n  0: "cat"\n  1: "dog"\n'
    )
    text = "1 0.5 0.5 0.5 0.5\n0 0.166666667 0.5 0.333333333 1\n"
    assert (yolo / "labels" / "train" / "x.txt").read_text() == text
    assert (yolo / "labels" / "train" / "y.txt").read_text() == ""
    voc = write_annotations(table, tmp_path / "voc", "voc")
    xml = (voc / "Annotations" / "x.xml").read_text()
    assert "<bndbox><xmin>10</xmin><ymin>5</ymin><xmax>30</xmax><ymax>15</ymax></bndbox>" in xml
    assert "<xmax>13.333333333333334</xmax>" in xml
    assert "<size><width>40</width><height>20</height><depth>3</depth></size>" in xml
    labelme = write_annotations(table, tmp_path / "labelme", "labelme")
    content = json.loads((labelme / "x.json").read_text())
    assert content["imagePath"] == "../photos/x.png"
    assert (content["imageHeight"], content["imageWidth"]) == (20, 40)
    assert content["shapes"][0]["points"] == [[10, 5], [30, 15]]
    assert (labelme / "labels.txt").read_text() == "cat\ndog\n"


def test_class_names_of_yolo_files_are_quoted(tmp_path: Path) -> None:
    names = ('a "b"\\', "no", "1", "\x85\n\x07", "\ufeff😀", "", "1")
    table = table_with_files(
        tmp_path / "photos", ["x.png"], [(0, 2, [1, 2, 3, 4])], class_names=names
    )
    table = replace(table, category_ids=tuple(range(7)))
    write_annotations(table, tmp_path / "yolo", "yolo")
    assert read_yolo(tmp_path / "yolo" / "data.yaml", "train").class_names == names


@pytest.mark.parametrize("form", FORMATS)
def test_crowds_are_kept_or_counted(tmp_path: Path, form: Any) -> None:
    rows: list[Row] = [(0, 0, [1, 1, 9, 9]), (0, 1, [1, 1, 5, 5])]
    table = table_with_files(tmp_path / "photos", ["x.png"], rows, crowd=(0,))
    if form in {"csv", "yolo"}:
        with pytest.warns(
            UserWarning, match=r"cells.json: .*Crowds or difficult objects left out: 1\.$"
        ):
            write_annotations(table, tmp_path / form, form)
        expected = [False]
    else:
        write_annotations(table, tmp_path / form, form)
        expected = [True, False]
    assert read_again(tmp_path / form, form, ("cat", "dog")).crowd.tolist() == expected


@pytest.mark.parametrize("form", FORMATS)
def test_boxes_that_cannot_be_written_are_counted(tmp_path: Path, form: Any) -> None:
    rows: list[Row] = [
        (0, 0, [1, 1, np.nan, 9]),
        (0, 0, [5, 1, 3, 9]),
        (0, -1, [1, 1, 5, 5]),
        (0, 1, [2, 2, 4, 4]),
    ]
    table = table_with_files(tmp_path / "photos", ["x.png"], rows, areas=np.array([1, 1, 1, 3]))
    counts = (
        "Boxes left out that are not finite or have a negative size: 2; boxes of an undeclared "
        "category left out: 1"
    )
    lost = "" if form == "coco" else "; areas of outlines replaced by those of boxes: 1"
    with pytest.warns(
        UserWarning, match=f"{WRITERS[form].NAME} files as they are. {counts}{lost}\\."
    ):
        write_annotations(table, tmp_path / form, form)
    again = read_again(tmp_path / form, form, ("cat", "dog"))
    np.testing.assert_allclose(again.boxes, [[2, 2, 4, 4]])


def test_yolo_boxes_are_clipped(tmp_path: Path) -> None:
    rows: list[Row] = [(0, 0, [-5, 1, 10, 30]), (0, 0, [50, 1, 60, 9]), (0, 1, [3, 3, 3, 9])]
    table = table_with_files(tmp_path / "photos", ["x.png"], rows)
    counts = "Boxes outside their image left out: 1; boxes clipped to their image: 1\\.$"
    with pytest.warns(UserWarning, match=counts):
        write_annotations(table, tmp_path / "yolo", "yolo")
    boxes = read_yolo(tmp_path / "yolo" / "data.yaml", "train").boxes
    np.testing.assert_allclose(boxes, [[0, 1, 10, 20], [3, 3, 3, 9]], atol=1e-7)


def test_image_sizes_are_read_from_the_pictures_or_counted(tmp_path: Path) -> None:
    unknown = np.zeros((2, 2), np.int32)
    table = table_with_files(tmp_path, ["x.png", "y.png"], [(0, 0, [1, 2, 3, 4])])
    table = replace(table, image_sizes=unknown)
    path = write_annotations(table, tmp_path / "a.json", "coco")
    assert read_coco(path).image_sizes.tolist() == [[20, 40]] * 2
    (tmp_path / "y.png").unlink()
    with pytest.warns(UserWarning, match="Images without a known size, written as 0x0: 1"):
        write_annotations(table, tmp_path / "b.json", "coco")
    assert read_coco(tmp_path / "b.json").image_sizes.tolist() == [[20, 40], [0, 0]]
    forms: list[Any] = ["voc", "labelme"]
    for form in forms:
        with pytest.warns(UserWarning, match="Images without a known size: 1"):
            write_annotations(table, tmp_path / form, form, image_files="keep")
    with pytest.raises(FileNotFoundError, match="y.png.*not annotated, and the format needs it"):
        write_annotations(table, tmp_path / "yolo", "yolo", image_files="keep")


def test_yolo_refuses_a_size_that_is_not_that_of_the_picture(tmp_path: Path) -> None:
    table = table_with_files(tmp_path / "photos", ["x.png"], [(0, 0, [1, 2, 3, 4])])
    (tmp_path / "photos" / "x.png").write_bytes(picture(20, 40))
    with pytest.raises(
        ValueError, match=r"x.png' is 40x20 \(height x width\), but annotated as 20x40"
    ):
        write_annotations(table, tmp_path / "yolo", "yolo")
    assert not (tmp_path / "yolo").exists()


def test_several_splits_are_one_dataset(tmp_path: Path) -> None:
    rows: list[Row] = [(0, 0, [1, 2, 3, 4]), (1, 1, [1, 2, 3, 4])]
    table = table_with_files(tmp_path / "photos", ["x.png", "y.png", "z.png"], rows)
    splits = {"train": table.select([0, 2]), "val": table.select([1])}
    out = {form: write_annotations(splits, tmp_path / form, form) for form in FORMATS}
    tables = [
        read_coco(out["coco"] / "annotations" / "instances_val.json"),
        read_yolo(out["yolo"] / "data.yaml", "val"),
        read_voc(out["voc"], "val", class_names=["cat", "dog"]),
        read_csv(out["csv"] / "val.csv", class_names=out["csv"] / "classes.csv"),
        read_labelme(out["labelme"], "val"),
    ]
    for one in tables:
        assert [one.image_path(0).resolve()] == [tmp_path / "photos" / "y.png"]
        assert (one.class_names, one.labels.tolist()) == (("cat", "dog"), [1])


def test_splits_of_pascal_voc_share_images(tmp_path: Path) -> None:
    table = table_with_files(tmp_path / "photos", ["x.png", "y.png"], [(0, 0, [1, 2, 3, 4])])
    splits = {"train": table.select([0]), "trainval": table}
    write_annotations(splits, tmp_path / "voc", "voc")
    assert len(list((tmp_path / "voc" / "Annotations").iterdir())) == 2
    assert (tmp_path / "voc" / "ImageSets" / "Main" / "trainval.txt").read_text() == "x\ny\n"
    other = replace(splits["train"], boxes=splits["train"].boxes + 1)
    with pytest.raises(ValueError, match="x.png' is listed twice with different annotations"):
        write_annotations({**splits, "train": other}, tmp_path / "voc2", "voc")


def test_splits_of_yolo_get_the_names_that_programs_look_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = table_with_files(tmp_path / "photos", ["x.png"], [(0, 0, [1, 2, 3, 4])])
    tables = {"train2017": table, "val": table, "minival": table}
    write_annotations(tables, tmp_path / "yolo", "yolo")
    text = (tmp_path / "yolo" / "data.yaml").read_text()
    assert text.startswith("train: images/train\nval: images/val\nminival: images/minival\nnc:")
    assert "'train2017' is written as 'train'" in caplog.text
    assert "unlike train, val and test: 'minival'" in caplog.text
    with pytest.raises(ValueError, match="'names' cannot have this name in data.yaml"):
        write_annotations({"names": table}, tmp_path / "yolo2", "yolo")


def test_labelme_files_can_be_written_next_to_the_images(tmp_path: Path) -> None:
    table = table_with_files(tmp_path, ["x.png"], [(0, 0, [1, 2, 3, 4])])
    write_text(tmp_path / "notes.txt", "mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        write_annotations(table, tmp_path, "labelme")
    write_annotations(table, tmp_path, "labelme", overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert read_labelme(tmp_path).file_names[0] == "x.png"
