"""Readers report every problem, count what they reinterpret, and warn about data without objects."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from focaldet.cli import main
from focaldet.datasets import (
    AnnotationTable,
    DetectionDataset,
    check_dataset,
    read_annotations,
    read_coco,
    read_csv,
    read_voc,
    read_yolo,
)
from focaldet.errors import AnnotationError, UnreadableImageError
from tests.helpers.annotation_files import (
    VOC_SIZE,
    voc_object,
    write_photo,
    write_text,
    write_voc_folder,
    write_yolo_folder,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

GOOD = voc_object("cat", (1, 2, 11, 12))
BOX = "0 0.5 0.5 0.4 0.4"


def coco_file(path: Path, **changes: Any) -> Path:
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 20}],
        "annotations": [{"id": 5, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    return write_text(path, json.dumps({**content, **changes}))


def damaged_yolo(root: Path) -> tuple[Path, set[str]]:
    path = write_yolo_folder(root, f"{BOX}\n0 1\nx\n")
    for name in ("b", "c"):
        write_text(root / "images" / "train" / f"{name}.png", "no image")
        write_text(root / "labels" / "train" / f"{name}.txt", "0 0 0\n")
    write_photo(root / "images" / "train" / "d.png")
    (root / "labels" / "train" / "d.txt").write_bytes(b"\n\xe9")
    places = {"a.txt', line 2", "a.txt', line 3", "b.txt', line 1", "c.txt', line 1", "b.png"}
    return path, places | {"c.png", "d.txt' as UTF-8 text: line 2"}


def damaged_voc(root: Path) -> tuple[Path, set[str]]:
    wrong = voc_object("cat", (1, "two", 3, 4)) + voc_object("", (1, 2, 3, 4))
    write_voc_folder(
        root, a=VOC_SIZE + GOOD + wrong + GOOD, b="", c="", d="<size><width>x</width></size>"
    )
    for name in "abcd":
        write_photo(root / "JPEGImages" / f"{name}.png")
    write_text(root / "Annotations" / "b.xml", "<annotation>")
    (root / "Annotations" / "c.xml").unlink()
    write_text(root / "Annotations" / "other.xml", "")
    return root, {
        *("a.xml', object 2", "a.xml', object 3", "b.xml' as XML", "c.xml'. Every image"),
        *("d.xml', size", "other.xml' as XML"),
    }


def damaged_coco(root: Path) -> tuple[Path, set[str]]:
    write_photo(root / "a.png")
    good: dict[str, Any] = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
    changes: list[dict[str, Any]] = [
        *({}, {"image_id": 9}, {"bbox": [1, 2]}, {"image_id": None}, {"image_id": 8}, {}),
    ]
    annotations: list[Any] = [
        {"id": index, **good, **change} for index, change in enumerate(changes)
    ]
    images = [
        {"id": 1, "file_name": "a.png", "width": 40, "height": 20},
        {"id": 2, "file_name": "a.png", "width": "wide"},
        {"id": 1, "file_name": "b.png"},
    ]
    path = coco_file(root / "c.json", images=images, annotations=[*annotations, 7])
    places = {f"annotations[{index}]" for index in (1, 2, 3, 4, 6)}
    return path, places | {"images[1]", "images[2]"}


def damaged_csv(root: Path) -> tuple[Path, set[str]]:
    write_photo(root / "a.png")
    rows = [
        "a.png,1,2,3,4,cat",
        "a.png,1,2,3",
        "a.png,1,2,three,4,cat",
        "a.png,1,2,3,4,",
        ",1,2,3,4,cat",
    ]
    return write_text(root / "t.csv", "\n".join(rows)), {f"line {line}:" for line in (2, 3, 4, 5)}


DAMAGED = {"yolo": damaged_yolo, "voc": damaged_voc, "coco": damaged_coco, "csv": damaged_csv}


@pytest.mark.parametrize("form", DAMAGED)
def test_every_problem_is_reported_once_and_the_rest_is_read(tmp_path: Path, form: str) -> None:
    path, places = DAMAGED[form](tmp_path)
    split = {"yolo": "train", "voc": "all"}.get(form)
    problems: list[Exception] = []
    table = read_annotations(path, split=split, report=problems.append)
    messages = [str(problem) for problem in problems]
    for place in places:
        assert len([message for message in messages if place in message]) == 1, (place, messages)
    assert len(messages) == len(places)
    assert len(table.boxes) == {"yolo": 1, "voc": 2, "coco": 2, "csv": 1}[form]
    with pytest.raises((AnnotationError, UnreadableImageError, FileNotFoundError)):
        read_annotations(path, split=split)


@pytest.mark.parametrize("form", DAMAGED)
def test_the_command_lists_every_problem_and_exits_with_1(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, places = DAMAGED[form](tmp_path)
    split = {"yolo": ["--split", "train"], "voc": ["--split", "all"]}.get(form, [])
    assert main(["check", str(path), *split, "--json", str(tmp_path / "report.json")]) == 1
    printed = capsys.readouterr()
    assert printed.err == ""
    assert all(place in printed.out for place in places)
    counts = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["counts"]
    assert counts.get("image-unreadable", 0) == (2 if form == "yolo" else 0)
    assert counts["annotation-unreadable"] == len(places) - counts.get("image-unreadable", 0)


NOTHING: dict[str, dict[str, Any]] = {
    "no objects": {"annotations": []},
    "no images": {"images": [], "annotations": []},
    "1 crowd": {
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 1}]
    },
    "1 of an undeclared": {
        "annotations": [{"image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 4]}]
    },
    "1 not finite or without area": {
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 0, 4]}]
    },
    "1 outside": {"annotations": [{"image_id": 1, "category_id": 1, "bbox": [50, 2, 3, 4]}]},
}


@pytest.mark.parametrize("reason", NOTHING)
def test_a_file_without_an_object_to_learn_from_is_an_error_of_the_check(
    tmp_path: Path, reason: str
) -> None:
    path = coco_file(tmp_path / "c.json", **NOTHING[reason])
    with pytest.warns(UserWarning, match=f"c.json: .*{reason}"):
        table = read_coco(path)
    report = check_dataset(table, images="none")
    assert report.counts["nothing-to-learn"] == 1
    assert reason in report.findings[0].message
    assert not report.ok


def read_without_objects(form: str, root: Path) -> AnnotationTable:
    if form == "voc":
        return read_voc(
            write_voc_folder(root, a=GOOD.replace("<bndbox>", "<difficult>1</difficult><bndbox>")),
            "all",
        )
    if form == "csv":
        return read_csv(write_text(root / "t.csv", ""))
    return read_yolo(write_yolo_folder(root, "\n"), "train")


@pytest.mark.parametrize("form", ["voc", "csv", "yolo"])
def test_every_reader_warns_about_a_dataset_without_objects(tmp_path: Path, form: str) -> None:
    with pytest.warns(UserWarning, match="no images|no objects|1 crowd or difficult") as caught:
        table = read_without_objects(form, tmp_path)
    assert len(caught) == 1
    assert check_dataset(table, images="none").counts["nothing-to-learn"] == 1


def read_with_empty_images(
    form: str, root: Path, empty: int, report: Callable[[Exception], object] | None = None
) -> AnnotationTable:
    """Read three images, of which the first ones have no objects."""
    names = ["a", "b", "c"]
    if form == "coco":
        for name in names:
            write_photo(root / f"{name}.png")
        images = [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate(names)]
        annotations = [
            {"image_id": i, "category_id": 1, "bbox": [1, 2, 3, 4]} for i in range(empty, 3)
        ]
        path = coco_file(root / "c.json", images=images, annotations=annotations)
        return read_coco(path, report=report)
    if form == "csv":
        objects = [",,,,," if i < empty else ",1,2,3,4,cat" for i in range(3)]
        rows = "\n".join(f"{name}.png{rest}" for name, rest in zip(names, objects, strict=True))
        return read_csv(write_text(root / "t.csv", rows), report=report)
    contents = {name: "" if i < empty else GOOD for i, name in enumerate(names)}
    return read_voc(write_voc_folder(root, **contents), "all", report=report)


@pytest.mark.parametrize("form", ["coco", "csv", "voc"])
def test_images_without_objects_are_counted_in_the_log(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    read_with_empty_images(form, tmp_path / "all", 0)
    assert caplog.messages == []
    read_with_empty_images(form, tmp_path / "some", 1)
    [record] = caplog.records
    assert record.name.startswith("focaldet.")
    expected = rf"{re.escape(str(tmp_path))}.*: Some images have no objects \(1 of 3\).* a\.[jp]"
    assert re.match(expected, record.getMessage())
    caplog.clear()
    problems: list[Exception] = []
    read_with_empty_images(form, tmp_path / "reported", 1, problems.append)
    assert (problems, caplog.messages) == ([], [])  # the checker lists these images


@pytest.mark.parametrize("form", ["coco", "csv", "voc"])
def test_most_images_without_objects_are_a_warning(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = r"Most images have no objects \(2 of 3\) and .*If they should have objects, "
    with pytest.warns(UserWarning, match=expected):
        read_with_empty_images(form, tmp_path / "warned", 2)
    problems: list[Exception] = []
    table = read_with_empty_images(form, tmp_path / "reported", 2, problems.append)
    [problem] = problems
    assert re.search(expected, str(problem))
    counts = check_dataset(table, images="none", problems=problems).counts
    assert (counts["annotation-doubtful"], counts["image-empty"]) == (1, 2)
    assert caplog.messages == []


def test_images_listed_twice_are_reported(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    write_photo(tmp_path / "a.png")
    path = coco_file(tmp_path / "c.json", images=[{"id": 1, "file_name": "a.png"}] * 2)
    problems: list[Exception] = []
    read_coco(path, report=problems.append)
    [problem] = problems
    assert isinstance(problem, UserWarning)
    assert "images[1] (id 1)" in str(problem)
    assert not recwarn.list


def test_objects_outside_images_of_unannotated_size_cannot_be_learned_from(
    tmp_path: Path,
) -> None:
    write_photo(tmp_path / "a.png")
    table = read_csv(write_text(tmp_path / "t.csv", "a.png,50,2,60,4,cat\na.png,1,1,1,9,cat\n"))
    assert table.why_nothing_to_learn() == ""
    expected = r"None of 2 .*\(1 not finite or without area, 1 outside their image\)"
    assert re.match(expected, table.why_nothing_to_learn(np.array([[20, 40]], np.int32)))


@pytest.mark.filterwarnings("ignore:Dropped")
def test_a_box_without_area_in_single_precision_cannot_be_learned_from(tmp_path: Path) -> None:
    write_photo(tmp_path / "a.png")
    thin = [{"image_id": 1, "category_id": 1, "bbox": [10, 2, 1e-9, 4]}]
    with pytest.warns(UserWarning, match=r"None of 1 object .*\(1 not finite or without area\)"):
        table = read_coco(coco_file(tmp_path / "c.json", annotations=thin))
    assert DetectionDataset(table).num_objects == 0


def test_images_without_label_files_are_counted_and_the_first_is_explained(tmp_path: Path) -> None:
    path = write_yolo_folder(tmp_path, BOX)
    for name in ("b", "c"):
        write_photo(tmp_path / "images" / "train" / f"{name}.png")
    expected = "objects: 2. .*b.png'; looked for '.*labels/train/b.txt' and '.*images/train/b.txt'"
    with pytest.warns(UserWarning, match=expected) as caught:
        read_yolo(path, "train")
    assert caught[0].filename == __file__
    write_text(tmp_path / "labels" / "train" / "b.txt", "")
    write_text(tmp_path / "labels" / "train" / "c.txt", "")
    read_yolo(path, "train")


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/train/a.png", "labels/train/a.txt"),
        ("images/train/images/a.png", "images/train/labels/a.txt"),
        ("images/train/images/a.png", "labels/train/images/a.txt"),
        ("Images/a.PNG", "Labels/a.TXT"),
        ("IMAGES/a.png", "labels/a.txt"),
        ("image/a.png", "label/a.txt"),
        ("images/a.png", "images/a.txt"),
        ("photos/a.png", "photos/a.TXT"),
        ("images/deep/er/a.png", "labels/deep/er/a.txt"),
    ],
)
def test_label_files_are_found_in_the_usual_places(tmp_path: Path, image: str, label: str) -> None:
    root = tmp_path / "images" / "set"  # a folder "images" above the dataset does not mislead
    write_photo(root / image)
    write_text(root / label, BOX)
    path = write_text(root / "data.yaml", f"train: {Path(image).parts[0]}\nnames: [cat]")
    assert len(read_yolo(path, "train").boxes) == 1


def test_images_behind_a_link_are_read_with_their_labels(tmp_path: Path) -> None:
    write_photo(tmp_path / "disk" / "images" / "a.png")
    write_text(tmp_path / "disk" / "labels" / "a.txt", BOX)
    for name in ("images", "labels"):
        (tmp_path / "set" / name).mkdir(parents=True)
        link = tmp_path / "set" / name / "train"
        link.symlink_to(tmp_path / "disk" / name, target_is_directory=True)
    path = write_text(tmp_path / "set" / "data.yaml", "train: images\nnames: [cat]")
    table = read_yolo(path, "train")
    assert list(table.file_names) == ["images/train/a.png"]
    assert len(table.boxes) == 1


def yolo_with(root: Path, lines: str, extra: str = "") -> Path:
    return write_yolo_folder(root, lines, f"train: images/train\nnames: [cat, dog]\n{extra}")


POSE_2D = "0 .5 .5 .4 .4 .35 .35 .6 .6\n"  # two keypoints; also an outline of four points
POSE_3D = "0 .5 .5 .4 .4 .35 .35 2 .6 .6 1\n"


def test_keypoints_that_the_data_file_declares_are_left_out(tmp_path: Path) -> None:
    for name, lines, extra in (
        ("2d", POSE_2D, "kpt_shape: [2, 2]"),
        ("3d", POSE_3D, "kpt_shape: [2, 3]"),
        ("box", BOX, "kpt_shape: [2, 3]"),
    ):
        table = read_yolo(yolo_with(tmp_path / name, lines, extra), "train")
        assert table.boxes.tolist() == [pytest.approx([12, 6, 28, 14])]


@pytest.mark.parametrize("lines", [POSE_3D, "0 .5 .5 .4 .4 .5 .5 1\n"])
def test_keypoints_with_visibility_are_recognised_and_counted(tmp_path: Path, lines: str) -> None:
    with pytest.warns(UserWarning, match="keypoints, of which only the box is used: 2.*kpt_shape"):
        table = read_yolo(yolo_with(tmp_path, lines * 2), "train")
    assert table.boxes[0].tolist() == pytest.approx([12, 6, 28, 14])


def test_numbers_that_may_be_keypoints_or_an_outline_are_an_error(tmp_path: Path) -> None:
    path = yolo_with(tmp_path, BOX + "\n" + POSE_2D)
    with pytest.raises(AnnotationError, match=r"a.txt', line 2: 8 values .*\[2, 2\].*\[0, 0\]"):
        read_yolo(path, "train")
    table = read_yolo(yolo_with(tmp_path / "outlines", POSE_2D, "kpt_shape: [0, 0]"), "train")
    assert table.boxes.tolist() == [pytest.approx([14, 7, 24, 12])]
    other = "0 .1 .1 .3 .1 .2 .3\n"  # outlines have different numbers of points
    assert len(read_yolo(yolo_with(tmp_path / "both", POSE_2D + other), "train").boxes) == 2


def test_lines_that_do_not_fit_the_declared_keypoints_are_errors(tmp_path: Path) -> None:
    path = yolo_with(tmp_path, POSE_2D, "kpt_shape: [17, 3]")
    with pytest.raises(AnnotationError, match=r"line 1: kpt_shape \[17, 3\].*requires 55.*got 8"):
        read_yolo(path, "train")


@pytest.mark.parametrize(
    "shape", ["5", "[5]", "[5, 4]", "[-1, 2]", "[a, 2]", "[0.5, 2]", "[99999, 2]"]
)
def test_a_wrong_kpt_shape_is_an_error(tmp_path: Path, shape: str) -> None:
    with pytest.raises(AnnotationError, match=r"kpt_shape in '.*data.yaml' must be"):
        read_yolo(yolo_with(tmp_path, BOX, f"kpt_shape: {shape}"), "train")


def test_oriented_boxes_are_counted_and_upright_ones_are_exact(tmp_path: Path) -> None:
    rotated = "0 .25 .25 .5 .75 .375 1 .125 .5\n"  # right angles in pixels of the 40x20 image
    upright = "1 .1 .1 .3 .1 .3 .3 .1 .3\n"
    with pytest.warns(UserWarning, match="oriented boxes, replaced .*: 1"):
        table = read_yolo(yolo_with(tmp_path, rotated + upright), "train")
    assert table.boxes.tolist() == [pytest.approx([5, 5, 20, 20]), pytest.approx([4, 2, 12, 6])]


def test_hidden_files_are_not_read(tmp_path: Path) -> None:
    yolo = write_yolo_folder(tmp_path / "yolo", BOX)
    write_photo(yolo.parent / "images" / "train" / ".ipynb_checkpoints" / "a-checkpoint.png")
    write_text(yolo.parent / "images" / "train" / "._a.png", "")
    write_text(yolo.parent / "images" / "__MACOSX" / "a.png", "")
    assert list(read_yolo(yolo, "train").file_names) == ["images/train/a.png"]
    voc = write_voc_folder(tmp_path / "voc", a=GOOD)
    write_photo(voc / "JPEGImages" / "a.jpg")
    for name in ("Annotations/._a.xml", "JPEGImages/._a.jpg", "ImageSets/Main/._all.txt"):
        write_text(voc / name, "\0")
    assert read_voc(voc, "all").class_names == ("cat",)
    with pytest.raises(FileNotFoundError, match="only split is 'all'"):
        read_voc(voc, "dev")


def test_an_empty_difficult_is_0_and_an_upper_case_xml_is_found(tmp_path: Path) -> None:
    root = write_voc_folder(tmp_path, a=GOOD.replace("<bndbox>", "<difficult/><bndbox>"))
    (root / "Annotations" / "a.xml").rename(root / "Annotations" / "a.XML")
    assert read_voc(root, "all").crowd.tolist() == [False]


@pytest.mark.parametrize("form", ["data.yaml", "labels/train/a.txt", "t.csv", "names.csv", "a.xml"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_may_be_in_utf_16_if_they_say_so(tmp_path: Path, form: str, encoding: str) -> None:
    path = write_yolo_folder(tmp_path, BOX)
    write_text(tmp_path / "t.csv", "images/train/a.png,1,2,3,4,cat")
    write_text(tmp_path / "names.csv", "cat,0")
    voc = write_voc_folder(tmp_path / "voc", a=GOOD)
    file = voc / "Annotations" / "a.xml" if form == "a.xml" else tmp_path / form
    file.write_bytes(file.read_text(encoding="utf-8").encode(encoding))
    for table in (
        read_yolo(path, "train"),
        read_csv(tmp_path / "t.csv", class_names=tmp_path / "names.csv"),
        read_voc(voc, "all"),
    ):
        assert table.labels.tolist() == [0]


def test_escape_sequences_of_names_never_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "\x1b[2J\x9b1m\n\u202e\ud800"
    path = coco_file(
        tmp_path / "c.json",
        images=[{"id": 1, "file_name": f"{name}.png", "width": 0}],
        annotations=[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 0, 4]}],
        categories=[{"id": 1, "name": name}],
    )
    assert main(["check", str(path), "--json", str(tmp_path / "report.json")]) == 1
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["classes"][0]["name"] == name
    assert main(["check", str(tmp_path / "\x1b[2J.json")]) == 2
    printed = capsys.readouterr()
    assert r"\x1b[2J\x9b1m\n\u202e\ud800" in printed.out
    assert not {"\x1b", "\x9b", "\u202e", "\ud800"} & set(printed.out + printed.err)


ODD = "\x1b[31m\n\u202e"


def coco_with_odd_names(root: Path, **changes: Any) -> Path:
    """Write a COCO file with an odd name in every place that has one."""
    write_photo(root / f"{ODD}.png")
    content = {
        "images": [{"id": 1, "file_name": f"{ODD}.png", "width": 40, "height": 20}],
        "categories": [{"id": 1, "name": ODD}],
    }
    return coco_file(root / f"{ODD}.json", **{**content, **changes})


def wrong_coco(root: Path) -> Iterator[Callable[[], object]]:
    box = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
    images = [{"id": one, "file_name": f"{ODD}{one}.png"} for one in (1, 2, 3)]
    changes: list[dict[str, Any]] = [
        {"annotations": []},
        {"annotations": [{**box, "category_id": 2}]},
        {"annotations": [{**box, "category_id": 2}, box]},
        {"annotations": [box, {**box, "bbox": [1, 2, -1, 4]}]},
        {"annotations": [{**box, "image_id": ODD, "id": ODD}]},
        {"annotations": [{**box, ODD: ODD, "bbox": ODD}]},
        {"categories": [{"id": 1, "name": {ODD: ODD}}]},
        {"categories": ODD},
        {"images": [images[0], {**images[0], "file_name": "b"}]},
        {"images": [images[0], images[0]]},
        {"images": [{"id": 1}]},
        {"images": images},
    ]
    for number, change in enumerate(changes):
        folder = root / f"{number}{ODD}"

        def read(folder: Path = folder, change: dict[str, Any] = change) -> None:
            table = read_coco(coco_with_odd_names(folder, **change))
            table.to_coco()
            DetectionDataset(table)[0]

        yield read
    yield lambda: read_coco(root / f"{ODD}.json")
    yield lambda: read_coco(coco_with_odd_names(root), root / ODD)
    yield lambda: DetectionDataset(
        read_coco(coco_with_odd_names(root / "raise", annotations=[{**box, "bbox": [0, 0, 0, 1]}])),
        invalid_boxes="raise",
    )


def wrong_csv(root: Path) -> Iterator[Callable[[], object]]:
    quoted = f'"{ODD}"'
    for number, row in enumerate(
        [
            f"{quoted},1,2",
            f"{quoted},1,2,{quoted},4,cat",
            f"{quoted},1,2,3,4,",
            f"{quoted},,,,,",
            f"{quoted},,,,,\nb.png,,,,,\nc.png,1,2,3,4,{quoted}",
            f"{quoted},1,2,3,4,{quoted}",
        ]
    ):
        path = write_text(root / f"{ODD}{number}.csv", f"{row}\n")
        yield lambda path=path: DetectionDataset(read_csv(path))  # type: ignore[misc]
    for number, row in enumerate([f"{quoted},x", f"{quoted},0\n{quoted},1", f"{quoted},7"]):
        names = write_text(root / f"{ODD}names{number}.csv", row)
        yield lambda path=path, names=names: read_csv(path, class_names=names)  # type: ignore[misc]
    yield lambda: read_csv(path, class_names=ODD)
    yield lambda: read_csv(path, root / ODD)
    write_text(root / f"{ODD}latin.csv", "").write_bytes(b"\xe9")
    yield lambda: read_csv(root / f"{ODD}latin.csv")


def wrong_voc(root: Path) -> Iterator[Callable[[], object]]:
    name = ODD.replace("\n", "\t").replace("\x1b", "\x7f")  # XML cannot contain the original
    for number, inside in enumerate(
        [
            voc_object(f"{name}x", (1, 2, name, 4)),
            voc_object(" ", (1, 2, 3, 4)),
            f"<size><width>{name}</width></size>",
            f"<{name}",
            "",
            voc_object(name, (1, 2, 1, 4)),
        ]
    ):
        folder = write_voc_folder(root / f"{number}{ODD}", a=inside)
        yield lambda folder=folder: read_voc(folder, "all")  # type: ignore[misc]
    odd = write_voc_folder(root / ODD, **{name: GOOD, "b": ""})
    (odd / "Annotations" / "b.xml").unlink()
    yield lambda: read_voc(odd, "all")
    yield lambda: read_voc(odd, ODD)
    yield lambda: read_voc(odd, "all", class_names=ODD)
    yield lambda: read_annotations(odd)
    yield lambda: read_annotations(odd, ODD, split="all")


def wrong_yolo(root: Path) -> Iterator[Callable[[], object]]:
    escaped = json.dumps(ODD)
    for number, (line, yaml) in enumerate(
        [
            ("0 \x1b[31m", f"train: images/train\nnames: [{escaped}]"),
            ("", f"train: images/train\nnames: [{escaped}]"),
            (BOX, f"train: {escaped}\nnames: [{escaped}]"),
            (BOX, f"train: images/train\nnames: {{{escaped}: {escaped}}}"),
            (BOX, f"train: images/train\nnames: {escaped}"),
            (BOX, f"train: images/train\nnames: [a]\nnc: {escaped}"),
            (BOX, f"train: images/train\nnames: *{ODD}"),
            (BOX, f"path: {escaped}\ntrain: images/train\nnames: [a]"),
            (BOX, "val: images/train\nnames: [a]"),
            (POSE_2D, "train: images/train\nnames: [a]"),
            (POSE_3D, "train: images/train\nnames: [a]"),
        ]
    ):
        path = write_yolo_folder(root / f"{number}{ODD}", line, yaml)
        yield lambda path=path: read_yolo(path, "train")  # type: ignore[misc]
    path = write_yolo_folder(root / ODD, BOX)
    write_photo(path.parent / "images" / "train" / f"{ODD}.png")  # without a label file
    yield lambda: read_yolo(path, "train")
    write_text(root / "list" / "t.txt", "\x1b[31m.png")
    listed = write_text(root / "list" / "data.yaml", "train: t.txt\nnames: [a]")
    yield lambda: read_yolo(listed, "train")
    damaged = write_yolo_folder(root / "damaged", BOX)
    write_text(damaged.parent / "images" / "train" / f"{ODD}.png", ODD)
    yield lambda: read_yolo(damaged, "train")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such file names")
@pytest.mark.parametrize("form", [wrong_coco, wrong_csv, wrong_voc, wrong_yolo])
def test_errors_warnings_and_log_lines_contain_no_control_characters(
    tmp_path: Path,
    form: Callable[[Path], Iterator[Callable[[], object]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for number, read in enumerate(form(tmp_path)):
        messages: list[str] = []
        caplog.clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                read()
            except (FileNotFoundError, TypeError, ValueError) as error:
                messages.append(str(error))
        messages += [str(one.message) for one in caught] + caplog.messages
        assert messages, f"number {number} is not wrong"
        for message in messages:
            assert message.isprintable(), (number, message)


@pytest.mark.parametrize(
    ("annotations", "file_name", "others"),
    [
        ("result.json", "images/a.png", ()),
        ("result.json", "images\\a.png", ()),
        ("my_train.json", "a.png", ("train",)),
        ("annotations/instances_val.json", "val/a.png", ("images",)),
        ("annotations/instances_val.json", "a.png", ("val", "images")),
    ],
)
def test_the_folder_is_that_in_which_the_first_images_are(
    tmp_path: Path, annotations: str, file_name: str, others: tuple[str, ...]
) -> None:
    for name in others:
        (tmp_path / name).mkdir()
    write_photo(tmp_path / file_name.replace("\\", "/"))
    images = [{"id": 1, "file_name": file_name, "width": 40, "height": 20}]
    table = read_coco(coco_file(tmp_path / annotations, images=images))
    assert table.tried_folders == ()
    assert DetectionDataset(table)[0][0].shape == (3, 20, 40)


def test_backslashes_that_belong_to_a_name_are_kept(tmp_path: Path) -> None:
    write_photo(tmp_path / "a\\b.png")
    images = [{"id": 1, "file_name": "a\\b.png"}]
    assert list(read_coco(coco_file(tmp_path / "c.json", images=images)).file_names) == ["a\\b.png"]


@pytest.mark.parametrize("name", ["\0", "x" * 5000, "\ud800", "..\\..\\", ""])
def test_names_that_no_file_can_have_are_kept(tmp_path: Path, name: str) -> None:
    path = coco_file(tmp_path / "c.json", images=[{"id": 1, "file_name": name}])
    assert list(read_coco(path).file_names) == [name]


def test_if_no_image_is_found_the_error_says_where_it_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    path = coco_file(tmp_path / "my_train.json")
    dataset = DetectionDataset(read_coco(path))
    with pytest.raises(FileNotFoundError) as caught:
        dataset[0]
    for folder in (tmp_path / "train", tmp_path, tmp_path.parent):
        assert repr(str(folder)) in str(caught.value)
    problems: list[Exception] = []
    read_coco(path, report=problems.append)
    [problem] = problems
    assert isinstance(problem, UserWarning)
    assert "Pass the folder of the images" in str(problem)


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("names: [no]", r"names\[0\] .*got False.*quotes"),
        ("names: [[a]]", r"names\[0\] .*got list"),
        ("names: [a]\npath: 3", "path in .* must be the name of a folder, got int"),
        ("names: [a]\ntrain: 3", "train in .* must be a path or a list of paths, got int"),
        ("names: " + "[" * 5000, "nested too deeply"),
        ("names: !!timestamp x", "as YAML"),
        ("names: [a]\nnc: [1]", "nc is list"),
    ],
)
def test_values_of_the_wrong_type_in_a_data_file_are_explained(
    tmp_path: Path, yaml: str, message: str
) -> None:
    if "train:" not in yaml:
        yaml = f"train: images/train\n{yaml}"
    with pytest.raises(AnnotationError, match=message):
        read_yolo(write_yolo_folder(tmp_path, BOX, yaml), "train")


def test_aliases_in_a_data_file_cost_little(tmp_path: Path) -> None:
    layers = "\n".join(f"  - &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]" for i in range(1, 12))
    path = write_yolo_folder(tmp_path, BOX, f"train: images/train\nnames:\n  - &x0 a\n{layers}\n")
    with pytest.raises(AnnotationError, match=r"names\[1\]"):
        read_yolo(path, "train")


def test_a_path_of_null_is_the_folder_of_the_file(tmp_path: Path) -> None:
    path = write_yolo_folder(tmp_path, BOX, "path:\ntrain: images/train\nnames: [a]")
    assert len(read_yolo(path, "train")) == 1
