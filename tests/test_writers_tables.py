"""Tables of detections, and tables of some images."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from focaldet import Detections
from focaldet.datasets import AnnotationTable, write_annotations
from tests.helpers.annotation_tables import Row, table_of_rows

if TYPE_CHECKING:
    from pathlib import Path

ROWS: list[Row] = [
    (0, 1, [1, 2, 3, 4]),
    (0, 0, [5, 6, 7, 8]),
    (2, 0, [9, 9, 10, 10]),
    (3, 1, [0, 0, 1, 1]),
]
TABLE = table_of_rows(
    *ROWS,
    files=("a.png", "b.png", "c.png", "d.png"),
    crowd=(2,),
)


def found(source: str | None, *labels: int, **changes: Any) -> Detections:
    """Return detections with a box for each label in a 20x40 image."""
    count = len(labels)
    return Detections(
        boxes=torch.tensor([[1.5, 2, 11, 12]] * count).reshape(-1, 4),
        scores=torch.linspace(0.9, 0.5, count),
        labels=torch.tensor(labels, dtype=torch.int64),
        image_size=(20, 40),
        source=source,
        **{"class_names": ("cat", "dog"), **changes},
    )


def test_selected_images_keep_their_boxes_and_ids() -> None:
    table = TABLE.select([3, -2, 0])
    assert list(table.file_names) == ["d.png", "c.png", "a.png"]
    assert table.image_ids.tolist() == [14, 13, 11]
    assert table.image_indices.tolist() == [0, 1, 2, 2]
    assert table.annotation_ids.tolist() == [504, 503, 501, 502]
    assert table.boxes[:, 0].tolist() == [0, 9, 1, 5]
    assert table.labels.tolist() == [1, 0, 1, 0]
    assert table.areas.tolist() == [1, 1, 4, 4]
    assert table.crowd.tolist() == [False, True, False, False]
    assert table.image_sizes.tolist() == [[80, 100]] * 3
    assert table.class_names == TABLE.class_names


def test_images_are_selected_by_a_mask_or_not_at_all() -> None:
    assert TABLE.select([True, False, False, True]).image_ids.tolist() == [11, 14]
    assert TABLE.select(np.array([1])).annotation_ids.tolist() == []
    empty = TABLE.select([])
    assert (len(empty), len(empty.boxes), empty.image_sizes.shape) == (0, 0, (0, 2))
    assert len(empty.select([])) == 0


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 4], IndexError, "contains 4, which is out of range for 4 images"),
        ([-5], IndexError, "contains -5"),
        ([True], IndexError, "mask of 1 images, but the table has 4"),
        ([0, -4], ValueError, "contains image 0 more than once"),
        ([0.5], TypeError, r"must be a sequence of integers or bools, got \[0.5\]"),
        ([[0]], TypeError, "must be a sequence of integers"),
    ],
)
def test_wrong_indices_are_errors(indices: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TABLE.select(indices)


def test_detections_become_annotations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "focaldet")
    sources = [str(tmp_path / name) for name in ("a.png", "sub/b.png", "c.png")]
    given = [found(sources[0], 1, 0), None, found(sources[1]), found(sources[2], 1)]
    table = AnnotationTable.from_detections(given)
    assert table.image_folder == tmp_path
    assert list(table.file_names) == ["a.png", "sub/b.png", "c.png"]
    assert (table.class_names, table.category_ids) == (("cat", "dog"), (0, 1))
    assert table.boxes.tolist() == [[1.5, 2, 11, 12]] * 3
    assert table.boxes.dtype == np.float64
    assert table.areas.tolist() == [95] * 3
    assert table.labels.tolist() == [1, 0, 1]
    assert table.image_indices.tolist() == [0, 0, 2]
    assert table.annotation_ids.tolist() == [0, 1, 0]
    assert table.image_sizes.tolist() == [[20, 40]] * 3
    assert "Images without detections (None) left out: 1." in caplog.text
    assert "Scores dropped, which annotations do not have: 3." in caplog.text
    path = write_annotations(table, tmp_path / "auto.json", "coco")
    images = json.loads(path.read_text())["images"]
    assert [image["file_name"] for image in images] == list(table.file_names)


def test_the_folder_and_the_classes_of_detections_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    inside, outside = str(tmp_path / "photos" / "b" / "x.png"), str(tmp_path / "y.png")
    given = [found(inside, 2, class_names=None), found(outside, 0)]
    table = AnnotationTable.from_detections(
        given, class_names=["cat", "dog", "cow"], image_folder=tmp_path / "photos"
    )
    assert list(table.file_names) == ["b/x.png", outside]
    assert table.class_names == ("cat", "dog", "cow")
    assert table.image_path(1) == tmp_path / "y.png"
    with pytest.raises(FileNotFoundError, match=r"No such folder: .*\(image_folder\)"):
        AnnotationTable.from_detections(given, class_names=["cat"] * 3, image_folder="no")


@pytest.mark.parametrize(
    ("given", "class_names", "message"),
    [
        ([], None, "detections contains no image"),
        ([None], None, "detections contains no image"),
        ([found("a.png"), found(None)], None, r"detections\[1\] has no source.*with_source"),
        ([found("a.png", 0, class_names=None)], None, r"detections\[0\] has no class_names"),
        (
            [found("a.png"), None, found("b.png", class_names=("dog",))],
            None,
            r"detections\[2\] has the class names \('dog',\), but those before .*'cat', 'dog'",
        ),
        ([found("a.png", 1)], ["cat"], r"detections\[0\] contains the label 1.*0 to 0 only"),
    ],
)
def test_detections_that_cannot_be_annotations_are_errors(
    given: list[Detections | None], class_names: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AnnotationTable.from_detections(given, class_names=class_names)
