from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from focaldet.datasets import read_csv
from tests.test_datasets_readers import write

if TYPE_CHECKING:
    from pathlib import Path


def test_a_csv_file_by_hand(tmp_path: Path) -> None:
    text = 'b.png,1,2,3.5,4,dog\n\na.png,,,,,\n"b.png", 5,6,7,8 ,cat\nc/d.png,nan,-1,0,inf,dog\n'
    table = read_csv(write(tmp_path / "train.csv", "\ufeff" + text))
    assert list(table.file_names) == ["b.png", "a.png", "c/d.png"]
    assert table.image_folder == tmp_path
    assert table.image_sizes.tolist() == [[0, 0]] * 3
    assert (table.class_names, table.category_ids) == (("cat", "dog"), (0, 1))
    expected = [[1, 2, 3.5, 4], [5, 6, 7, 8], [np.nan, -1, 0, np.inf]]
    np.testing.assert_array_equal(table.boxes, expected)
    assert table.labels.tolist() == [1, 0, 1]
    assert table.image_indices.tolist() == [0, 0, 2]
    assert table.annotation_ids.tolist() == [0, 1, 0]


def test_csv_names_may_be_given_or_be_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "train.csv", "b.png,1,2,3,4,dog\nb.png,1,2,3,4,cow\n")
    classes = write(tmp_path / "classes.csv", "dog,1\ncat,0\n")
    for names in (["cat", "dog"], classes, str(classes)):
        table = read_csv(path, class_names=names)
        assert table.class_names == ("cat", "dog")
        assert table.labels.tolist() == [1, -1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a,1,2,3,4",
            "`row` must be path,x1,y1,x2,y2,class; got 'a,1,2,3,4' in line 1 of '.*t.csv'",
        ),
        (",1,2,3,4,x", "`row` must be path,x1,y1,x2,y2,class"),
        ("a,,,,,\na,1,,3,4,x", "`x1,y1,x2,y2` must be numbers; got 'a,1,,3,4,x' in line 2"),
        ("path,x1,y1,x2,y2,class", "in line 1 of '.*'. A header is not part of this form"),
        ("a,1,2,3,4,", "`class` must be given for a box; got 'a,1,2,3,4,' in line 1"),
        ("\xff\xfe", "`annotations` must be a CSV file in UTF-8; got '.*t.csv'"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_csv(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat", "`row` must be class,number; got 'cat' in line 1 of '.*classes.csv'"),
        ("cat,one", "`row` must be class,number; got 'cat,one' in line 1"),
        ("cat,0\ncat,1", "`class` must be named once; got 'cat,1' in line 2"),
        ("cat,1\ndog,2", r"`class numbers` must be 0, 1, 2, ...; got \[1, 2\] in '.*classes.csv'"),
    ],
)
def test_wrong_class_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "train.csv", "a,,,,,")
    with pytest.raises(ValueError, match=message):
        read_csv(path, class_names=write(tmp_path / "classes.csv", text))


def test_missing_csv_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="`annotations` must be an existing file; got '.*no.csv'"
    ):
        read_csv(tmp_path / "no.csv")
    path = write(tmp_path / "train.csv", "a,,,,,")
    with pytest.raises(FileNotFoundError, match="`class_names` must be an existing file"):
        read_csv(path, class_names=tmp_path / "no.csv")
    with pytest.raises(
        FileNotFoundError, match="`images` must be an existing folder; got '.*nowhere'"
    ):
        read_csv(path, tmp_path / "nowhere")
