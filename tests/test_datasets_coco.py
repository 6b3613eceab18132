from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from focaldet.datasets import DetectionDataset, read_coco
from focaldet.evaluation import evaluate_coco
from tests.helpers.coco_files import annotation, coco_file
from tests.helpers.shared import SHARED

if TYPE_CHECKING:
    from pathlib import Path

COCO_SAMPLE = SHARED / "data" / "coco_sample"

real = pytest.mark.skipif(
    not COCO_SAMPLE.is_dir(), reason="real COCO files are not next to this checkout"
)


@pytest.mark.usefixtures("json_parser")
def test_a_small_file_becomes_the_expected_table(tmp_path: Path) -> None:
    table = read_coco(coco_file(tmp_path), cache=False)
    assert list(table.file_names) == ["b.png", "a.png"]
    assert table.image_ids.tolist() == [30, 10]
    assert table.image_sizes.tolist() == [[40, 60], [20, 30]]
    assert (table.class_names, table.category_ids) == (("dog", "cat"), (2, 9))
    assert table.image_indices.tolist() == [0, 1, 1]
    assert table.annotation_ids.tolist() == [5, 7, 6]
    assert table.boxes.tolist() == [[10.5, 0, 14.5, 8], [1, 2, 4, 6], [0, 0, 30, 20]]
    assert table.labels.tolist() == [0, 1, 1]
    assert table.areas.tolist() == [32, 12, 12.5]
    assert table.crowd.tolist() == [False, False, True]
    assert table.boxes_of(1) == slice(1, 3)
    assert table.image_path(1) == tmp_path / "a.png"


@pytest.mark.usefixtures("json_parser")
@pytest.mark.filterwarnings("ignore:.*(no objects|no images|can be learned):UserWarning")
def test_no_box_is_dropped_or_corrected(tmp_path: Path) -> None:
    boxes = [[math.nan, 0, 1, 1], [-5, 3, 0, 900], [0, 0, -2, math.inf]]
    annotations = [annotation(i, 10, bbox=box) for i, box in enumerate(boxes)]
    annotations[1]["category_id"] = 77
    table = read_coco(coco_file(tmp_path, annotations=annotations), cache=False)
    expected = [[math.nan, 0, math.nan, 1], [-5, 3, -5, 903], [0, 0, -2, math.inf]]
    np.testing.assert_array_equal(table.boxes, expected)
    assert table.labels.tolist() == [1, -1, 1]


@pytest.mark.usefixtures("json_parser")
def test_optional_fields_may_be_missing_or_null(tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "a"}, {"id": 2, "file_name": "b", "height": None, "width": 4}]
    bare = {"id": 1, "image_id": 1, "category_id": 9, "bbox": [1, 2, 3, 4]}
    null = {**bare, "area": None, "iscrowd": None}
    true = {**bare, "iscrowd": True}
    path = coco_file(tmp_path, images=images, annotations=[bare, null, true])
    table = read_coco(path, cache=False)
    assert table.image_sizes.tolist() == [[0, 0], [0, 4]]
    assert table.areas.tolist() == [12, 12, 12]
    assert table.crowd.tolist() == [False, False, True]


@pytest.mark.usefixtures("json_parser")
@pytest.mark.filterwarnings("ignore:.*(no objects|no images|can be learned):UserWarning")
def test_an_empty_file_is_an_empty_table(tmp_path: Path) -> None:
    table = read_coco(coco_file(tmp_path, images=[], annotations=[], categories=[]), cache=False)
    assert len(table) == 0
    assert table.boxes.shape == (0, 4)
    assert len(DetectionDataset(table)) == 0


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
SEGMENTATIONS = st.one_of(
    st.lists(st.lists(st.floats(-1e3, 1e3) | st.integers(-9, 999), max_size=6), max_size=3),
    st.fixed_dictionaries({"counts": TEXT | st.lists(st.integers(0, 9)), "size": st.just([4, 5])}),
    st.none(),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), indent=st.sampled_from([None, 0, 2]))
