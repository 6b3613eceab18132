from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from focaldet.datasets import read_csv
from focaldet.errors import AnnotationError
from tests.helpers.annotation_files import write_text

if TYPE_CHECKING:
    from pathlib import Path


def test_a_csv_file_worked_by_hand(tmp_path: Path) -> None:
    text = 'b.png,1,2,3.5,4,dog\n\na.png,,,,,\n"b.png", 5,6,7,8 ,cat\nc/d.png,nan,-1,0,inf,dog\n'
    table = read_csv(write_text(tmp_path / "train.csv", "\ufeff" + text))
    assert list(table.file_names) == ["b.png", "a.png", "c/d.png"]
    assert table.image_folder == tmp_path
    assert table.image_sizes.tolist() == [[0, 0]] * 3
    assert (table.class_names, table.category_ids) == (("cat", "dog"), (0, 1))
    expected = [[1, 2, 3.5, 4], [5, 6, 7, 8], [np.nan, -1, 0, np.inf]]
    np.testing.assert_array_equal(table.boxes, expected)
    assert table.labels.tolist() == [1, 0, 1]
    assert table.image_indices.tolist() == [0, 0, 2]
    assert table.annotation_ids.tolist() == [0, 1, 0]


def test_class_names_are_given_as_a_list_or_in_a_file(tmp_path: Path) -> None:
    path = write_text(tmp_path / "train.csv", "b.png,1,2,3,4,dog\nb.png,1,2,3,4,cow\n")
    classes = write_text(tmp_path / "classes.csv", "dog,1\ncat,0\n")
    for names in (["cat", "dog"], classes, str(classes)):
        table = read_csv(path, class_names=names)
        assert table.class_names == ("cat", "dog")
        assert table.labels.tolist() == [1, -1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,1,2,3,4", "'.*t.csv', line 1: .*path,x1,y1,x2,y2,class, got 'a,1,2,3,4'"),
        (",1,2,3,4,x", "line 1: .*path,x1,y1,x2,y2,class, got ',1,2,3,4,x'"),
        ("a,,,,,\na,1,,3,4,x", "line 2: .*numbers, got 'a,1,,3,4,x'\\.$"),
        ("photo,left,top,right,bottom,kind", "line 1: .*numbers, .*header, name .*or remove it"),
        ("a,1,2,3,4,", "line 1: .*no class, got 'a,1,2,3,4,'"),
        ("a.png,,,,,\n\xe9", "'.*t.csv' as UTF-8.*line 2 .*0xe9"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(AnnotationError, match=message):
        read_csv(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat", "'.*classes.csv', line 1: .*class,number, got 'cat'"),
        ("cat,one", "line 1: .*class,number, got 'cat,one'"),
        ("cat,0\ncat,1", "line 2: .*'cat' .*twice"),
        ("cat,1\ndog,2", r"'.*classes.csv' .*0, 1, 2, ..., got \[1, 2\]"),
    ],
)
def test_wrong_class_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = write_text(tmp_path / "train.csv", "a,,,,,")
    with pytest.raises(AnnotationError, match=message):
        read_csv(path, class_names=write_text(tmp_path / "classes.csv", text))


def test_missing_csv_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"file: '.*no.csv' \(annotations\)"):
        read_csv(tmp_path / "no.csv")
    path = write_text(tmp_path / "train.csv", "a,,,,,")
    with pytest.raises(FileNotFoundError, match=r"file: '.*no.csv' \(class_names\)"):
        read_csv(path, class_names=tmp_path / "no.csv")
    with pytest.raises(FileNotFoundError, match=r"file: 'cat' \(class_names\)"):
        read_csv(path, class_names="cat")
    with pytest.raises(FileNotFoundError, match=r"folder: '.*nowhere' \(images\)"):
        read_csv(path, tmp_path / "nowhere")
