from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from focaldet.datasets import check_dataset, read_annotations, read_labelme
from focaldet.datasets.readers import _labelme, find_reader
from focaldet.errors import AnnotationError
from tests.helpers.annotation_files import write_photo, write_text

if TYPE_CHECKING:
    from pathlib import Path


def shape(label: Any, points: Any, kind: str = "rectangle", **fields: Any) -> dict[str, Any]:
    """Return a shape as LabelMe writes it."""
    return {"label": label, "points": points, "shape_type": kind, "flags": {}, **fields}


def write_file(path: Path, *shapes: Any, image: str = "", **fields: Any) -> Path:
    """Write a LabelMe file of a 40x20 image, which has its name by default."""
    content = {
        "version": "5.2.1",
        "flags": {},
        "shapes": list(shapes),
        "imagePath": image or f"{path.stem}.png",
        "imageData": "aGk=",
        "imageHeight": 20,
        "imageWidth": 40,
        **fields,
    }
    return write_text(path, json.dumps(content))


def test_a_labelme_folder_worked_by_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_file(
        tmp_path / "b.json",
        shape("dog", [[30, 15.5], [10, 5]]),
        shape("cat", [[1, 2], [9, 4], [5, 12]], "polygon"),
        shape("cat", [[10, 10], [13, 14]], "circle"),
        shape("dog", [[1, 1], [2, 2]], flags={"crowd": True}),
        shape("dog", [[1, 1], [2, 2]], difficult=True),
    )
    write_file(tmp_path / "a" / "c.json", imageHeight=None)
    table = read_annotations(tmp_path)
    assert find_reader(tmp_path).NAME == "LabelMe"
    assert list(table.file_names) == ["a/c.png", "b.png"]
    assert table.image_folder == tmp_path
    assert table.image_sizes.tolist() == [[0, 0], [20, 40]]
    assert table.class_names == ("cat", "dog")
    assert table.boxes.tolist() == [
        [10, 5, 30, 15.5],
        [1, 2, 9, 12],
        [5, 5, 15, 15],
        [1, 1, 2, 2],
        [1, 1, 2, 2],
    ]
    assert table.labels.tolist() == [1, 0, 0, 1, 1]
    assert table.crowd.tolist() == [False, False, False, True, True]
    assert "replaced by their bounding boxes: 1 polygon, 1 circle." in caplog.text


def test_image_paths_of_other_computers_are_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("photos/a.png", "json/b.png"):
        write_photo(tmp_path / name)
    box = shape("cat", [[1, 2], [3, 4]])
    write_file(tmp_path / "json" / "a.json", box, image="..\\photos\\a.png")
    write_file(tmp_path / "json" / "b.json", box, image="C:\\photos\\b.png")
    table = read_labelme(tmp_path / "json")
    assert table.image_path(0) == tmp_path / "photos" / "a.png"
    assert table.image_path(1) == tmp_path / "json" / "b.png"
    assert "next to their .json file: 1." in caplog.text


def test_classes_are_given_listed_or_those_of_all_splits(tmp_path: Path) -> None:
    for split, name in (("train", "dog"), ("val", "cat")):
        write_file(tmp_path / split / "a.json", shape(name, [[1, 2], [3, 4]]))
    assert find_reader(tmp_path).splits(tmp_path) == ("train", "val")
    table = read_annotations(tmp_path, split="train")
    assert (table.class_names, table.labels.tolist()) == (("cat", "dog"), [1])
    assert table.image_folder == tmp_path / "train"
    table = read_annotations(tmp_path, split="train", class_names=["cow", "dog", "cat"])
    assert table.labels.tolist() == [1]
    write_text(tmp_path / "labels.txt", "__ignore__\n_background_\ndog\n\ncow\n")
    table = read_labelme(tmp_path, "train")
    assert (table.class_names, table.labels.tolist()) == (("dog", "cow"), [0])
    assert len(read_labelme(tmp_path, class_names=["cat", "dog"])) == 2
    with pytest.raises(FileNotFoundError, match="split 'dev' in .*'train' and 'val'"):
        read_annotations(tmp_path, split="dev")
    with pytest.raises(ValueError, match="split is required.*'train' and 'val'"):
        read_annotations(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"a.json': it is not valid JSON"),
        ("[]", "a.json' is not a LabelMe file: it has no list 'shapes'"),
        ('{"shapes": []}', "imagePath must be the path of the image, got None"),
    ],
)
def test_damaged_files_are_errors(tmp_path: Path, content: str, message: str) -> None:
    write_text(tmp_path / "a.json", content)
    with pytest.raises(AnnotationError, match=message):
        read_labelme(tmp_path)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (7, "shape 1 is not an object, but 7"),
        (shape(None, [[1, 2], [3, 4]]), "shape 1: label must be a name, got None"),
        (shape("", [[1, 2], [3, 4]]), "label must be a name, got ''"),
        (shape("cat", []), r"shape 1: points must be a list of points \[x, y\], got \[\]"),
        (shape("cat", [[1, 2], [3]]), "points must be"),
        (shape("cat", [[1, 2], [3, float("nan")]]), "points must be"),
    ],
)
def test_wrong_shapes_are_errors_or_reported(tmp_path: Path, item: Any, message: str) -> None:
    write_file(tmp_path / "a.json", item, shape("cat", [[1, 2], [3, 4]]))
    with pytest.raises(AnnotationError, match=message):
        read_labelme(tmp_path)
    problems: list[Exception] = []
    table = read_labelme(tmp_path, report=problems.append)
    assert len(table.boxes) == 1
    assert [type(problem) for problem in problems] == [AnnotationError]
    assert not check_dataset(table, problems=problems, images="none").ok


def test_a_wrong_size_is_reported_and_read_from_the_image(tmp_path: Path) -> None:
    write_file(tmp_path / "a.json", shape("cat", [[1, 2], [3, 4]]), imageHeight=-1)
    with pytest.raises(AnnotationError, match=r"must be numbers of pixels, got \[-1, 40\]"):
        read_labelme(tmp_path)
    problems: list[Exception] = []
    assert read_labelme(tmp_path, report=problems.append).image_sizes.tolist() == [[0, 0]]
    assert len(problems) == 1


def test_folders_without_labelme_files_are_not_recognised(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There are no .json files in"):
        read_labelme(tmp_path)
    content = '{"images": [], "categories": [{"name": "shapes"}], "shapes": []}'
    path = write_text(tmp_path / "train" / "a.json", content)
    assert not _labelme.recognises(tmp_path)
    assert not _labelme.recognises(path)
    write_text(path, '{"shapes": []}')
    assert _labelme.recognises(tmp_path)