@pytest.mark.usefixtures("json_parser")
@pytest.mark.filterwarnings("ignore:.*(no objects|no images|can be learned):UserWarning")
def test_random_files_are_read_as_the_json_module_reads_them(
    tmp_path: Path, data: st.DataObject, indent: int | None
) -> None:
    numbers = st.floats(-1e6, 1e6) | st.integers(-(10**6), 10**6)
    rows = data.draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "bbox": st.lists(numbers, min_size=4, max_size=4),
                    "image_id": st.sampled_from([3, 8]),
                },
                optional={
                    "segmentation": SEGMENTATIONS,
                    "note": TEXT,
                    '\\"segmentation': SEGMENTATIONS,
                },
            ),
            max_size=5,
        )
    )
    annotations: list[dict[str, Any]] = [
        {**row, "id": i, "category_id": 1} for i, row in enumerate(rows)
    ]
    names = data.draw(st.lists(TEXT, min_size=2, max_size=2))
    images = [{"id": i, "file_name": name} for i, name in zip((8, 3), names, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    path = tmp_path / "random.json"
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
    table = read_coco(path, cache=False)
    assert list(table.file_names) == names
    wanted = sorted(annotations, key=lambda row: row["image_id"] == 3)
    assert table.annotation_ids.tolist() == [row["id"] for row in wanted]
    for box, row in zip(table.boxes, wanted, strict=True):
        x, y, width, height = map(float, row["bbox"])
        assert box.tolist() == [x, y, x + width, y + height]


@real
@pytest.mark.usefixtures("json_parser")
@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_coco_is_read_as_pycocotools_reads_it(
    split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = COCO_SAMPLE / "annotations" / f"instances_{split}.json"
    table = read_coco(path, cache=False)
    assert table.image_folder == COCO_SAMPLE / split
    peer = COCO(str(path))
    capsys.readouterr()
    assert table.category_ids == tuple(sorted(peer.cats))
    for index, image_id in enumerate(table.image_ids.tolist()):
        rows = table.boxes_of(index)
        annotations = peer.imgToAnns[image_id]
        assert table.annotation_ids[rows].tolist() == [one["id"] for one in annotations]
        assert table.areas[rows].tolist() == [one["area"] for one in annotations]
        assert table.crowd[rows].tolist() == [one["iscrowd"] == 1 for one in annotations]
        assert [table.category_ids[label] for label in table.labels[rows]] == [
            one["category_id"] for one in annotations
        ]
        assert table.image_path(index).is_file()


@real
def test_to_coco_is_evaluated_like_the_file() -> None:
    path = COCO_SAMPLE / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    found = [
        {
            "image_id": one["image_id"],
            "category_id": one["category_id"],
            "score": score,
            "bbox": box,
        }
        for score, one in zip(
            np.linspace(0.1, 0.9, 517).tolist(), content["annotations"], strict=True
        )
        for box in ([one["bbox"][0] + 3, *one["bbox"][1:]], [0, 0, 50, 50])
    ]
    table = read_coco(path, cache=False)
    assert evaluate_coco(table.to_coco(), found).stats == evaluate_coco(path, found).stats


def test_to_coco_leaves_out_unusable_boxes_and_replaces_unusable_ids(
    tmp_path: Path,
) -> None:
    boxes = [[0, 0, 5, 5], [0, 0, 0, 5], [math.nan, 0, 1, 1], [1, 1, 2, 2], [5, 5, -1, 2]]
    annotations = [annotation(i, 10, bbox=box) for i, box in enumerate(boxes)]
    annotations.append(annotation(9, 30, category_id=77))
    table = read_coco(coco_file(tmp_path, annotations=annotations), cache=False)
    message = (
        r"leaves out 3 of 6 annotations in '.*some.json': 2 not finite or of negative size, 1 of an "
        r"undeclared category. The first is annotation 9 of b.png, .*\[1.0, 2.0, 4.0, 6.0\]"
    )
    with pytest.warns(UserWarning, match=message) as caught:
        truth = table.to_coco()
    assert caught[0].filename == __file__
    assert [(one["id"], one["bbox"]) for one in truth["annotations"]] == [
        (1, [0, 0, 5, 5]),  # pycocotools cannot handle the id 0
        (2, [0, 0, 0, 5]),
        (3, [1, 1, 2, 2]),
    ]
    assert truth["images"][1] == {"id": 10, "file_name": "a.png", "height": 20, "width": 30}
    assert truth["categories"] == [{"id": 2, "name": "dog"}, {"id": 9, "name": "cat"}]
    kept = read_coco(coco_file(tmp_path), cache=False).to_coco()["annotations"]
    assert [one["id"] for one in kept] == [5, 7, 6]


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file: '.*no.json' \(annotations\)"):
        read_coco(tmp_path / "no.json")
    with pytest.raises(FileNotFoundError, match=r"No such folder: '.*nowhere' \(images\)"):
        read_coco(coco_file(tmp_path), tmp_path / "nowhere")


def test_the_image_folder_is_found_in_cocos_layout(tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    path = coco_file(tmp_path / "annotations")
    assert read_coco(path, cache=False).image_folder == path.parent
    (tmp_path / "images").mkdir()
    assert read_coco(path, cache=False).image_folder == tmp_path / "images"
    (tmp_path / "some").mkdir()
    assert read_coco(path, cache=False).image_folder == tmp_path / "some"
    assert read_coco(path, tmp_path, cache=False).image_folder == tmp_path


@pytest.mark.filterwarnings("ignore:.*(no objects|no images|can be learned):UserWarning")
def test_packed_file_names_can_be_indexed_like_a_list(tmp_path: Path) -> None:
    names = ["ä/ö.jpg", "", "c", "日本.png"]
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    packed = read_coco(coco_file(tmp_path, images=images, annotations=[])).file_names
    assert list(packed) == names
    assert (packed[-1], packed[1:3]) == (names[-1], names[1:3])
    with pytest.raises(IndexError):
        packed[4]
